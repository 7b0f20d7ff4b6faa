"""Check people's rankings, and write those for training, for validation and for a judge."""

import contextlib
import dataclasses
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np

from data import sources
from data.error_lines import shorten
from data.group_rows import ROWS_AT_ONCE
from data.records import Ranking, has_label, jsonl_writer, judged_pairs, prompt_key
from data.row_reader import records
from data.source import Loaded
from data.streams import position_of
from pipeline.errors import UserError
from pipeline.stage import Source
from stages.evaluation.statistics import agreement_figures
from stages.settings.checks import reader_source
from stages.shared import kept_rankings
from stages.shared.inputs import published
from stages.shared.kept_rankings import FEWEST_PROMPTS, Split, split_rankings
from stages.training.session import Session

Item = TypeVar("Item")

MANY_ROWS = 10_000
"""Rankings from which on progress is shown."""


@dataclasses.dataclass(frozen=True)
class Shares:
    """Say which shares of the prompts do not train."""

    validation: float
    """The share for validation."""
    judge: float
    """The share for a judge; 0: none."""
    is_set: bool
    """Whether the settings ask for the second; otherwise few prompts are not split."""


@dataclasses.dataclass
class Read:
    """Hold what the split needs to know of each ranking, in the order of reading."""

    positions: array = dataclasses.field(default_factory=lambda: array("d"))
    """The position of its prompt, as of `position_of`."""
    pairs: array = dataclasses.field(default_factory=lambda: array("i"))
    """Its usable pairs."""
    usable: array = dataclasses.field(default_factory=lambda: array("b"))
    """Whether it has a usable pair or a label."""
    labelers: array = dataclasses.field(default_factory=lambda: array("i"))
    """The index of its labeler in `names`; -1 where none is named."""
    names: dict[str, int] = dataclasses.field(default_factory=dict)
    """Labeler → index."""

    def add(self, ranking: Ranking) -> None:
        """Remember a ranking."""
        self.positions.append(position_of(prompt_key(ranking.prompt)))
        pairs = usable_pairs(ranking)
        self.pairs.append(pairs)
        self.usable.append(pairs > 0 or has_label(ranking))
        name = ranking.labeler
        self.labelers.append(-1 if name is None else self.names.setdefault(name, len(self.names)))


def split_given(source: Source, shares: Shares, folder: Path, session: Session, count: int | None) -> dict:
    """Check rankings by people and split them, without holding them in memory.

    All of them are written to one file first. Only then it is known on which side each is.

    Args:
        source: Where the rankings are.
        shares: The shares of prompts for validation and for the judge.
        folder: Where train.jsonl, validation.jsonl and judge.jsonl go.
        session: The run.
        count: The number of rankings, if it is known, for progress.

    Returns:
        The figures for the manifest.

    Raises:
        UserError: With the errors of the data; or one of the files would have no usable pair.
    """
    whole, loaded = folder / ".tmp-all.jsonl", Loaded()
    read = Read()
    reader = reader_source(source)
    rankings = sources.stream("rankings", reader, loaded)
    with jsonl_writer(whole) as write:
        for _, ranking in with_progress(rankings, session, count):
            read.add(ranking)
            write(ranking)
    if loaded.errors:
        raise UserError(shorten(loaded.errors))
    session.notes.take_down("rankings", reader.name, loaded)
    split = split_read(read, shares, session)
    names = {"train": kept_rankings.TRAIN, "validation": kept_rankings.VALIDATION}
    if split.count(kept_rankings.JUDGE) or (shares.judge and shares.is_set):
        names["judge"] = kept_rankings.JUDGE
    for name, side in names.items():
        refuse_no_pair(name, split.count(side), int(np.asarray(read.usable)[split.sides == side].sum()))
    with contextlib.ExitStack() as stack:
        files = {side: stack.enter_context((folder / f"{name}.jsonl").open("wb")) for name, side in names.items()}
        for line, side in zip(stack.enter_context(whole.open("rb")), split.sides.tolist(), strict=True):
            if side in files:
                files[side].write(line)
    whole.unlink()
    again = records("rankings", published(folder / "validation.jsonl"), Loaded())
    figures = {name: split.count(side) for name, side in names.items()}
    if "judge" in names:
        figures["judge_labelers_apart"] = split.labelers_apart
        figures["left_out_for_judge"] = split.count(kept_rankings.NOBODY)
    return {
        "rankings": len(read.positions),
        "pairs": sum(read.pairs),
        **figures,
        **agreement_figures(ranking for _, ranking in again),
        **session.notes.figures,
    }


def split_read(read: Read, shares: Shares, session: Session) -> Split:
    """Split rankings by people, and say what is kept for a judge, or why nothing is.

    Args:
        read: What is known of each ranking.
        shares: The shares of prompts for validation and for the judge.
        session: The run.
    """
    positions, labelers_of = np.asarray(read.positions), np.asarray(read.labelers)
    split = split_rankings(positions, labelers_of, list(read.names), shares.validation, shares.judge)
    if not shares.judge:
        return split
    is_of_judge = split.sides == kept_rankings.JUDGE
    prompts = len(np.unique(positions[is_of_judge]))
    if prompts < FEWEST_PROMPTS and not shares.is_set:
        session.say(
            f"warning: {len(np.unique(positions))} prompts are too few to keep some for a judge, which takes "
            f"{FEWEST_PROMPTS} at least, so the reward model judges what climbs it; set rankings.judge_fraction to "
            f"keep some all the same"
        )
        return split_rankings(positions, labelers_of, list(read.names), shares.validation, 0.0)
    line = f"{split.count(kept_rankings.JUDGE)} rankings of {prompts} prompts are kept to train a judge"
    if split.labelers_apart:
        line += f", by {len(np.unique(labelers_of[is_of_judge]))} of {len(read.names)} labelers, who train nothing else"
        if left_out := split.count(kept_rankings.NOBODY):
            line += f"; {left_out} more of theirs are left out, because others ranked the same prompts for training"
    elif read.names:
        line += "; by prompt, because labelers cannot be kept apart without losing too many rankings"
    session.say(line)
    return split


def refuse_no_pair(name: str, rankings: int, pairs: int, unfinished: float | None = None) -> None:
    """Raise UserError if a split has no usable pair.

    Args:
        name: The split.
        rankings: The number of its rankings.
        pairs: The number of its usable pairs.
        unfinished: The share of responses that were cut off, where they were sampled; None: people
            ranked (data.rankings).
    """
    if pairs:
        return
    where, remedy = "data.rankings", "add rankings"
    if unfinished is not None:
        where = "rankings"
        remedy = (
            f"raise rankings.num_prompts, or rankings.response_length ({unfinished:.0%} of the responses were cut off)"
        )
    fraction = f"rankings.{'judge' if name == 'judge' else 'validation'}_fraction"
    raise UserError(
        [f"{where}: the {name} split ({rankings} rankings) has no usable pair; {remedy}, or change {fraction}"]
    )


def with_progress(rows: Iterable[Item], session: Session, count: int | None) -> Iterator[Item]:
    """Yield rows; of many, show progress.

    Args:
        rows: The rows.
        session: The run; a request to stop ends it.
        count: About how many there are; None if that is not known.
    """
    if count is None or count < MANY_ROWS:
        yield from rows
        return
    with session.tracker.progress(count, "rankings reading") as progress:
        for done, row in enumerate(rows, 1):
            yield row
            if done % ROWS_AT_ONCE == 0:
                session.leave_if_requested(0, 0)
                progress.update(min(done, count))


def usable_pairs(ranking: Ranking) -> int:
    """Count the pairs of a ranking that say which of two different responses is better."""
    return sum(verdict == "usable" for _, _, verdict in judged_pairs(ranking))
