"""Report how far labelers agree with each other, and where they contradict themselves."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from itertools import combinations, groupby
from typing import NamedTuple

from data.check.clusters import Share
from data.check.report import Report
from data.records import Ranking

MOST_PAIRS = 2_000_000
"""Judged pairs that are compared with each other at most, 40 bytes each."""
SHOWN = 10
"""Pairs of labelers that are shown at most, those with the most pairs in common."""
UNNAMED = -1
"""The number of the labeler of a ranking that names none."""


class Judgment(NamedTuple):
    """Hold one labeler's judgment of two responses."""

    prompt: int
    """The hash of the prompt."""
    labeler: int
    """The labeler's number."""
    winner: int
    """The hash of the better response."""
    loser: int
    """The hash of the other one."""

    @property
    def pair(self) -> tuple[int, int]:
        """Return both responses in an order that does not depend on the judgment."""
        return (min(self.winner, self.loser), max(self.winner, self.loser))


@dataclass
class Judgments:
    """Keep who judged which pair how, as hashes."""

    numbers: dict[str, int] = field(default_factory=dict)
    """The name of a labeler → a number."""
    rankings: Counter[int] = field(default_factory=Counter)
    """The number of a labeler → rankings."""
    flat: array[int] = field(default_factory=lambda: array("q"))
    """The fields of each Judgment, one after the other."""
    is_full: bool = False
    """Whether there were more pairs than are kept."""

    def add(self, ranking: Ranking, better: Sequence[tuple[int, int]], prompt: int) -> None:
        """Keep the judgments of a ranking.

        Args:
            ranking: The ranking.
            better: (i, j) of each pair of which response i is the better one.
            prompt: The hash of its prompt.
        """
        labeler = UNNAMED
        if ranking.labeler is not None:
            labeler = self.numbers.setdefault(ranking.labeler, len(self.numbers))
        self.rankings[labeler] += 1
        if len(self.flat) // 4 + len(better) > MOST_PAIRS:
            self.is_full = True
            return
        answers = [hash64(f"{finished}{text}") for text, finished in ranking.answers]
        for winner, loser in sorted({(answers[i], answers[j]) for i, j in better}):
            self.flat.extend((prompt, labeler, winner, loser))

    def by_prompt(self) -> Iterable[list[Judgment]]:
        """Yield the judgments of each prompt that has several."""
        flat = self.flat
        order = sorted(range(0, len(flat), 4), key=lambda start: flat[start])
        for _, starts in groupby(order, key=lambda start: flat[start]):
            own = [Judgment(*flat[start : start + 4]) for start in starts]
            if len(own) > 1:
                yield own

    def report(self, report: Report) -> None:
        """Report labelers, their agreement, and contradictions."""
        both = Share()
        by_two: defaultdict[tuple[int, int], Share] = defaultdict(Share)
        repeated = split = circles = 0
        for judgments in self.by_prompt():
            votes = votes_by_pair(judgments)
            several = [by_labeler for by_labeler in votes.values() if sum(map(len, by_labeler.values())) > 1]
            repeated += len(several)
            split += sum(len({winner for winners in votes.values() for winner in winners}) > 1 for votes in several)
            circles += sum(has_cycle(judgments, labeler) for labeler in {one.labeler for one in judgments})
            for by_labeler in several:
                add_agreement(by_labeler, judgments[0].prompt, both, by_two)
        names = {number: name for name, number in self.numbers.items()}
        if names:
            unnamed = f" · {self.rankings[UNNAMED]:,} rankings name none" if self.rankings[UNNAMED] else ""
            report.add("labelers", f"{len(names):,}{unnamed}")
        if both.number:
            report.add("labelers agree", f"on {both.text()}; ties left out")
            ordered = sorted(by_two.items(), key=lambda item: (-item[1].number, item[0]))
            for (one, other), share in ordered[:SHOWN]:
                report.add("", f"{names[one]} and {names[other]}: {share.text()}")
            if len(ordered) > SHOWN:
                report.add("", f"and {len(ordered) - SHOWN:,} more pairs of labelers")
        cut = f" · among the first {MOST_PAIRS:,} pairs" if self.is_full else ""
        report.add(
            "contradictions",
            f"{split:,} of {repeated:,} pairs judged more than once · {circles:,} prompts ranked in a circle by one "
            f"labeler{cut}",
        )


def hash64(text: str) -> int:
    """Return a 64-bit hash of a text, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def votes_by_pair(judgments: Iterable[Judgment]) -> dict[tuple[int, int], dict[int, list[int]]]:
    """Return {pair of responses: {labeler: the winners, one a ranking}} of one prompt."""
    votes: dict[tuple[int, int], dict[int, list[int]]] = {}
    for judgment in judgments:
        votes.setdefault(judgment.pair, {}).setdefault(judgment.labeler, []).append(judgment.winner)
    return votes


def add_agreement(
    by_labeler: dict[int, list[int]], prompt: int, both: Share, by_two: dict[tuple[int, int], Share]
) -> None:
    """Count how far each two labelers agree on a pair of responses.

    A labeler who judged the pair several times counts with the last judgment, as `evaluate` does.

    Args:
        by_labeler: Labeler → the winners, one a ranking.
        prompt: The hash of the prompt.
        both: Gets the agreement of any two labelers.
        by_two: Gets that of each two.
    """
    for one, other in combinations(sorted(labeler for labeler in by_labeler if labeler != UNNAMED), 2):
        agrees = float(by_labeler[one][-1] == by_labeler[other][-1])
        both.add(prompt, agrees)
        by_two[one, other].add(prompt, agrees)


def has_cycle(judgments: Iterable[Judgment], labeler: int) -> bool:
    """Return whether a labeler prefers a response to itself over some steps."""
    better: defaultdict[int, set[int]] = defaultdict(set)
    for judgment in judgments:
        if judgment.labeler == labeler:
            better[judgment.loser].add(judgment.winner)
    try:
        TopologicalSorter(better).prepare()
    except CycleError:
        return True
    return False
