"""Load records of one kind from a source, and check every row on the way.

A source is a file, a folder or a glob on this machine (`data/files`), or a data set on the Hub.
`data/forms` lists which rows are understood. The same rules hold whatever the format: a key that
changes what a row means and that nobody reads is an error, as is a misspelt key of our own forms;
other keys are not read, and `rlhf data check` lists them. Read as prompts, a row of any other kind
gives its prompt.
"""

import json
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

from data.error_lines import shorten
from data.files.hub import hub_rows
from data.files.reading import Reading
from data.files.rows import file_rows, size_of_path
from data.forms import FORMS, PROMPT_KINDS, recognise
from data.forms.form import Form, LeftOut, Options
from data.forms.marked import BASES as MAY_BE_MARKED
from data.forms.marked import NAME as MARKED
from data.forms.meaning import refuse_meaningful_keys, refuse_unknown_keys
from data.mixture import mix
from data.parsing import METADATA, parse_demonstration, parse_document, parse_prompt, parse_ranking
from data.progress import NOTE_EVERY, Note, no_note
from data.records import Prompt, Ranking, Record, content_id, judged_pairs, prompt_key
from data.seen import Seen
from data.templated import without_templates
from pipeline.errors import UserError

PARSERS: dict[str, Callable[[dict], Record]] = {
    "documents": parse_document,
    "demonstrations": parse_demonstration,
    "rankings": parse_ranking,
    "prompts": parse_prompt,
    "evaluation_prompts": parse_prompt,
}
"""Kind of data → what makes a record of a row of our own form."""
REPEATED = "duplicate"
"""Why a repeated prompt is left out."""
KEPT = ("user_id", "kind", "meta")
"""Keys of any form's rows that records keep."""
LABELS = ("use_case", "category")
"""Keys that say what a prompt is for; records keep them under `meta`."""
MOST_ERRORS = 10_000
"""Error lines after which the rest of a source is not read."""
MOST_PLACES = 10_000
"""Rows left out of a source whose locations are kept; the others are counted."""


@dataclass(frozen=True)
class Source:
    """Say where records come from and how they are read: `path`, `hub`, or several in `parts`."""

    path: str | Path | None = None
    """A file, a folder or a glob."""
    hub: str | None = None
    """The id of a data set on the Hub."""
    split: str = "train"
    """The split of the data set."""
    subset: str | None = None
    """The subset of the data set; None for the default one."""
    data_dir: str | None = None
    """The folder inside the data set's repository; None for the whole of it."""
    data_files: str | None = None
    """The files inside the data set's repository, a glob; None for those of the split."""
    revision: str | None = None
    """The commit of the data set; None for the newest."""
    columns: Mapping[str, str] | None = None
    """Our key → the key in the rows, or a path of keys with dots."""
    where: Mapping[str, Any] | None = None
    """Key in the rows → the value, or the values, that a row must have to be read."""
    ignore: tuple[str, ...] = ()
    """Keys that are left unread on purpose although they change what a row means."""
    templated: str | None = None
    """What to do with text that has a chat template in it: "strip", "keep"; None: refuse it."""
    by: str | None = None
    """Which of several judgments makes the ranks; None for the form's first."""
    tie_within: float = 0.0
    """The difference up to which two scores are a tie."""
    min_score_ratio: float = 1.0
    """The smallest ratio of two scores in a pair, for forms that count votes."""
    tiers: tuple[str, ...] = ()
    """The names of the tiers, the best first, for forms with buckets."""
    on_bad_row: str = "error"
    """Whether a row with a mistake is an error ("error") or left out ("drop")."""
    max_bad: float = 0.01
    """The largest share of rows that may be left out so."""
    skip: int = 0
    """The number of records to leave out at the beginning."""
    limit: int | None = None
    """The number of records to load at most; None for all."""
    weight: float | None = None
    """The source's share in a mixture, relative to the other weights."""
    sha256: str | None = None
    """What the file must hold; None if that does not matter."""
    parts: tuple["Source", ...] = ()
    """The sources of a mixture."""

    @property
    def name(self) -> str:
        """Return the path or the id, for error lines."""
        if self.parts:
            return " + ".join(part.name for part in self.parts)
        return str(self.hub or self.path)

    @property
    def label(self) -> str:
        """Return a short name without folders of this machine, for figures by source."""
        if self.hub is not None:
            return "/".join(filter(None, (self.hub, self.subset, self.data_dir)))
        return Path(str(self.path)).name

    @property
    def options(self) -> Options:
        """Return what the forms need to know."""
        return Options(
            by=self.by,
            ignore=frozenset(self.ignore),
            templated=self.templated,
            tie_within=self.tie_within,
            min_score_ratio=self.min_score_ratio,
            tiers=self.tiers,
        )


@dataclass
class Loaded:
    """Hold the result of `read`: records, counts and error lines."""

    records: list[Record] = field(default_factory=list)
    """The records, in order."""
    locations: list[str] = field(default_factory=list)
    """The location of each record: "FILE:LINE", or with an index."""
    rows: int = 0
    """The number of rows that were looked at, those that `where` leaves out not counted."""
    forms: Counter[str] = field(default_factory=Counter)
    """Form → the number of its rows."""
    unread: Counter[str] = field(default_factory=Counter)
    """Key that is not read → the number of rows that have it."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Reason → the number of rows, or parts of rows, that are understood and hold nothing of this
    kind."""
    left_out_places: list[tuple[str, str]] = field(default_factory=list)
    """(location, reason) of the first MOST_PLACES of them."""
    filtered: int = 0
    """Rows left out by `where`."""
    dropped: list[tuple[str, str]] = field(default_factory=list)
    """(location, what is wrong) of each bad row that was left out because the source says so."""
    duplicates: int = 0
    """Prompts left out because they had come before."""
    blanks: int = 0
    """Blank lines that were skipped."""
    cut: bool = False
    """Whether reading stopped at `max_rows` rows, so that there may be more."""
    errors: list[str] = field(default_factory=list)
    """Lines "PLACE: what is wrong; what to do"."""
    tell: Callable[[str, str, str], None] | None = None
    """Is called with (location, reason, what it is a copy of or what is wrong) for each row, or
    part of a row, that gives no record; None: counting them is enough."""
    note: Note = no_note
    """Is told how far reading is: rows, with those that `where` leaves out, and the share."""

    def count_left_out(self, location: str, reason: str) -> None:
        """Count a row, or a part of one, that is understood and holds nothing of this kind.

        Args:
            location: Where it is.
            reason: Why: one of a few sentences.
        """
        self.left_out[reason] += 1
        if len(self.left_out_places) < MOST_PLACES:
            self.left_out_places.append((location, reason))
        self.leave_out(location, reason)

    def leave_out(self, location: str, reason: str, detail: str = "") -> None:
        """Tell of a row that gives no record, if anybody wants to know.

        Args:
            location: Where it is.
            reason: Why: one of a few sentences.
            detail: What it is a copy of, or what is wrong with it.
        """
        if self.tell is not None:
            self.tell(location, reason, detail)

    def left_out_lines(self) -> list[str]:
        """Return a line for each reason why rows, or parts of rows, are left out: "12: why"."""
        return [f"{number:,}: {reason}" for reason, number in self.left_out.most_common()]


# ── loading for a stage ──────────────────────────────────────────────────────────────────────────


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
    return replace(source, sha256=None, parts=tuple(without_digest(part) for part in source.parts))


# ── reading ──────────────────────────────────────────────────────────────────────────────────────


def read(kind: str, source: Source, max_rows: int | None = None) -> Loaded:
    """Read and check a source row by row; errors are collected, not raised.

    Args:
        kind: The kind of data.
        source: Where the rows come from.
        max_rows: The number of rows after which reading stops (of each part of a mixture).
    """
    if source.parts:
        return mix_parts(source, [read(kind, part, max_rows) for part in source.parts])
    loaded = Loaded()
    for location, record in records(kind, source, loaded, max_rows):
        loaded.records.append(record)
        loaded.locations.append(location)
    if not loaded.errors and not loaded.cut and kind == "rankings":
        loaded.errors += no_preference(source.name, loaded.records)
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
            if isinstance(record, Ranking) and not verdicts["usable"]:
                verdicts.update(verdict for *_, verdict in judged_pairs(record))
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
        yield location, with_source(record, source.parts[part].label, ids, location)
    for rest, own in zip(streams, counts, strict=True):
        for _ in rest:  # to the end, for its counts and errors
            pass
        add_counts(loaded, own)
    loaded.errors += [] if loaded.errors else errors


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
    whole.unread += part.unread
    whole.left_out += part.left_out
    whole.left_out_places += part.left_out_places
    whole.filtered += part.filtered
    whole.dropped += part.dropped
    whole.duplicates += part.duplicates
    whole.blanks += part.blanks
    whole.cut = whole.cut or part.cut
    whole.errors += part.errors


def mix_parts(source: Source, parts: list[Loaded]) -> Loaded:
    """Mix what was read of the parts of a mixture by their weights.

    Args:
        source: The mixture.
        parts: What was read of each part.
    """
    whole, ids = Loaded(), Seen()
    for part, i in mix([len(part.records) for part in parts], [part.weight for part in source.parts]):
        location = parts[part].locations[i]
        whole.records.append(with_source(parts[part].records[i], source.parts[part].label, ids, location))
        whole.locations.append(location)
    for loaded in parts:
        add_counts(whole, loaded)
    return whole


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


def records(kind: str, source: Source, loaded: Loaded, max_rows: int | None = None) -> Generator[tuple[str, Record]]:
    """Yield the records of a source one by one, so that not all of them need be in memory.

    Args:
        kind: The kind of data.
        source: Where the rows come from; not a mixture.
        loaded: Gets counts and error lines, complete only when the generator has ended.
        max_rows: The number of rows after which reading stops.

    Yields:
        (location, record), after the first `source.skip` ones and at most `source.limit`.
    """
    assert kind in FORMS and (source.path is None) != (source.hub is None), (kind, source)
    of_hub = [name for name in ("subset", "data_dir", "data_files") if getattr(source, name) is not None]
    if source.path is not None and of_hub:
        loaded.errors.append(f"{source.name}: is no data set of the Hub, and {of_hub[0]} does nothing; leave it out")
        return
    reading = Reading(hashes=source.sha256 is not None)
    reader = RowReader(kind, source, loaded)
    rows = source_rows(source, reading)
    passed = 0  # records so far, those before `skip` included
    last = None if source.limit is None else source.skip + source.limit

    def told() -> Iterator[tuple[str, object]]:
        """Yield the rows, and tell how far reading is."""
        for number, item in enumerate(islice(rows, max_rows), 1):
            yield item
            if number % NOTE_EVERY == 0:
                ends = [passed / last] if last else []
                ends += [number / max_rows] if max_rows else []
                ends += [share] if (share := reading.share()) is not None else []
                loaded.note(number, max(ends, default=None))

    try:
        for location, record in reader.records(told()):
            passed += 1
            if passed > source.skip:
                yield location, record
            if passed == last:
                break
            if len(loaded.errors) + len(reading.errors) >= MOST_ERRORS:
                loaded.errors.append(f"{source.name}: not read after {location}: {MOST_ERRORS:,} errors are enough")
                break
    finally:
        rows.close()  # only now `reading` is complete
    loaded.cut = max_rows is not None and reader.count == max_rows
    loaded.blanks = reading.blanks
    loaded.errors += reading.errors
    if source.sha256 is not None and reading.sha256 != source.sha256:
        # Whatever else is wrong with the file, this is the reason.
        loaded.errors[:] = [f"{source.path}: was edited since this command inspected it; run again"]
        return
    loaded.errors += too_many_dropped(source, loaded)
    if reader.marked[True] and reader.marked[False] and "label" not in source.ignore:
        loaded.errors.append(
            f"{source.name}: {reader.marked[False]:,} rows do not say whether their answer is good, beside "
            f"{reader.marked[True]:,} that do (label); take them out, or say ignore: [label] to teach all"
        )
    if loaded.errors or loaded.cut:
        return
    if source.where and reader.count and not reader.has_where_keys:
        loaded.errors.append(f"{source.name}: no row has the keys of where ({', '.join(source.where)}); correct them")
    elif source.where and reader.count and reader.count == loaded.filtered:
        loaded.errors.append(no_wanted_row(source))
    elif passed == 0:
        reasons = {**loaded.left_out, **({"where does not ask for them": loaded.filtered} if loaded.filtered else {})}
        left = "; ".join(f"{number:,} left out: {reason}" for reason, number in reasons.items())
        loaded.errors.append(f"{source.name}: no rows{f' are left ({left})' if left else ''}; give at least one")
    elif passed <= source.skip:
        loaded.errors.append(
            f"{source.name}: has {passed} records, and skip leaves out the first {source.skip}; lower skip"
        )


def no_wanted_row(source: Source) -> str:
    """Return the error line of a source whose `where` lets no row pass."""
    wanted = ", ".join(f"{key}: {value}" for key, value in (source.where or {}).items())
    return f"{source.name}: no row has what where asks for ({wanted}); correct where"


@dataclass
class RowReader:
    """Turn rows into records of one kind, and keep what must be known across rows."""

    kind: str
    """The kind of data."""
    source: Source
    """Where the rows come from, and how they are read."""
    loaded: Loaded
    """Gets counts and error lines."""
    count: int = 0
    """The number of rows so far, with those that `where` leaves out."""
    has_where_keys: bool = False
    """Whether any row had all keys of `where`."""
    marked: Counter[bool] = field(default_factory=Counter)
    """Whether a mark says if the answer is good → the number of such rows, of forms with marks."""
    _seen: Seen = field(default_factory=Seen)
    """Id of a ranking, or key of a prompt → its first location."""
    _gathered: dict[int, tuple[Form, list[tuple[str, dict]]]] = field(default_factory=dict)
    """Id of a form whose records need several rows → the form and its rows."""

    def records(self, rows: Iterable[tuple[str, object]]) -> Iterator[tuple[str, Record]]:
        """Yield the records of rows, those that need several rows at the end."""
        options = self.source.options
        for location, value in rows:
            self.count += 1
            if self.source.where and not self._is_wanted(value):
                self.loaded.filtered += 1
                self.loaded.leave_out(location, "where")
                continue
            self.loaded.rows += 1
            try:
                form, row = self._recognised(value)
                prompts_only = self.kind in PROMPT_KINDS and form.prompt is not None
                if form.gather is not None and not prompts_only:
                    self._gathered.setdefault(id(form), (form, []))[1].append((location, row))
                    continue
                converted = self._convert(form, row, options)
            except LeftOut as reason:
                self.loaded.count_left_out(location, str(reason))
                continue
            except ValueError as error:
                self._bad(location, error)
                continue
            for item in converted:
                yield from self._record(location, item, row)
        for form, gathered in self._gathered.values():
            assert form.gather is not None
            try:
                for location, part in form.gather(gathered, options):
                    yield from self._record(location, part, {})
            except ValueError as error:
                self._bad(gathered[0][0], error)

    def _is_wanted(self, value: object) -> bool:
        """Return whether `where` lets a row pass."""
        assert self.source.where is not None
        if not isinstance(value, dict):
            return True  # the form says what is wrong with it
        self.has_where_keys = self.has_where_keys or all(key in value for key in self.source.where)
        return all(matches(value.get(key), wanted) for key, wanted in self.source.where.items())

    def _recognised(self, value: object) -> tuple[Form, dict]:
        """Return the form of a row and the row with its keys renamed, and count both."""
        if self.source.columns and isinstance(value, dict):
            value = renamed(value, self.source.columns)
        form, row = recognise(self.kind, value)
        ignore = (*self.source.ignore, *(self.source.where or ()))  # keys that are read after all
        refuse_meaningful_keys(self.kind, form, row, ignore)
        if not form.name:
            refuse_unknown_keys(form, row, ignore)
        if self.kind == "rankings":
            if self.source.by is not None:
                refuse_other_judgments(form, self.source.by)
            if self.source.min_score_ratio != 1.0 and not form.has_votes:
                raise ValueError(f"min_score_ratio: a row {form} holds no votes; take it out of the source")
        if self.kind == "demonstrations" and (form.name == MARKED or form in MAY_BE_MARKED):
            self.marked[form.name == MARKED] += 1
        self.loaded.forms["a plain string" if isinstance(value, str) else str(form)] += 1
        known = form.keys_of(row)
        self.loaded.unread.update(
            key for key in row if key not in known and key not in METADATA and key not in (self.source.where or ())
        )
        return form, row

    def _convert(self, form: Form, row: dict, options: Options) -> list[dict | LeftOut]:
        """Return the rows of our own form that a row holds.

        Args:
            form: Its form.
            row: The row.
            options: What the source says.
        """
        if self.kind in PROMPT_KINDS and form.prompt is not None:
            return [form.prompt(row, options)]
        converted = form.convert(row, options)
        return converted if isinstance(converted, list) else [converted]

    def _record(self, location: str, item: dict | ValueError, row: dict) -> Iterator[tuple[str, Record]]:
        """Yield the record of a row of our own form; none if it is left out, wrong, or repeated.

        Args:
            location: Where the row is.
            item: The row of our own form, or why there is none.
            row: The row that it was made of.
        """
        if isinstance(item, LeftOut):
            self.loaded.count_left_out(location, str(item))
            return
        if isinstance(item, ValueError):
            self._bad(location, item)
            return
        try:
            item = {**{key: row[key] for key in KEPT if key in row}, **item}
            if "id" in self.source.ignore:
                item.pop("id", None)
            item = with_labels(item, row)
            if self.kind != "documents":
                item = without_templates(item, self.source.templated)
            record = PARSERS[self.kind](item)
            if isinstance(record, Ranking):
                record = with_own_id(record, location, self._seen)
        except ValueError as error:
            self._bad(location, error)
            return
        if isinstance(record, Prompt):
            key = prompt_key(record.prompt)
            if key in self._seen:
                self.loaded.duplicates += 1
                self.loaded.leave_out(location, REPEATED, self._seen[key])
                return
            self._seen.add(key, location)
        yield location, record

    def _bad(self, location: str, error: ValueError) -> None:
        """Count a row with a mistake as dropped, or as an error, as the source says."""
        if self.source.on_bad_row == "drop":
            self.loaded.dropped.append((location, str(error)))
            self.loaded.leave_out(location, "bad row", str(error))
        else:
            self.loaded.errors.append(f"{location}: {error}")


def refuse_other_judgments(form: Form, by: str) -> None:
    """Raise ValueError where a form has no judgment of this name.

    Args:
        form: The form of a row.
        by: The judgment that the source asks for.
    """
    if not form.by:
        raise ValueError(f"by: '{by}': a row {form} holds one judgment only; take by out of the source")
    if by not in form.by and "*" not in form.by:
        raise ValueError(f"by: '{by}' is no judgment of {form.name}; expected {' or '.join(form.by)}")


def with_labels(item: dict, row: dict) -> dict:
    """Return a row of our own form with the labels of the row that it was made of under `meta`.

    Args:
        item: The row of our own form.
        row: The row that it was made of.
    """
    labels = {key: row[key] for key in LABELS if isinstance(row.get(key), str)}
    if not labels or not isinstance(item.get("meta"), dict | None):
        return item
    return item | {"meta": labels | (item.get("meta") or {})}


def source_rows(source: Source, reading: Reading) -> Generator[tuple[str, object]]:
    """Return an iterator over (location, row) of a source of any format.

    Args:
        source: Where the rows come from; with a limit, rows of the Hub are streamed.
        reading: Gets error lines, and the digest if asked for.
    """
    if source.hub is not None:
        commit, part = source.revision, (source.data_dir, source.data_files)
        return hub_rows(source.hub, source.split, source.subset, commit, source.limit, reading, *part)
    assert source.path is not None
    # "train" is what a source says that says nothing, and then several splits are refused.
    reading.split = source.split if source.split != "train" else None
    return file_rows(source.path, reading)


def matches(value: object, wanted: object) -> bool:
    """Return whether a value of a row is the one that `where` names, or one of several.

    Tables without types (CSV) hold numbers and true or false as text, so texts are compared.

    Args:
        value: The value in the row.
        wanted: The value or a list of values in the config.
    """
    if isinstance(wanted, list | tuple):
        return any(matches(value, one) for one in wanted)
    return value == wanted or as_text(value).lower() == as_text(wanted).lower()


def as_text(value: object) -> str:
    """Return a value as a text: a string as it is, and anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def renamed(row: dict, columns: Mapping[str, str]) -> dict:
    """Return a row with the keys that `columns` names under our names.

    Args:
        row: The row.
        columns: Our key → the key in the row, or a path of keys with dots into nested objects.

    Raises:
        ValueError: The row has no such key.
    """
    taken = {their for their in columns.values() if their in row}
    result = {key: value for key, value in row.items() if key not in taken}
    for our, their in columns.items():
        value: Any = row
        for key in [their] if their in row else their.split("."):
            if not isinstance(value, dict) or key not in value:
                raise ValueError(f"columns: the row has no key '{their}'; it has {', '.join(row)}")
            value = value[key]
        result[our] = value
    return result


def with_own_id(ranking: Ranking, location: str, seen: Seen) -> Ranking:
    """Return a ranking whose id is unique.

    Equal rows without an id get -2, -3, … after their id. An id may name the prompt, under which
    several labelers ranked: then the labeler's name goes after it.

    Args:
        ranking: The ranking.
        location: Where it is, for error lines.
        seen: Id → location of the rankings before it; this one is added.

    Raises:
        ValueError: Two rows give the same id, and not by different labelers.
    """
    if ranking.id in seen:
        with_name = f"{ranking.id}-{ranking.labeler}"
        if ranking.id == content_id(ranking):
            free = next(name for copy in count(2) if (name := f"{ranking.id}-{copy}") not in seen)
        elif ranking.labeler is not None and with_name not in seen:
            free = with_name
        else:
            raise ValueError(
                f"the id '{ranking.id}' is also used at {seen[ranking.id]}; give each its own, or say ignore: [id]"
            )
        ranking = replace(ranking, id=free)
    seen.add(ranking.id, location)
    return ranking


def too_many_dropped(source: Source, loaded: Loaded) -> list[str]:
    """Return an error line if more bad rows were left out than the source allows.

    Args:
        source: The source.
        loaded: What was read.
    """
    bad = len(loaded.dropped)
    if bad <= source.max_bad * loaded.rows:
        return []
    first, problem = loaded.dropped[0]
    share = f"{bad:,} of {loaded.rows:,} rows are bad ({bad / loaded.rows:.1%}), more than max_bad {source.max_bad:.1%}"
    return [f"{source.name}: {share}; the first, {first}: {problem}"]


def no_preference(name: str, rankings: list[Record]) -> list[str]:
    """Return an error line if rankings hold no preference.

    Args:
        name: The path or the id.
        rankings: All records of the source.
    """
    verdicts: Counter[str] = Counter()
    for ranking in rankings:
        assert isinstance(ranking, Ranking)
        verdicts.update(verdict for *_, verdict in judged_pairs(ranking))
    return no_usable_pair(name, verdicts)


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
