"""Load the records of one kind from a source or a mixture of sources.

A source is a file, a folder or a glob on this machine (`data/files`), or a data set on the Hub.
`data/forms` lists which rows are understood; `data/row_reader.py` makes records of them.
"""

from collections import Counter
from collections.abc import Generator
from dataclasses import replace

from data.error_lines import shorten
from data.mixed_sources import add_counts, is_repeated, mix_parts, notes_of_parts, order_of_mixture, with_source
from data.progress import Note, no_note
from data.records import Ranking, Record, is_usable, judged_pairs
from data.row_reader import records
from data.seen import Seen
from data.source import Loaded, Source
from pipeline.errors import UserError


def load(kind: str, source: Source) -> list:
    """Load the records of a source; a repeated prompt is loaded once.

    Args:
        kind: The kind of data: documents, demonstrations, rankings, prompts or evaluation_prompts.
        source: Where the records come from.

    Returns:
        The records.

    Raises:
        UserError: With a line for every malformed row that was read; if no record is left; or if
            the file is no longer the one that `source.sha256` names.
    """
    return load_placed(kind, source)[0]


def load_placed(kind: str, source: Source) -> tuple[list, list[str]]:
    """Load records as `load` does, together with the location of each.

    Args:
        kind: The kind of data.
        source: Where the records come from.

    Returns:
        (records, locations); a location (FILE:LINE, or an index) names the record in later error
        lines.
    """
    loaded = load_whole(kind, source)
    return loaded.records, loaded.locations


def load_whole(kind: str, source: Source) -> Loaded:
    """Load records as `load` does, together with what else there is to say of the source.

    Args:
        kind: The kind of data.
        source: Where the records come from.
    """
    loaded = read(kind, source)
    if loaded.errors:
        raise UserError(shorten(loaded.errors))
    return loaded


def load_first(kind: str, source: Source, max_rows: int) -> list:
    """Load only the first rows of a source, to find errors before anything runs.

    Args:
        kind: The kind of data.
        source: Where the records come from; its `sha256` is not compared.
        max_rows: The number of rows to read after `skip`.

    Returns:
        The records.

    Raises:
        UserError: As of `load`.
    """
    loaded = read(kind, without_digest(source), max_rows=source.skip + max_rows)
    if loaded.errors:
        raise UserError(shorten(loaded.errors))
    return loaded.records


def without_digest(source: Source) -> Source:
    """Return a source whose file may hold anything."""
    return replace(
        source,
        sha256=None,
        wordings_sha256=None,
        shots_sha256=None,
        parts=tuple(without_digest(part) for part in source.parts),
    )


def read(kind: str, source: Source, max_rows: int | None = None) -> Loaded:
    """Read and check a source row by row; errors are collected, not raised.

    Args:
        kind: The kind of data.
        source: Where the rows come from.
        max_rows: The number of rows after which reading stops (of each part of a mixture).
    """
    if source.parts:
        return mix_parts(source, [read(kind, part, max_rows) for part in source.parts])
    loaded, verdicts = Loaded(), Counter[str]()
    for location, record in records(kind, source, loaded, max_rows):
        loaded.records.append(record)
        loaded.locations.append(location)
        count_verdicts(record, verdicts)
    if kind == "rankings" and not loaded.errors and not loaded.cut:
        loaded.errors += no_usable_pair(source.name, verdicts)
    return loaded


def scan(kind: str, source: Source, max_rows: int | None = None, note: Note = no_note) -> Loaded:
    """Read and check a source as `read` does, and keep none of its records.

    Args:
        kind: The kind of data.
        source: Where the rows come from.
        max_rows: As of `read`.
        note: Is told how far reading is.

    Returns:
        Counts and error lines; no records.
    """
    whole, parts = Loaded(), source.parts or (source,)
    for part, note_part in zip(parts, notes_of_parts(parts, note), strict=True):
        loaded, verdicts = Loaded(note=note_part), Counter[str]()
        for _, record in records(kind, part, loaded, max_rows):
            count_verdicts(record, verdicts)
        if kind == "rankings" and not loaded.errors and not loaded.cut:
            loaded.errors += no_usable_pair(part.name, verdicts)
        add_counts(whole, loaded)
    return whole


def stream(kind: str, source: Source, loaded: Loaded, max_rows: int | None = None) -> Generator[tuple[str, Record]]:
    """Yield the records of a source or a mixture one by one, in the order of `read`.

    The parts of a mixture are counted first, in a pass of their own.

    Args:
        kind: The kind of data.
        source: Where the rows come from.
        loaded: Gets counts and error lines, complete only when the generator has ended.
        max_rows: The number of rows after which reading stops (of each part of a mixture).

    Yields:
        (location, record); rankings of a mixture as of `with_source`.
    """
    if not source.parts:
        yield from records(kind, source, loaded, max_rows)
        return
    notes = notes_of_parts(source.parts, loaded.note, passes=2)  # to count, and to read
    order, errors = order_of_mixture(kind, source, notes[: len(source.parts)], max_rows)
    counts = [Loaded(note=note) for note in notes[len(source.parts) :]]
    streams = [records(kind, part, own, max_rows) for part, own in zip(source.parts, counts, strict=True)]
    taken = [0] * len(streams)  # records that each part has given so far
    ids = Seen()
    for part, i in order:
        item = next(streams[part], None)
        while item is not None and taken[part] < i:
            taken[part] += 1
            item = next(streams[part], None)
        if item is None:
            continue  # it has errors, which say more
        taken[part] += 1
        location, record = item
        if not is_repeated(record, location, ids, loaded):
            yield location, with_source(record, source.parts[part].label, ids, location)
    for rest, own in zip(streams, counts, strict=True):
        for _ in rest:  # to the end, for its counts and errors
            pass
        add_counts(loaded, own)
    loaded.errors += [] if loaded.errors else errors


def count_verdicts(record: Record, verdicts: Counter[str]) -> None:
    """Count the verdicts on a ranking's pairs, until one, or a label, is known to be usable.

    Args:
        record: The record; only rankings have pairs.
        verdicts: Verdict, as of `judged_pairs` → the number of pairs so far.
    """
    if isinstance(record, Ranking) and not verdicts["usable"]:
        verdicts.update(verdict for *_, verdict in judged_pairs(record))
        if record.labels is not None and is_usable(record):
            verdicts["usable"] += 1


def no_usable_pair(name: str, verdicts: Counter[str]) -> list[str]:
    """Return an error line if no pair is usable.

    Args:
        name: The path or the id.
        verdicts: Verdict, as of `judged_pairs` → the number of pairs.
    """
    if verdicts["usable"]:
        return []
    counts = ", ".join(f"{n} {verdict}" for verdict, n in sorted(verdicts.items()))
    return [f"{name}: not one usable pair ({counts}); at least one needs different responses with different ranks"]
