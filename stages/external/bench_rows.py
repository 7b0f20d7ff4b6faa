"""Read the rows of RewardBench and of RewardBench 2, with the subset that each belongs to.

The readers of `data/forms` take the same rows as rankings to train on, without their subsets; a
benchmark is scored by subset, and its ties by a rule of their own.
"""

import dataclasses
from dataclasses import dataclass
from itertools import islice
from typing import Any

from data.files.reading import Reading
from data.parsing import describe, parse_prompt_value
from data.row_reader import source_rows
from pipeline.stage import Source
from stages.settings.checks import reader_source

SPLITS = {"allenai/reward-bench": "filtered", "allenai/reward-bench-2": "test"}
"""Data set on the Hub → the split that its leaderboard uses."""
TIES = "ties"
"""The subset of RewardBench 2 with several right answers, in lower case."""
NO_SUBSET = "all"
"""The subset of rows that name none."""


@dataclass(frozen=True)
class Item:
    """A prompt with good and bad responses."""

    id: str
    """Its id; of a tie "ref:7" or "tied:7"."""
    subset: str
    """The part of the benchmark that it belongs to."""
    prompt: str | tuple[dict, ...]
    """As in `data.records.Prompt`."""
    chosen: tuple[str, ...]
    """The good responses."""
    rejected: tuple[str, ...]
    """The bad ones."""
    is_pair: bool
    """Whether it is a row of RewardBench: one good and one bad response."""
    place: str
    """Where it was read."""

    @property
    def is_tie(self) -> bool:
        """Return whether it is one of RewardBench 2's ties."""
        return not self.is_pair and self.subset.lower() == TIES

    @property
    def responses(self) -> tuple[str, ...]:
        """Return all responses, the good ones first."""
        return self.chosen + self.rejected


def read_items(source: Source) -> tuple[list[Item], list[str]]:
    """Read the items of a source, and check every row.

    Args:
        source: A file, a folder or a data set on the Hub.

    Returns:
        The items, and error lines. Ties without their partner are an error.
    """
    reader = reader_source(source)
    if source.hub in SPLITS and source.split == "train":
        reader = dataclasses.replace(reader, split=SPLITS[source.hub])
    reading, items, lines = Reading(), [], []
    stop = None if source.limit is None else source.skip + source.limit
    for place, row in islice(source_rows(reader, reading), source.skip, stop):
        try:
            items.append(item_of(row, place))
        except ValueError as error:
            lines.append(f"{place}: {error}")
    lines = reading.errors + lines
    if not lines and not items:
        lines.append(f"{reader.name}: no rows; give at least one")
    return items, lines or unpaired_ties(items)


def item_of(row: object, place: str) -> Item:
    """Return the item of a row {prompt, chosen, rejected, subset?, id?}.

    Args:
        row: Lists of responses as in RewardBench 2, or one of each as in RewardBench.
        place: Where it was read.

    Raises:
        ValueError: "What is wrong; what to do".
    """
    if not isinstance(row, dict) or not {"prompt", "chosen", "rejected"} <= row.keys():
        found = ", ".join(row) if isinstance(row, dict) else describe(row)
        raise ValueError(f"is no row of a reward benchmark ({found}); expected prompt, chosen and rejected")
    is_pair = isinstance(row["chosen"], str) and isinstance(row["rejected"], str)
    chosen, rejected = (texts_of(row, key) for key in ("chosen", "rejected"))
    count = row.get("num_correct")
    if not is_pair and count is not None and int(count) != len(chosen):
        raise ValueError(f"'num_correct' is {count}, and 'chosen' holds {len(chosen)} responses; correct one")
    subset = row.get("subset")
    item = Item(
        id=str(row.get("id", place)),
        subset=subset if isinstance(subset, str) and subset else NO_SUBSET,
        prompt=parse_prompt_value(row),
        chosen=chosen,
        rejected=rejected,
        is_pair=is_pair,
        place=place,
    )
    if item.is_tie:
        split_tie_id(item.id)
    elif len(chosen) > 1:
        raise ValueError(f"has {len(chosen)} chosen responses outside the subset Ties; expected one")
    return item


def texts_of(row: dict[str, Any], key: str) -> tuple[str, ...]:
    """Return the responses under a key: a text, or a list of texts."""
    value = [row[key]] if isinstance(row[key], str) else row[key]
    if not isinstance(value, (list, tuple)) or not value or any(not isinstance(text, str) for text in value):
        raise ValueError(f"'{key}' is {describe(row[key])}; expected a text or a list of texts")
    return tuple(value)


def split_tie_id(name: str) -> tuple[str, str]:
    """Return ("ref" or "tied", number of the prompt) of a tie's id.

    Raises:
        ValueError: It is no such id.
    """
    kind, colon, number = name.partition(":")
    if kind not in ("ref", "tied") or not colon or not number:
        raise ValueError(f"the id of a tie is '{name}'; expected ref:NUMBER or tied:NUMBER")
    return kind, number


def unpaired_ties(items: list[Item]) -> list[str]:
    """Return an error line if no tie has its reference, or an id occurs twice."""
    seen: dict[str, Item] = {}
    for item in items:
        if item.is_tie:
            if item.id in seen:
                return [f"{item.place}: the tie {item.id} is also at {seen[item.id].place}; keep one"]
            seen[item.id] = item
    kinds = {kind: {number for k, number in map(split_tie_id, seen) if k == kind} for kind in ("ref", "tied")}
    if seen and not kinds["ref"] & kinds["tied"]:
        first = next(iter(seen.values()))
        return [f"{first.place}: no tie has both its rows, ref:NUMBER and tied:NUMBER; give the whole subset Ties"]
    return []
