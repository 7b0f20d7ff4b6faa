"""Encode demonstrations as they are read, keep the rows, and split them by conversation."""

from array import array
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from data import sources
from data.agreement import MOST_ROWS, Answered
from data.answer_lengths import quantiles
from data.encode import AT_ONCE, DemonstrationEncoder, EncodedRow, apart_text
from data.error_lines import shorten
from data.length_limit import LengthLimiter, LengthReport
from data.source import Loaded
from data.text_rows import TextRows, read_text_rows, write_text_rows
from data.turns import TurnCount, Turns, count_turns
from pipeline.errors import UserError
from pipeline.stage import Source
from stages.settings.checks import reader_source
from stages.shared.data_notes import NotTaken, not_taken
from stages.shared.inputs import LengthLimit, content_of
from stages.shared.row_cache import RowCache
from stages.shared.show import off_template_line
from stages.training.session import Session

NAME = "demonstrations"
"""The name of the rows in the cache."""


@dataclass(frozen=True)
class Demonstrations:
    """The demonstrations, encoded and split by conversation."""

    train: TextRows
    """Rows to train on: {input_ids, labels}, a label being −100 where nothing is learnt."""
    held_out: TextRows
    """Rows of the held-out evaluation."""
    shown: list
    """A few held-out prompts, for samples."""
    learnt_tokens: int
    """Tokens of all answers that are learnt, held-out rows included."""
    answer_tokens: list[int]
    """The quantiles of these answers' lengths."""
    turns: TurnCount
    """How many assistant turns there are, and how many are learnt within the length limit."""
    report: LengthReport
    """How many rows were cut or dropped."""


@dataclass(frozen=True)
class Given:
    """The demonstrations of a stage, and how they are encoded."""

    source: Source
    """Where they are."""
    rows: int | None
    """How many there are about, for progress; None if that is not known."""
    fraction: float
    """The fraction of the conversations to hold out, by how they open."""
    limit: LengthLimit
    """The limit of a row."""
    turns: Turns
    """Which answers are learnt."""

    def made_of(self) -> list[Any] | None:
        """Return what the rows depend on; None if the content of a source is not known."""
        content = content_of(self.source)
        return None if content is None else [content, self.fraction, asdict(self.limit), self.turns]


def load_demonstrations(session: Session, given: Given, tokenizer: Any, cache: RowCache) -> Demonstrations:
    """Read and encode demonstrations, now or at an earlier start, and split them by conversation.

    Args:
        session: The run.
        given: The demonstrations.
        tokenizer: The tokenizer with its chat template.
        cache: Where encoded rows are kept.

    Raises:
        UserError: With the errors of the data, or of rows that are too long; no prompt is left to
            hold out.
    """

    def write(paths: dict[str, Path]) -> dict[str, Any]:
        with cache.progress(NAME, given.rows) as note:
            return write_rows(paths["arrow"], given, tokenizer, note)

    says = cache.entry(NAME, ("arrow",), given.made_of(), write)
    session.notes.write_down(NAME, NotTaken(**says["not_taken"]))
    if says["apart"]:
        session.say(apart_text(tokenizer.name_or_path, says["apart"], says["first_apart"]))
    if says["off_template"]:
        session.say(says["off_template"])
    rows = read_text_rows(cache.path(NAME, "arrow"), given.fraction)
    if not rows.held_out:
        left = f"one prompt is left within {given.limit.max_length} tokens"
        raise UserError([f"data.{NAME}: {left}; at least 2 are needed, one of them to hold out"])
    return Demonstrations(
        train=rows.train,
        held_out=rows.held_out,
        shown=rows.prompts(4),
        learnt_tokens=says["learnt_tokens"],
        answer_tokens=says["answer_tokens"],
        turns=TurnCount(**says["turns"]),
        report=LengthReport(**says["report"]),
    )


@dataclass
class Tally:
    """Count what there is to say of demonstrations, while their rows are written one by one."""

    turns: TurnCount = field(default_factory=lambda: TurnCount(0, 0, 0))
    """The turns of the demonstrations so far."""
    rows: int = 0
    """Rows so far."""
    first: list[tuple[Answered, str]] = field(default_factory=list)
    """The first MOST_ROWS of them, each with its location."""


def write_rows(path: Path, given: Given, tokenizer: Any, note: Callable[[int], None]) -> dict[str, Any]:
    """Read and encode demonstrations, some at a time, and write their rows.

    Args:
        path: The file of rows.
        given: The demonstrations.
        tokenizer: The tokenizer with its chat template.
        note: Called with the number of demonstrations so far, now and then.

    Returns:
        What there is to say of them, as JSON values.
    """
    limiter = LengthLimiter(given.limit.max_length, given.limit.on_too_long, "demonstration", given.limit.section)
    encoder, tally, loaded = DemonstrationEncoder(tokenizer, limiter, given.turns), Tally(), Loaded()
    answer_tokens = array("i")
    rows = encoded_rows(given, encoder, tally, loaded, note)
    write_text_rows(str(path), rows, given.fraction, answer_tokens)
    compared = [row for row, _ in tally.first], [place for _, place in tally.first]
    return {
        "not_taken": asdict(not_taken(NAME, reader_source(given.source).name, loaded)),
        "apart": encoder.apart,
        "first_apart": encoder.first_apart,
        "off_template": off_template_line(tokenizer, *compared, tally.rows, NAME),
        "learnt_tokens": sum(answer_tokens),
        "answer_tokens": quantiles(answer_tokens),
        "turns": asdict(replace(tally.turns, learnt=len(answer_tokens))),
        "report": asdict(limiter.report),
    }


def encoded_rows(
    given: Given, encoder: DemonstrationEncoder, tally: Tally, loaded: Loaded, note: Callable[[int], None]
) -> Iterator[EncodedRow]:
    """Read and encode demonstrations, AT_ONCE at a time.

    Args:
        given: The demonstrations.
        encoder: Encodes them.
        tally: Counts them.
        loaded: Gets the counts of what was read.
        note: Called with the number of demonstrations so far, now and then.

    Raises:
        UserError: With the errors of the data, or of rows that are too long.
    """
    placed, count = sources.stream(NAME, reader_source(given.source), loaded), 0
    while batch := list(islice(placed, AT_ONCE)):
        demonstrations = [demonstration for _, demonstration in batch]
        tally.turns += count_turns(demonstrations, given.turns)
        if not loaded.errors:  # otherwise only further errors are looked for
            for row in encoder.rows(demonstrations, [place for place, _ in batch]):
                tally.rows += 1
                if len(tally.first) < MOST_ROWS:
                    tally.first.append((Answered(row.turn.prompt, row.turn.answer), row.place))
                yield row
        count += len(batch)
        note(count)
    if loaded.errors:
        raise UserError(shorten(loaded.errors))
    encoder.finished()
