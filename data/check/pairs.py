"""Report what rankings hold: K, pairs, unfinished responses, and what looks like a bias.

The rankings are read once and not kept: what must be known across them is kept as 64-bit hashes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from data.check.clusters import Share
from data.check.judgments import Judgments
from data.check.report import Report
from data.encode import encode_prompt, encode_response
from data.length_limit import equal_pairs
from data.records import Ranking, judged_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMED = 20
"""Locations that are named at most."""
CERTAIN = 1e-9
"""A share that is closer to 1 says how the file was written, and nothing about people."""


@dataclass
class PairTally:
    """Count pairs of rankings one by one."""

    cut: tuple[PreTrainedTokenizerBase, int] | None = None
    """The tokenizer and max_length, if longer responses are truncated."""
    sizes: Counter[int] = field(default_factory=Counter)
    """K → rankings."""
    finished: Counter[bool] = field(default_factory=Counter)
    """Whether a response is finished → responses of rankings that say so."""
    verdicts: Counter[str] = field(default_factory=Counter)
    """Verdict of `judged_pairs` → pairs."""
    equal: list[tuple[str, int]] = field(default_factory=list)
    """(location, number of pairs that truncation makes equal)."""
    first: Share = field(default_factory=Share)
    """Whether the response that is listed first is the better one of a pair."""
    longer: Share = field(default_factory=Share)
    """Whether the longer response is the better one of a pair."""
    labels: Counter[bool] = field(default_factory=Counter)
    """Whether a response is good by itself → the number of such labels."""
    judgments: Judgments = field(default_factory=Judgments)
    """Who judged which pair how."""

    def __post_init__(self) -> None:
        self.longer.ordinals = self.first.ordinals  # the same prompts, and a million of them are large

    def add(self, ranking: Ranking, name: str, prompt: int) -> None:
        """Count a ranking.

        Args:
            ranking: The ranking.
            name: Its location.
            prompt: The hash of its prompt.
        """
        self.sizes[len(ranking.responses)] += 1
        self.finished.update(ranking.finished or ())
        self.labels.update(label for label in ranking.labels or () if label is not None)
        better = []
        for i, j, verdict in judged_pairs(ranking):
            self.verdicts[verdict] += 1
            if verdict != "usable":
                continue
            better.append((i, j))
            self.first.add(prompt, float(i < j))
            lengths = len(ranking.responses[i]), len(ranking.responses[j])
            if lengths[0] != lengths[1]:
                self.longer.add(prompt, float(lengths[0] > lengths[1]))
        self.judgments.add(ranking, better, prompt)
        if self.cut is not None:
            count = equal_within(ranking, *self.cut)
            if count:
                self.equal.append((name, count))

    def usable(self) -> bool:
        """Return whether a loss can learn from any of it."""
        return bool(self.verdicts["usable"] or self.labels)

    def report(self, report: Report) -> None:
        """Report K, unfinished responses, pairs, labelers and biases."""
        report.add("K", " · ".join(f"{k}: {count:,} rows" for k, count in sorted(self.sizes.items())))
        if self.finished:
            cut, total = self.finished[False], self.finished.total()
            report.add("unfinished", f"{cut:,} of {total:,} responses were cut off: taught without EOS")
        others = " · ".join(f"{self.verdicts[name]:,} {name}" for name in ("tie", "unjudged", "identical"))
        usable = self.verdicts["usable"] - sum(count for _, count in self.equal)
        limit = self.cut[1] if self.cut is not None else None
        if self.equal:
            others += f" · {self.verdicts['usable'] - usable:,} equal within {limit} tokens"
        report.add("pairs", f"{usable:,} usable of {self.verdicts.total():,} · {others}")
        if self.labels:
            report.add("labels", f"{self.labels[True]:,} good · {self.labels[False]:,} bad (dpo.loss_type: kto)")
        if self.equal:
            shown = [f"{name} ({count:,})" if count > 1 else name for name, count in self.equal[:NAMED]]
            more = f" and {len(self.equal) - NAMED:,} more rows" if len(self.equal) > NAMED else ""
            report.add("equal within", f"{limit} tokens, and so left out: at {', '.join(shown)}{more}")
        self.judgments.report(report)
        if self.first.number:
            report.add("first listed", self._first_text())
        if self.longer.number:
            report.add("longer response", f"is the better one in {self.longer.text()}")

    def _first_text(self) -> str:
        """Say whether the response that is listed first is preferred."""
        if self.first.value > 1 - CERTAIN:
            return "is always the better one: the file lists the best first, and not as people saw them"
        return f"is the better one in {self.first.text()}"


def equal_within(ranking: Ranking, tokenizer: PreTrainedTokenizerBase, limit: int) -> int:
    """Return the number of pairs that differ only after the limit, where long rows are truncated.

    Args:
        ranking: The ranking.
        tokenizer: The tokenizer.
        limit: max_length in tokens.
    """
    responses = [encode_response(tokenizer, text, finished) for text, finished in ranking.answers]
    left = limit - len(encode_prompt(tokenizer, ranking.prompt))
    if left < 1 or max(map(len, responses)) <= left:
        return 0  # dropped as a whole, or not truncated
    return equal_pairs(ranking, [response[:left] for response in responses])
