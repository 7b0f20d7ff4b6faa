"""Put the records of the sources of a mixture together."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import count

from data.files.rows import size_of_path
from data.mixture import mix
from data.progress import Note
from data.records import Prompt, Ranking, Record, prompt_key
from data.row_reader import REPEATED, records
from data.seen import Seen
from data.source import Loaded, Source


def mix_parts(source: Source, parts: list[Loaded]) -> Loaded:
    """Mix what was read of the parts of a mixture by their weights.

    Args:
        source: The mixture.
        parts: What was read of each part.
    """
    whole, ids = Loaded(), Seen()
    for part, i in mix([len(part.records) for part in parts], [part.weight for part in source.parts]):
        location, record = parts[part].locations[i], parts[part].records[i]
        if is_repeated(record, location, ids, whole):
            continue
        whole.records.append(with_source(record, source.parts[part].label, ids, location))
        whole.locations.append(location)
    for loaded in parts:
        add_counts(whole, loaded)
    return whole


def order_of_mixture(
    kind: str, source: Source, notes: Sequence[Note], max_rows: int | None = None
) -> tuple[list[tuple[int, int]], list[str]]:
    """Return the order of the records of a mixture.

    Args:
        kind: The kind of data.
        source: The mixture.
        notes: What is told how far counting is, one for each part.
        max_rows: As of `stream`.

    Returns:
        (part, index of the record) of each record, none if a part has errors; and the errors, which
        are found again when the part is read.
    """
    sizes, errors = [], []
    for part, note in zip(source.parts, notes, strict=True):
        own = Loaded(note=note)
        sizes.append(sum(1 for _ in records(kind, part, own, max_rows)))
        errors += own.errors
    return [] if errors else mix(sizes, [part.weight for part in source.parts]), errors


def notes_of_parts(parts: Sequence[Source], note: Note, passes: int = 1) -> list[Note]:
    """Return what is told how far reading a part is, and tells how far reading is as a whole.

    Args:
        parts: The parts.
        note: Is told the rows of all parts, and their share if all are files.
        passes: How often the parts are read.

    Returns:
        One for each part, in each pass.
    """
    if len(parts) * passes == 1:
        return [note]
    sizes = [0 if part.path is None else size_of_path(part.path) for part in parts] * passes
    rows, shares = [0] * len(sizes), [0.0] * len(sizes)

    def note_part(number: int, count: int, share: float | None) -> None:
        rows[number], shares[number] = count, share or 0.0
        done = sum(size * one for size, one in zip(sizes, shares, strict=True))
        note(sum(rows) // passes, done / sum(sizes) if all(sizes) else None)

    return [partial(note_part, number) for number in range(len(sizes))]


def add_counts(whole: Loaded, part: Loaded) -> None:
    """Add the counts and error lines of a part to those of the whole."""
    whole.rows += part.rows
    whole.forms += part.forms
    whole.wordings += part.wordings
    whole.unread += part.unread
    whole.left_out += part.left_out
    whole.left_out_places += part.left_out_places
    whole.filtered += part.filtered
    whole.dropped += part.dropped
    whole.duplicates += part.duplicates
    whole.differing += part.differing
    whole.blanks += part.blanks
    whole.cut = whole.cut or part.cut
    whole.errors += part.errors


def is_repeated(record: Record, location: str, seen: Seen, loaded: Loaded) -> bool:
    """Return whether a prompt came before, in another part of a mixture; then it is counted.

    Args:
        record: The record.
        location: Where it is.
        seen: The keys of the prompts before it; a new one is added.
        loaded: Gets the count.
    """
    if not isinstance(record, Prompt):
        return False
    key = prompt_key(record.prompt)
    if key in seen:
        loaded.duplicates += 1
        loaded.leave_out(location, REPEATED, seen[key])
        return True
    seen.add(key, location)
    return False


def with_source(record: Record, label: str, ids: Seen, location: str) -> Record:
    """Return a ranking of a mixture with its source and an id of its own; other records unchanged.

    A ranking that names a source of its own keeps it. Files that number their rows use the same
    ids: the later ranking gets another one.

    Args:
        record: The record.
        label: The name of the source.
        ids: The ids of the rankings before it; this one's is added.
        location: Where the record is.
    """
    if not isinstance(record, Ranking):
        return record
    name, copies = record.id, (f"{record.id}-{copy}" for copy in count(2))
    while name in ids:
        name = next(copies)
    ids.add(name, location)
    return replace(record, id=name, source=record.source or label)
