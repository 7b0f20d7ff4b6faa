"""Read what a source says of a task: its wordings, and the rows to show before prompts."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from data.error_lines import shorten
from data.records import Demonstration, Record
from data.source import Loaded, Source
from data.tasks.rows import KINDS, TaskRows
from data.tasks.shots import Pool, Shots
from data.tasks.wordings import read_wordings
from pipeline.errors import UserError

Read = Callable[[str, Source, Loaded], Iterator[tuple[str, Record]]]
"""Yields (location, record) of a source of a kind: `row_reader.records`."""


def task_rows(kind: str, source: Source, read: Read) -> TaskRows | None:
    """Return what makes rows of our own form of the rows of a task; None without wordings.

    Args:
        kind: The kind of data.
        source: Where the rows come from.
        read: Reads the rows that may be shown before prompts.

    Raises:
        UserError: The wordings, or the rows that are shown before a prompt, cannot be read.
    """
    if source.wordings is None:
        for name in ("shots", "shots_from"):
            if getattr(source, name) is not None:
                raise UserError(f"{source.name}: {name} needs wordings, which write the rows; give wordings: FILE")
        return None
    if kind not in KINDS:
        raise UserError(f"{source.name}: wordings make demonstrations and prompts, no {kind}; leave them out")
    wordings = read_wordings(source.wordings, source.wordings_sha256)
    each = source.wording_choice == "each"
    if source.shots is None:
        if source.shots_from is not None:
            raise UserError(f"{source.name}: shots_from stands without shots; say how many (shots: 3)")
        return TaskRows(kind, wordings, each)
    shots = Shots(source.shots, as_text=source.shots_as == "text")
    return TaskRows(kind, wordings, each, shots, pool_of(kind, source, read))


def pool_of(kind: str, source: Source, read: Read) -> Pool:
    """Return the rows that may be shown before a prompt.

    Args:
        kind: The kind of data.
        source: Where the rows come from; with `shots_from`, another file that is read like it.
        read: Reads the rows.

    Raises:
        UserError: The file of `shots_from` has mistakes, or prompts have none.
    """
    pool = replace(source, shots=None, shots_from=None)
    if source.shots_from is not None:
        pool = replace(pool, path=source.shots_from, sha256=source.shots_sha256, skip=0, limit=None, split="train")
        pool = replace(pool, hub=None, subset=None, data_dir=None, data_files=None, revision=None)
    elif kind != "demonstrations":
        raise UserError(
            f"{source.name}: shots of {kind} would be drawn from these prompts themselves; name the rows that sft "
            f"learns (shots_from: FILE)"
        )
    own = Loaded()

    def rows() -> Iterator[tuple[str, str, dict]]:
        """Yield location, text and row of each record."""
        for location, record in read("demonstrations", pool, own):
            assert isinstance(record, Demonstration) and record.row_text is not None
            yield location, record.row_text, record.extra or {}

    found = Pool.of(pool.name, rows())
    if own.errors and source.shots_from is not None:  # those of the source itself are found again
        raise UserError(shorten(own.errors))
    return found
