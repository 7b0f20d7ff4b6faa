"""Load records of one kind from a file or a data set on the Hub, and check every row on the way.

Files are JSONL, a JSON array or parquet; anything else is a data set on the Hub, read with
`datasets`. `data/forms` lists which rows are understood. In JSON, rows of our own forms may not
have unknown keys, which there are misspellings; other forms, parquet and the Hub may have more
columns, which are not read and which `rlhf data check` lists. Read as prompts, a row of any other
kind gives its prompt.
"""

from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from itertools import count, islice
from pathlib import Path

from data.error_lines import shorten
from data.forms import FORMS, recognise
from data.json_rows import Reading, read_rows
from data.parsing import METADATA, parse_demonstration, parse_document, parse_prompt, parse_ranking, refuse_unknown_keys
from data.records import Prompt, Ranking, Record, content_id, judged_pairs, prompt_key
from data.tables import hub_rows, is_parquet, parquet_rows
from pipeline.errors import UserError

PARSERS: dict[str, Callable[[dict], Record]] = {
    "documents": parse_document,
    "demonstrations": parse_demonstration,
    "rankings": parse_ranking,
    "prompts": parse_prompt,
    "evaluation_prompts": parse_prompt,
}
"""Kind of data → what makes a record of a row of our own form."""
PROMPT_KINDS = ("prompts", "evaluation_prompts")


@dataclass(frozen=True)
class Source:
    """Say where records come from; either `path` or `hub` is given."""

    path: str | Path | None = None
    """A file."""
    hub: str | None = None
    """The id of a data set on the Hub."""
    split: str = "train"
    """The split of the data set."""
    subset: str | None = None
    """The subset of the data set; None for the default one."""
    revision: str | None = None
    """The commit of the data set; None for the newest."""
    sha256: str | None = None
    """What the file must hold; None if that does not matter."""

    @property
    def name(self) -> str:
        """Return the path or the id, for error lines."""
        return str(self.hub or self.path)


@dataclass
class Loaded:
    """Hold the result of `read`: records, counts and error lines."""

    records: list[Record] = field(default_factory=list)
    """The records, in order."""
    locations: list[str] = field(default_factory=list)
    """The location of each record: "FILE:LINE", or with an index."""
    forms: Counter[str] = field(default_factory=Counter)
    """Form → the number of its rows."""
    unread: Counter[str] = field(default_factory=Counter)
    """Key that is not read → the number of rows that have it."""
    duplicates: int = 0
    """Prompts left out because they had come before."""
    blanks: int = 0
    """Blank lines that were skipped."""
    cut: bool = False
    """Whether reading stopped at `max_rows` rows, so that there may be more."""
    errors: list[str] = field(default_factory=list)
    """Lines "PLACE: what is wrong; what to do"."""


def load(
    kind: str,
    path: str | Path | None = None,
    hub: str | None = None,
    split: str = "train",
    subset: str | None = None,
    limit: int | None = None,
    skip: int = 0,
    revision: str | None = None,
    sha256: str | None = None,
) -> list:
    """Load the records of a file or a data set on the Hub; a repeated prompt is loaded once.

    Args:
        kind: The kind of data: documents, demonstrations, rankings, prompts or evaluation_prompts.
        path: The file; None for a data set on the Hub.
        hub: The id of the data set; None for a file.
        split: The split of the data set.
        subset: The subset of the data set.
        limit: The number of records to load at most.
        skip: The number of records to leave out at the beginning.
        revision: The commit of the data set.
        sha256: What the file must hold.

    Returns:
        The records.

    Raises:
        UserError: With a line for every malformed row that was read; if no record is left; or if
            the file is no longer the one that `sha256` names.
    """
    return load_placed(kind, path, hub, split, subset, limit, skip, revision, sha256)[0]


def load_placed(
    kind: str,
    path: str | Path | None = None,
    hub: str | None = None,
    split: str = "train",
    subset: str | None = None,
    limit: int | None = None,
    skip: int = 0,
    revision: str | None = None,
    sha256: str | None = None,
) -> tuple[list, list[str]]:
    """Load records as `load` does, together with the location of each.

    Args:
        kind, path, hub, split, subset, limit, skip, revision, sha256: As of `load`.

    Returns:
        (records, locations); a location (FILE:LINE, or an index) names the record in later error
        lines.
    """
    source = Source(path, hub, split, subset, revision, sha256)
    loaded = read(kind, source, limit=None if limit is None else skip + limit)
    return without_first(loaded, skip, source.name)


def load_first(kind: str, path: str | Path, limit: int | None, skip: int, max_rows: int) -> list:
    """Load only the first rows of a file, to find errors before anything runs.

    Args:
        kind: The kind of data.
        path: The file.
        limit: The number of records to load at most.
        skip: The number of records to leave out at the beginning.
        max_rows: The number of rows to read after `skip`.

    Returns:
        The records.

    Raises:
        UserError: As of `load`.
    """
    loaded = read(kind, Source(path), limit=None if limit is None else skip + limit, max_rows=skip + max_rows)
    return without_first(loaded, skip, str(path))[0]


def without_first(loaded: Loaded, skip: int, name: str) -> tuple[list[Record], list[str]]:
    """Return the records after the first ones, and their locations.

    Args:
        loaded: What was read.
        skip: The number of records to leave out at the beginning.
        name: The path or the id, for the error line.

    Raises:
        UserError: There were errors, or no record is left.
    """
    if loaded.errors:
        raise UserError(shorten(loaded.errors))
    if skip >= len(loaded.records) and not loaded.cut:
        raise UserError(
            [f"{name}: has {len(loaded.records)} records, and skip leaves out the first {skip}; lower skip"]
        )
    return loaded.records[skip:], loaded.locations[skip:]


def read(kind: str, source: Source, limit: int | None = None, max_rows: int | None = None) -> Loaded:
    """Read and check a source row by row; errors are collected, not raised.

    Args:
        kind: The kind of data.
        source: Where the rows come from.
        limit: The number of records after which reading stops.
        max_rows: The number of rows after which reading stops.
    """
    assert kind in FORMS and (source.path is None) != (source.hub is None), (kind, source)
    reading = Reading(hashes=source.sha256 is not None)
    loaded = Loaded(errors=reading.errors)
    reject_unknown = source.path is not None and not is_parquet(source.path)
    seen: dict[str, str] = {}  # id of a ranking, or key of a prompt → its first location
    rows = source_rows(source, limit, reading)
    for index, (location, value) in enumerate(islice(rows, max_rows), 1):
        loaded.cut = index == max_rows
        try:
            form, row = recognise(kind, value)
            if form.strict and reject_unknown:
                refuse_unknown_keys(row, (*form.needs, *form.also))
            record = PARSERS[kind](form.convert(row))
            if isinstance(record, Ranking):
                record = with_own_id(record, location, seen)
        except ValueError as error:
            loaded.errors.append(f"{location}: {error}")
            continue
        loaded.forms["a plain string" if isinstance(value, str) else str(form)] += 1
        loaded.unread.update(set(row) - {*form.needs, *form.also, *METADATA})
        if isinstance(record, Prompt):
            first = seen.setdefault(prompt_key(record.prompt), location)
            if first != location:
                loaded.duplicates += 1
                continue
        loaded.records.append(record)
        loaded.locations.append(location)
        if len(loaded.records) == limit:
            break
    rows.close()  # only now `reading` is complete
    loaded.blanks = reading.blanks
    if source.sha256 is not None and reading.sha256 != source.sha256:
        # Whatever else is wrong with the file, this is the reason.
        loaded.errors[:] = [f"{source.path}: was edited since this command inspected it; run again"]
    if not loaded.errors and not loaded.cut:
        loaded.errors += nothing_to_learn(kind, source.name, loaded.records)
    return loaded


def source_rows(source: Source, limit: int | None, reading: Reading) -> Generator[tuple[str, object]]:
    """Return an iterator over (location, row) of a source of any format.

    Args:
        source: Where the rows come from.
        limit: With a limit, rows of the Hub are streamed.
        reading: Gets error lines, and the digest if asked for.
    """
    if source.hub is not None:
        return hub_rows(source.hub, source.split, source.subset, source.revision, limit, reading)
    assert source.path is not None
    return file_rows(source.path, reading)


def file_rows(path: str | Path, reading: Reading) -> Generator[tuple[str, object]]:
    """Return an iterator over (location, row) of a file of any format."""
    return parquet_rows(path, reading) if is_parquet(path) else read_rows(path, reading)


def with_own_id(ranking: Ranking, location: str, seen: dict[str, str]) -> Ranking:
    """Return a ranking whose id is unique; equal rows without an id get -2, -3, … after their id.

    Args:
        ranking: The ranking.
        location: Where it is, for error lines.
        seen: Id → location of the rankings before it; this one is added.

    Raises:
        ValueError: Two rows give the same id.
    """
    if ranking.id in seen:
        if ranking.id != content_id(ranking):
            raise ValueError(f"the id '{ranking.id}' is also used at {seen[ranking.id]}; give each its own")
        free = next(name for copy in count(2) if (name := f"{ranking.id}-{copy}") not in seen)
        ranking = replace(ranking, id=free)
    seen[ranking.id] = location
    return ranking


def nothing_to_learn(kind: str, name: str, records: list[Record]) -> list[str]:
    """Return the error lines of a source without rows, or whose rankings hold no preference.

    Args:
        kind: The kind of data.
        name: The path or the id.
        records: All records of the source.
    """
    if not records:
        return [f"{name}: no rows; give at least one"]
    if kind != "rankings":
        return []
    verdicts: Counter[str] = Counter()
    for ranking in records:
        assert isinstance(ranking, Ranking)
        verdicts.update(verdict for *_, verdict in judged_pairs(ranking))
    if verdicts["usable"]:
        return []
    counts = ", ".join(f"{n} {verdict}" for verdict, n in sorted(verdicts.items()))
    return [f"{name}: not one usable pair ({counts}); at least one needs different responses with different ranks"]
