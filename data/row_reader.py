"""Read the records of one source row by row, and check every row on the way.

The same rules hold whatever the format: a key that changes what a row means and that nobody reads
is an error, as is a misspelt key of our own forms; other keys are not read, and `rlhf data check`
lists them. Read as prompts, a row of any other kind gives its prompt.
"""

import json
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count, islice
from typing import Any

from data.files.hub import hub_rows
from data.files.reading import Reading
from data.files.rows import file_rows
from data.forms import FORMS, PROMPT_KINDS, recognise
from data.forms.form import Form, LeftOut, Options
from data.forms.marked import BASES as MAY_BE_MARKED
from data.forms.marked import NAME as MARKED
from data.forms.meaning import ToCheck, refuse_meaningful_keys, refuse_unknown_keys, what_to_check
from data.parsing import METADATA, parse_demonstration, parse_document, parse_prompt, parse_ranking
from data.progress import NOTE_EVERY
from data.records import Demonstration, Prompt, Ranking, Record, content_id, prompt_key
from data.seen import Seen
from data.source import Loaded, Source
from data.tasks.reading import task_rows
from data.tasks.rows import TaskRows
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
KEPT = ("user_id", "kind", "meta", "row_text")
"""Keys of any form's rows that records keep."""
LABELS = ("use_case", "category")
"""Keys that say what a prompt is for; records keep them under `meta`."""
MOST_KEPT = 1000
"""Sets of keys of which it is kept what they say."""
MOST_ERRORS = 10_000
"""Error lines after which the rest of a source is not read."""


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
    try:
        tasks = task_rows(kind, source, partial(records, max_rows=max_rows))
    except UserError as error:
        loaded.errors += error.lines
        return
    reading = Reading(hashes=source.sha256 is not None)
    reader = RowReader(kind, source, loaded, tasks)
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
    elif kind == "rankings":
        loaded.errors += without_effect(source, reader)


def without_effect(source: Source, reader: "RowReader") -> list[str]:
    """Return an error line for each setting of a source of rankings that none of its rows obeys.

    Args:
        source: The source.
        reader: What has read its rows.
    """
    lines = []
    if source.tie_within and not reader.has_ties:
        lines.append(f"{source.name}: tie_within: no row makes its ranks of scores; take it out of the source")
    if source.tiers and not reader.has_tiers:
        lines.append(f"{source.name}: tiers: no row comes from a tool with buckets; take it out of the source")
    return lines


def no_wanted_row(source: Source) -> str:
    """Return the error line of a source whose `where` lets no row pass."""
    wanted = ", ".join(f"{key}: {value}" for key, value in (source.where or {}).items())
    return f"{source.name}: no row has what where asks for ({wanted}); correct where"


@dataclass(frozen=True)
class KnownKeys:
    """Hold what the keys of a row say, whatever their values: it is worked out once for a file."""

    form: Form
    """The form of the row; held, so that no other form gets its id."""
    check: ToCheck | None
    """Which values may change what the row means."""
    unread: tuple[str, ...]
    """Keys that nobody reads."""


@dataclass
class RowReader:
    """Turn rows into records of one kind, and keep what must be known across rows."""

    kind: str
    """The kind of data."""
    source: Source
    """Where the rows come from, and how they are read."""
    loaded: Loaded
    """Gets counts and error lines."""
    tasks: TaskRows | None = None
    """What makes rows of our own form of the rows of a task; None: the forms do."""
    count: int = 0
    """The number of rows so far, with those that `where` leaves out."""
    has_where_keys: bool = False
    """Whether any row had all keys of `where`."""
    has_ties: bool = False
    """Whether any row had scores, or what else `tie_within` compares."""
    has_tiers: bool = False
    """Whether any row was of a form with buckets, which `tiers` puts in order."""
    marked: Counter[bool] = field(default_factory=Counter)
    """Whether a mark says if the answer is good → the number of such rows, of forms with marks."""
    _seen: Seen = field(default_factory=Seen)
    """Id of a ranking, or key of a prompt → its first location."""
    _others: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Hash of a prompt's key → what else its first row says (see `hashes_of_others`)."""
    _gathered: dict[int, tuple[Form, list[tuple[str, dict]]]] = field(default_factory=dict)
    """Id of a form whose records need several rows → the form and its rows."""
    _known: dict[tuple[int | str, ...], "KnownKeys"] = field(default_factory=dict)
    """Id of a form and the keys of a row of it → what is known of such rows."""

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
            if self.tasks is not None:
                yield from self._worded(location, value)
                continue
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
                if (record := self._record(location, item, row)) is not None:
                    yield location, record
        for form, gathered in self._gathered.values():
            assert form.gather is not None
            try:
                for location, part in form.gather(gathered, options):
                    if (record := self._record(location, part, {})) is not None:
                        yield location, record
            except ValueError as error:
                self._bad(gathered[0][0], error)

    def _worded(self, location: str, value: object) -> Iterator[tuple[str, Record]]:
        """Yield the records that the wordings make of a row."""
        assert self.tasks is not None
        try:
            if self.source.columns and isinstance(value, dict):
                value = renamed(value, self.source.columns)
            worded = self.tasks.worded(value)
        except ValueError as error:
            self._bad(location, error)
            return
        assert isinstance(value, dict)
        self.loaded.unread.update(
            key
            for key in value
            if key not in self.tasks.read_keys and key not in (*METADATA, *(self.source.where or ()))
        )
        for one in worded:
            self.loaded.wordings[one.wording.name] += 1
            if (record := self._record(location, one.item, one.row)) is not None:
                yield location, record

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
        keys = (id(form), *row)
        known = self._known.get(keys)
        if known is None:
            known = self._checked(form, row)
            if form.reads is None and len(self._known) < MOST_KEPT:
                self._known[keys] = known
        else:
            refuse_meaningful_keys(form, row, known.check)
        if self.kind == "rankings":
            if self.source.by is not None:
                refuse_other_judgments(form, self.source.by)
            if self.source.min_score_ratio != 1.0 and not form.has_votes:
                raise ValueError(f"min_score_ratio: a row {form} holds no votes; take it out of the source")
            self.has_ties = self.has_ties or form.has_degrees
            self.has_tiers = self.has_tiers or form.has_tiers
        if self.kind == "demonstrations" and (form.name == MARKED or form in MAY_BE_MARKED):
            self.marked[form.name == MARKED] += 1
        self.loaded.forms["a plain string" if isinstance(value, str) else str(form)] += 1
        for key in known.unread:
            self.loaded.unread[key] += 1
        return form, row

    def _checked(self, form: Form, row: dict) -> "KnownKeys":
        """Check the keys of a row; return what is known of all rows with the same form and keys.

        Args:
            form: Its form.
            row: The row.
        """
        ignore = (*self.source.ignore, *(self.source.where or ()))  # keys that are read after all
        check = what_to_check(self.kind, form, row, ignore)
        refuse_meaningful_keys(form, row, check)
        if not form.name:
            refuse_unknown_keys(form, row, ignore)
        read = {*form.keys_of(row), *METADATA, *(self.source.where or ())}
        return KnownKeys(form, check, tuple(key for key in row if key not in read))

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

    def _record(self, location: str, item: dict | ValueError, row: dict) -> Record | None:
        """Return the record of a row of our own form; None if it is left out, wrong, or repeated.

        Args:
            location: Where the row is.
            item: The row of our own form, or why there is none.
            row: The row that it was made of.
        """
        if isinstance(item, LeftOut):
            self.loaded.count_left_out(location, str(item))
            return None
        if isinstance(item, ValueError):
            self._bad(location, item)
            return None
        try:
            if not row.keys().isdisjoint(KEPT):
                item = {key: row[key] for key in KEPT if key in row} | item
            if "id" in self.source.ignore:
                item = {key: value for key, value in item.items() if key != "id"}
            item = with_labels(item, row)
            if self.kind != "documents":
                item = without_templates(item, self.source.templated)
            record = PARSERS[self.kind](item)
            if isinstance(record, Ranking):
                # Where a row gives both, its ranks are read and its scores only kept.
                self.has_ties = self.has_ties or (record.scores is not None and "ranks" not in row)
                record = with_own_id(record, location, self._seen)
            elif self.tasks is not None and isinstance(record, Demonstration | Prompt):
                record = replace(record, extra=dict(row))  # whole, to be shown before other prompts too
            elif isinstance(record, Prompt) and (extra := extra_of(row)):
                record = replace(record, extra=extra)
        except ValueError as error:
            self._bad(location, error)
            return None
        if isinstance(record, Prompt):
            key = prompt_key(record.prompt)
            others = hashes_of_others(record)
            if key in self._seen:
                first = self._others.get(hash(key))
                self.loaded.duplicates += 1
                if others is not None and first is not None and others[0] == first[0]:
                    self.loaded.differing += others != first
                self.loaded.leave_out(location, REPEATED, self._seen[key])
                return None
            self._seen.add(key, location)
            if others is not None:
                self._others[hash(key)] = others
        return record

    def _bad(self, location: str, error: ValueError) -> None:
        """Count a row with a mistake as dropped, or as an error, as the source says."""
        if self.source.on_bad_row == "drop":
            self.loaded.dropped.append((location, str(error)))
            self.loaded.leave_out(location, "bad row", str(error))
        else:
            self.loaded.errors.append(f"{location}: {error}")


def extra_of(row: dict) -> dict | None:
    """Return the keys of a row beside the prompt and what records have fields for; None if none."""
    return {key: value for key, value in row.items() if key not in ("prompt", *KEPT)} or None


def hashes_of_others(prompt: Prompt) -> tuple[int, int] | None:
    """Return hashes of the keys that a row has beside the prompt, and of their values.

    Returns:
        The two hashes; None if scorers find nothing but the prompt.
    """
    others = {key: value for key, value in (prompt.extra or {}).items() if key not in METADATA}
    if not others:
        return None
    return hash(tuple(sorted(others))), hash(json.dumps(others, sort_keys=True, default=str))


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
