"""Guess the kind of a file from the keys of its first rows."""

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

from data.files.reading import Reading
from data.forms import FORMS, recognise
from data.forms.form import Form, LeftOut, Options, Row
from data.forms.marked import NAME as MARKED
from data.forms.messages import CONVERSATION_KEYS, conversation_turns
from data.parsing import METADATA
from data.row_reader import PARSERS, matches, renamed, source_rows
from data.source import Source
from data.tasks.wordings import read_wordings
from data.templated import TemplatedText
from pipeline.errors import UserError

TRAINING = ("rankings", "demonstrations", "documents", "prompts")
"""Kinds of training data, the most specific first; they may share prompts among themselves."""
GUESSED_ROWS = 50
"""Rows of a file from which its kind is guessed."""
SHORT = 80
"""Characters that a text beside a prompt may have without being taken for an answer."""
ANSWER_WORDS = frozenset([
    "answer", "answers", "response", "responses", "reply", "replies", "output", "outputs", "completion",
    "completions", "generation", "generations", "generated", "chosen", "rejected", "label", "labels", "rank",
    "ranks", "ranking", "rankings", "score", "scores", "rating", "ratings", "winner", "preference",
    "preferences", "preferred", "better", "best", "worse", "worst", "choice", "choices", "reward", "rewards",
    "target", "targets", "solution", "summary", "summaries", "kto", "judgment", "judgement", "verdict",
    "annotation", "annotations", "critique", "vote", "votes", "resp", "pos", "neg", "positive", "negative",
    "good", "bad", "win", "winning", "lose", "losing", "loser", "accepted", "dispreferred", "correct", "incorrect",
    "left", "right",
])  # fmt: skip
"""Words in the keys of answers, and of what is said about them."""
WORD = re.compile(r"[a-z]+")


def guess_kind(source: Source) -> str | None:
    """Guess the kind of data from the keys of the first 50 rows.

    A kind in the file's name is taken if all rows have its keys; otherwise the kind that most rows
    have the keys of, and of several the one that asks for the most keys. Damaged rows have the keys
    of their kind too, so whether rows are valid decides only between kinds with equally many keys.
    Rows are prompts only if nothing beside the prompt could be an answer.

    Args:
        source: Where the rows come from and how they are read.

    Returns:
        The kind; None if no row has the keys of any.
    """
    if any(part.wordings is not None for part in source.parts or (source,)):
        return kind_of_wordings(source)
    in_name = [kind for kind in ("evaluation_prompts", *TRAINING) if kind in Path(source.name).stem]
    rows = [value for _, value in islice(all_rows(source, Reading()), GUESSED_ROWS)]
    for kind in in_name:
        if rows and all(form_or_none(kind, value) is not None for value in rows):
            return kind
    scores = {kind: evidence(kind, rows, source.options) for kind in TRAINING}
    best = max(TRAINING, key=lambda kind: scores[kind])
    return best if scores[best][0] else None


def kind_of_wordings(source: Source) -> str:
    """Return the kind that wordings make: demonstrations, unless one has no response.

    Args:
        source: Where the rows come from; it has wordings.
    """
    if "prompt" in Path(source.name).stem:
        return "prompts"
    paths = [part.wordings for part in source.parts or (source,) if part.wordings is not None]
    try:
        found = [one for path in paths for one in read_wordings(path).wordings]
    except UserError:  # reading the rows says what is wrong
        return "demonstrations"
    return "demonstrations" if all(one.response is not None for one in found) else "prompts"


def all_rows(source: Source, reading: Reading) -> Iterator[tuple[str, object]]:
    """Yield (location, row) of a source, of a mixture those of each part in turn.

    Rows have the keys that `columns` gives them, and those that `where` leaves out are passed over.
    """
    for part in source.parts or (source,):
        for location, value in source_rows(part, reading):
            if isinstance(value, dict):
                wanted = part.where or {}
                if not all(matches(value.get(key), choice) for key, choice in wanted.items()):
                    continue
                with suppress(ValueError):  # a row without such a key is reported when it is read
                    value = renamed(value, part.columns or {})
            yield location, value


def without_tiers(source: Source) -> Source:
    """Return a source of rankings without `tiers`, unless it comes from a tool with buckets."""
    found = (form_or_none("rankings", value) for _, value in islice(all_rows(source, Reading()), GUESSED_ROWS))
    has_buckets = any(one is not None and one[0].has_tiers for one in found)
    return source if has_buckets else replace(source, tiers=())


def form_or_none(kind: str, value: object) -> tuple[Form, Row] | None:
    """Return the form of a row and the row as an object; None if it has none of this kind."""
    try:
        return recognise(kind, value)
    except ValueError:
        return None


def evidence(kind: str, rows: Iterable[object], options: Options) -> tuple[int, int, int]:
    """Return how much speaks for a kind: rows with its keys, the number of keys, valid rows.

    Args:
        kind: The kind of data.
        rows: The first rows of the file.
        options: How the source is read.
    """
    recognised = keys = valid = 0
    gathered: dict[int, tuple[Form, list[tuple[str, Row]]]] = {}
    for value in rows:
        found = form_or_none(kind, value)
        if found is None or (kind == "prompts" and not is_only_prompt(*found)):
            continue
        form, row = found
        if form.gather is not None:
            gathered.setdefault(id(form), (form, []))[1].append(("", row))
            continue
        recognised += 1
        keys += len(form.needs)
        valid += is_valid(kind, form, row, options)
    for form, several in gathered.values():
        records = records_in(form, several, options)
        # Binary labels make rankings only where most prompts have a good and a bad answer.
        if form.name != MARKED or 4 * records >= len(several):
            recognised += len(several)
            keys += len(form.needs) * len(several)
            valid += len(several) if records else 0
    return recognised, keys, valid


def is_valid(kind: str, form: Form, row: Row, options: Options) -> bool:
    """Return whether a row makes a record, or would if the source said how to read its template."""
    try:
        converted = form.convert(row, options)
        for item in converted if isinstance(converted, list) else [converted]:
            if not isinstance(item, LeftOut):
                PARSERS[kind](item)
    except (TemplatedText, LeftOut):
        return True
    except ValueError:
        return False
    return True


def records_in(form: Form, rows: list[tuple[str, Row]], options: Options) -> int:
    """Return how many records a form makes of rows that it reads together."""
    assert form.gather is not None
    try:
        return sum(isinstance(item, dict) for _, item in form.gather(rows, options))
    except ValueError:
        return 0


def is_only_prompt(form: Form, row: Row) -> bool:
    """Return whether a row holds a prompt, and nothing that could be an answer to it.

    Args:
        form: The form of the row, read as a prompt.
        row: The row.
    """
    if form not in FORMS["prompts"] or "chosen" in row:
        return False
    if form.name:
        return True
    if form.needs[0] in CONVERSATION_KEYS:
        try:
            last = conversation_turns(row)[-1]
        except ValueError:
            return False
        if not isinstance(last, dict) or last.get("role") != "user":
            return False
    known = (*form.needs, *form.also, *METADATA)
    return all(key in known or says_little(key, value) for key, value in row.items())


def says_little(key: str, value: object) -> bool:
    """Return whether a value beside a prompt can be no answer, and no judgment of one.

    Args:
        key: Its key.
        value: The value: a number, a short text of one line, a short list of such, or nothing.
    """
    if value in (None, [], {}):
        return True
    if not ANSWER_WORDS.isdisjoint(WORD.findall(key.lower())):
        return False
    if isinstance(value, list):
        return len(value) <= 20 and all(is_short(one) for one in value)
    return is_short(value)


def is_short(value: object) -> bool:
    """Return whether a value is a number, true or false, or a short text of one line."""
    if isinstance(value, str):
        return len(value) <= SHORT and "\n" not in value.strip()
    return value is None or isinstance(value, bool | int | float)


def hint(value: object) -> str:
    """Return the way to read an unrecognised row as a prompt, for its error line."""
    if isinstance(value, dict) and form_or_none("prompts", value) is not None:
        return "; --kind prompts reads only its prompt"
    return ""
