"""Draw the rows that are shown before a prompt (few-shot), so that nothing held out is shown.

Rows are held out by a hash of what they say: those with the lowest positions in [0, 1)
(`data/streams.py`). Shown are only rows in the upper half, which no `validation_fraction` up to a
half holds out, whatever else is in the file, and never the row itself. Which ones is a matter of
hashes: a row keeps its shots when the file grows, unless a new row falls right before one of them.
"""

import heapq
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from data.records import prompt_key
from data.streams import derive_seed, position_of
from data.tasks.fields import written
from data.tasks.wordings import Wording

LOWEST_SHOWN = 0.5
"""The position from which on rows are shown."""
MOST_KEPT = 10_000
"""Rows that may be shown at most; of more, those with the highest hashes are kept."""


@dataclass(frozen=True)
class Shots:
    """Say how many rows are shown before a prompt, and how."""

    number: int
    """How many."""
    as_text: bool = False
    """Whether they are part of the user's message; otherwise they are turns before it."""


@dataclass(frozen=True, order=True)
class Shown:
    """Hold a row that may be shown."""

    place: int
    """Where it is on the ring of hashes from which rows are drawn."""
    key: str
    """What it says, as a key."""
    location: str = field(compare=False)
    """Where it is: FILE:LINE, or with an index."""
    row: dict = field(compare=False)
    """The row."""


@dataclass(frozen=True)
class Pool:
    """Hold the rows that may be shown, in the order of the ring."""

    name: str
    """The name of the source, for error lines."""
    rows: tuple[Shown, ...]
    """The rows."""

    @classmethod
    def of(cls, name: str, rows: Iterable[tuple[str, str, dict]]) -> "Pool":
        """Return the pool of a source.

        Args:
            name: The name of the source.
            rows: (location, what the row says, the row) of all its rows.
        """
        kept: list[tuple[int, Shown]] = []
        keys: set[int] = set()
        lowest: tuple[float, str] = (1.0, "")
        for location, text, row in rows:
            key = prompt_key(text)
            position = position_of(key)
            lowest = min(lowest, (position, key))
            if position < LOWEST_SHOWN or hash(key) in keys:
                continue
            keys.add(hash(key))
            item = derive_seed("kept", key), Shown(derive_seed("ring", key), key, location, row)
            if len(kept) < MOST_KEPT:
                heapq.heappush(kept, item)
            else:
                heapq.heappushpop(kept, item)
        # One row is always held out, in a small file one of the upper half.
        return cls(name, tuple(sorted(row for _, row in kept if row.key != lowest[1])))

    @cached_property
    def places(self) -> list[int]:
        """Return the places of the rows on the ring, in order."""
        return [row.place for row in self.rows]

    def shown(self, wording: Wording, text: str, number: int, seed: str) -> list[tuple[str, str]]:
        """Return prompt and response of each row that is shown before a prompt.

        Args:
            wording: The wording of the prompt, in which they are written too.
            text: What the row of the prompt says.
            number: How many are shown.
            seed: What gives the choice.

        Raises:
            ValueError: There are not so many others, or one cannot be written in this wording.
        """
        key = prompt_key(text)
        pairs: list[tuple[str, str]] = []
        for other in self._drawn(key, number, seed):
            try:
                question = written(wording.prompt, other.row, wording.labels)
                answer = None if wording.response is None else written(wording.response, other.row, wording.labels)
            except ValueError as error:
                raise ValueError(f"the row shown before it ({other.location}): {error}") from None
            if not question or not answer:
                problem = f"has no answer in the wording {wording.name!r}; give the wording a response and labels"
                raise ValueError(f"the row shown before it ({other.location}) {problem}")
            pairs.append((question, answer))
        return pairs

    def _drawn(self, key: str, number: int, seed: str) -> list[Shown]:
        """Return the rows that are shown before the one with this key."""
        used = {key}
        drawn: list[Shown] = []
        for i in range(number):
            start = bisect_left(self.places, derive_seed("shot", seed, key, i))
            for step in range(len(self.rows)):
                candidate = self.rows[(start + step) % len(self.rows)]
                if candidate.key not in used:
                    used.add(candidate.key)
                    drawn.append(candidate)
                    break
        if len(drawn) < number:
            raise ValueError(
                f"shots: {number} are asked for, and {len(drawn)} other rows of {self.name} may be shown (those in the "
                f"half that is never held out); lower shots, or give more rows"
            )
        return drawn
