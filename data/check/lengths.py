"""Report how long rows are, what a limit does to them, and whether the template agrees."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from data import answer_lengths
from data.agreement import MOST_ROWS, Answered, compare, remedy
from data.check.report import Limits, Report
from data.check.scripts import counts_characters, unspaced_characters
from data.encode import encode_prompts, encode_response, teach
from data.records import Demonstration, Document, Prompt, Ranking, Record, as_messages
from data.templates import TemplateOverrun
from data.turns import Turns, turns_of
from pipeline.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Sizes = dict[str, list[int]]
"""Part of a row → the lengths of such parts: {"prompt": [12], "response": [40, 35]}."""
PARTS = ("document", "prompt", "completion", "response")
"""Parts of rows, in the order in which they are reported."""
MOST_REFUSED = 100
"""Error lines about rows that a template refuses, or that are too long, at most."""


@dataclass
class LengthTally:
    """Count lengths row by row, and which rows a limit refuses, drops or cuts."""

    limits: Limits
    """The tokenizer, or none, and the limits."""
    sizes: dict[str, Counter[int]] = field(default_factory=dict)
    """Part → {length: how many parts are as long}, in tokens, or in words without a tokenizer."""
    characters: dict[str, Counter[int]] = field(default_factory=dict)
    """The same in characters, without a tokenizer."""
    unspaced: int = 0
    """Characters of scripts that write no blanks between words."""
    rows: int = 0
    """Rows that were measured; a demonstration may be several."""
    over: int = 0
    """Rows over the limit."""
    dropped: int = 0
    """Rows over the limit of which nothing is left."""
    apart: int = 0
    """Earlier answers of demonstrations that have a row of their own."""
    first_over: str = ""
    """The location of the first row over the limit."""
    errors: list[str] = field(default_factory=list)
    """Error lines."""
    failed: bool = False
    """Whether the chat template takes too long, so that nothing more is measured."""

    def add(self, records: Sequence[Record], names: Sequence[str]) -> None:
        """Measure records.

        Args:
            records: The records, all of one kind.
            names: Their locations.
        """
        tokenizer = self.limits.tokenizer
        if self.failed:
            return
        if tokenizer is None:
            for record in records:
                self._add_words(record)
            return
        try:
            if isinstance(records[0], Demonstration):
                self._add_demonstrations(tokenizer, records, names)
                return
            measured = row_lengths(tokenizer, records, names)
        except UserError as error:  # the chat template refuses a prompt
            self.failed = isinstance(error.__cause__, TemplateOverrun)
            self.errors += error.lines[: max(0, MOST_REFUSED - len(self.errors))]
            return
        for sizes, name in zip(measured, names, strict=True):
            self._add_row(sizes, name)
            prompt = sizes.get("prompt", [0])[0]
            self._limit(prompt, prompt + max(sizes.get("response", [0])), name)

    def _add_words(self, record: Record) -> None:
        """Measure a record in words and in characters."""
        for part, texts in texts_of(record, self.limits.turns).items():
            words, characters = self.sizes.setdefault(part, Counter()), self.characters.setdefault(part, Counter())
            for text in texts:
                words[len(text.split())] += 1
                characters[len(text)] += 1
                self.unspaced += unspaced_characters(text)
        self.rows += 1

    def _add_demonstrations(
        self, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], names: Sequence[str]
    ) -> None:
        """Measure demonstrations as training encodes them: a row may teach several answers."""
        demonstrations = [record for record in records if isinstance(record, Demonstration)]
        for rows, name in zip(teach(tokenizer, demonstrations, names, self.limits.turns), names, strict=True):
            self.apart += max(0, len(rows) - 1)
            for row in rows:
                prompt = row.spans[0][0]
                self._add_row({"prompt": [prompt], "completion": [end - begin for begin, end in row.spans]}, name)
                self._limit(prompt, len(row.ids), name)

    def _add_row(self, sizes: Sizes, name: str) -> None:
        """Count the lengths of a row's parts."""
        self.rows += 1
        for part, lengths in sizes.items():
            self.sizes.setdefault(part, Counter()).update(lengths)

    def _limit(self, prompt: int, total: int, name: str) -> None:
        """Count a row that is longer than the limit.

        Args:
            prompt: Tokens of the prompt.
            total: Tokens of the prompt and the longest response.
            name: The row's location.
        """
        limit, on_too_long = self.limits.max_length, self.limits.on_too_long
        if limit is None or on_too_long is None or total <= limit:
            return
        self.over += 1
        self.first_over = self.first_over or name
        self.dropped += on_too_long == "drop" or prompt >= limit
        if on_too_long == "error" and len(self.errors) < MOST_REFUSED:
            advice = "shorten it, raise max_length, or set on_too_long: drop or truncate"
            self.errors.append(f"{name}: {total} tokens, the limit is {limit}; {advice}")

    @property
    def unit(self) -> str:
        """Return what lengths are counted in."""
        if self.limits.tokenizer is not None:
            return "tokens"
        characters = sum(length * count for counts in self.characters.values() for length, count in counts.items())
        return "characters" if counts_characters(self.unspaced, characters) else "words"

    @property
    def counted(self) -> dict[str, Counter[int]]:
        """Return {part: {length: how many}} in `unit`, in the order of PARTS."""
        chosen = self.characters if self.unit == "characters" else self.sizes
        return {part: chosen[part] for part in PARTS if part in chosen}

    def report(self, report: Report) -> None:
        """Report lengths, and what the limit does."""
        report.errors += self.errors
        counted = self.counted
        if not counted or (self.errors and not self.over):
            return
        for part, counts in counted.items():
            report.add(f"{part} length", spread(counts, self.unit))
        if self.unit == "characters":
            report.add("counted in", "characters: most of the text is in a script without blanks between words")
        limit, on_too_long = self.limits.max_length, self.limits.on_too_long
        if limit is None or on_too_long is None:
            return
        if "document" in counted:
            report.add("too long", f"none can be: packed end to end into rows of {limit} tokens")
        elif self.limits.tokenizer is None:
            report.add("too long", f"not counted: the limit is {limit} tokens, no tokenizer here")
        else:
            self._report_limit(report, limit, on_too_long)

    def _report_limit(self, report: Report, limit: int, on_too_long: str) -> None:
        """Report which rows are over the limit."""
        if on_too_long == "error":
            text = f"{self.over:,} refused"
            if self.over > MOST_REFUSED:
                report.errors.append(f"{report.name}: {self.over - MOST_REFUSED:,} more rows are too long")
        elif on_too_long == "drop":
            text = f"{self.dropped:,} dropped"
        else:
            text = f"{self.over - self.dropped:,} lose their end and EOS, {self.dropped:,} dropped (no room)"
        if on_too_long != "error" and self.dropped == self.rows:
            report.errors.append(f"{report.name}: no row is left within {limit} tokens; raise max_length")
        first = f" · the first at {self.first_over}" if self.over else ""
        report.add("too long", f"{text} · limit {limit} tokens, on_too_long: {on_too_long}{first}")

    def apart_text(self) -> str:
        """Say how many earlier answers have rows of their own, and why; "" if none has."""
        if not self.apart:
            return ""
        name = self.limits.tokenizer.name_or_path if self.limits.tokenizer is not None else ""
        return (
            f"; {self.apart:,} earlier ones in rows of their own: the chat template of {name} writes them otherwise "
            f"than they are sampled"
        )

    def report_room(self, report: Report, response_length: int) -> None:
        """Report how many answers are longer than PPO's responses can be.

        Args:
            report: Where the fact goes.
            response_length: ppo.response_length.
        """
        lengths = list(self.sizes.get("completion", Counter()).elements())
        if lengths:
            marks = answer_lengths.quantiles(lengths)
            text = answer_lengths.warning(marks, response_length)
            report.add("room in ppo", text or f"answers have {answer_lengths.describe(marks, response_length)}")


def row_lengths(tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], names: Sequence[str]) -> list[Sizes]:
    """Return the lengths in tokens of documents, prompts or rankings, with template and EOS.

    Args:
        tokenizer: The tokenizer.
        records: The records.
        names: Their locations.

    Raises:
        UserError: The chat template refuses a prompt.
    """
    if isinstance(records[0], Document):
        return [{"document": [len(encode_response(tokenizer, text))]} for text in (r.text for r in records)]  # type: ignore[union-attr]
    asked = [record for record in records if isinstance(record, Prompt | Ranking)]
    prompts = encode_prompts(tokenizer, [record.prompt for record in asked], names)
    sizes: list[Sizes] = []
    for record, prompt in zip(asked, prompts, strict=True):
        sizes.append({"prompt": [len(prompt)]})
        if isinstance(record, Ranking):
            sizes[-1]["response"] = [len(encode_response(tokenizer, *answer)) for answer in record.answers]
    return sizes


def texts_of(record: Record, turns: Turns = "all") -> dict[str, list[str]]:
    """Return {part of a record: the texts of such parts}; of a demonstration the answers taught.

    Args:
        record: The record.
        turns: Which answers of a demonstration are taught.
    """
    if isinstance(record, Document):
        return {"document": [record.text]}
    prompt = record.prompt
    parts: dict[str, list[str]] = {}
    if isinstance(record, Demonstration):
        taught = turns_of(record, turns)
        prompt = taught[0].prompt
        parts["completion"] = [turn.answer for turn in taught]
    elif isinstance(record, Ranking):
        parts["response"] = list(record.responses)
    return {"prompt": [" ".join(message["content"] for message in as_messages(prompt))], **parts}


def quantile(counts: Counter[int], share: float) -> int:
    """Return the smallest length that a share of all lengths does not exceed.

    Args:
        counts: {length: how many}.
        share: The share, in [0, 1].
    """
    wanted, seen = max(1, math.ceil(share * counts.total())), 0
    for length in sorted(counts):
        seen += counts[length]
        if seen >= wanted:
            return length
    raise AssertionError("no lengths")


def spread(counts: Counter[int], unit: str) -> str:
    """Describe lengths: "1 to 20 words · median 9 · 95 % up to 19"."""
    median, most = quantile(counts, 0.5), quantile(counts, 0.95)
    return f"{min(counts):,} to {max(counts):,} {unit} · median {median:,} · 95 % up to {most:,}"


@dataclass
class TemplateTally:
    """Keep the first rows, to compare them with what the chat template writes."""

    rows: list[Answered] = field(default_factory=list)
    """At most as many rows as are compared, and a few more."""
    names: list[str] = field(default_factory=list)
    """Their locations."""

    def add(self, record: Record, name: str) -> None:
        """Add a demonstration, or every response of a ranking."""
        if isinstance(record, Ranking):
            answered = [Answered(record.prompt, text, finished) for text, finished in record.answers]
        else:
            assert isinstance(record, Demonstration)
            answered = [Answered(record.prompt, record.completion)]
        if len(self.rows) <= MOST_ROWS:
            self.rows += answered
            self.names += [name] * len(answered)

    def report(self, report: Report, tokenizer: PreTrainedTokenizerBase) -> None:
        """Report whether rows are what the chat template writes (see data/agreement.py)."""
        try:
            agreement = compare(tokenizer, self.rows, self.names)
        except TemplateOverrun:  # the lengths have reported it already
            return
        text = agreement.text("answers" if report.kind == "rankings" else "rows")
        if agreement.differ:
            text += f"; {remedy(tokenizer)}"
        report.add("chat template", text)
