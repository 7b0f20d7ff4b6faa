"""Inspect one file: recognise its kind, read it as training would, and report what it holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from data.check.lengths import add_answer_lengths, add_lengths, add_template_agreement
from data.check.pairs import add_pairs
from data.check.prompts import add_duplicates, add_shared_prompts
from data.check.report import OtherFile, Part, Report
from data.forms import FORMS, recognise
from data.json_rows import Reading
from data.parsing import describe
from data.sources import PARSERS, Loaded, Source, file_rows, read

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAINING = ("rankings", "demonstrations", "documents", "prompts")
"""Kinds of training data, the most specific first; they may share prompts among themselves."""
GUESSED_ROWS = 50
"""Rows of a file from which its kind is guessed."""


def check(
    path: str | Path,
    kind: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
    on_too_long: str | None = "error",
    against: Sequence[OtherFile] = (),
    part: Part | None = None,
    response_length: int | None = None,
) -> Report:
    """Inspect a file and return the report.

    Args:
        path: The file.
        kind: The kind of data; None: what its keys say.
        tokenizer: What lengths are counted with; None: lengths are in words.
        max_length: The limit in tokens of the section that reads this kind; for prompts without the
            response.
        on_too_long: "error", "drop" or "truncate", as of that section; None: nothing is too long.
        against: Data that must not share prompts with this file.
        part: Which part of the file is read; None: all of it.
        response_length: ppo.response_length, with which the demonstrations' answers are compared.
    """
    report = Report(Path(path), kind or guess_kind(path))
    if report.kind is None:
        reading = Reading()
        first = next((f"{location}: {unknown_kind(value)}" for location, value in file_rows(path, reading)), "")
        report.errors += reading.errors or [first]
        return report
    loaded = read_part(report.kind, path, part)
    report.errors += loaded.errors
    add_rows(report, loaded)
    if part is not None and (part.skip or part.limit is not None) and loaded.records:
        report.add("taken", f"records {part.skip + 1:,} to {part.skip + len(loaded.records):,}")
    if not loaded.records:
        return report
    add_lengths(report, loaded, tokenizer, max_length, on_too_long)
    if report.kind == "demonstrations" and tokenizer is not None and response_length is not None:
        add_answer_lengths(report, loaded, tokenizer, response_length)
    if report.kind in ("demonstrations", "rankings") and tokenizer is not None:
        add_template_agreement(report, loaded, tokenizer)
    add_duplicates(report, loaded)
    if report.kind == "rankings":
        # Which pairs truncation makes equal can be said only where every row could be encoded.
        cut = tokenizer is not None and on_too_long == "truncate" and not report.errors
        add_pairs(report, loaded, tokenizer if cut else None, max_length if cut else None)
    for other in against:
        other_kind = other.name if other.name in FORMS else guess_kind(other.path)
        if other_kind is not None and "documents" not in (other_kind, report.kind):
            both_train = other.name in TRAINING and report.kind in TRAINING
            theirs = read_part(other_kind, other.path, other.part)
            add_shared_prompts(report, loaded, theirs, other.name, may_share=both_train)
    return report


def read_part(kind: str, path: str | Path, part: Part | None) -> Loaded:
    """Read what a config takes of a file, or of a data set on the Hub.

    Args:
        kind: The kind of data.
        path: The file.
        part: What is taken of it, or of a data set; None: the whole file.
    """
    if part is None:
        return read(kind, Source(path))
    limit = None if part.limit is None else part.skip + part.limit
    if part.hub is None:
        source = Source(path)
    else:
        source = Source(hub=part.hub, split=part.split, subset=part.subset, revision=part.revision)
    loaded = read(kind, source, limit=limit)
    if part.skip >= len(loaded.records) and not loaded.errors:
        problem = f"has {len(loaded.records)} records, and skip leaves out the first {part.skip}"
        loaded.errors.append(f"{source.name}: {problem}; lower skip")
    return replace(loaded, records=loaded.records[part.skip :], locations=loaded.locations[part.skip :])


def guess_kind(path: str | Path) -> str | None:
    """Guess a file's kind from the keys of its first 50 rows.

    A kind in the file's name is taken if all rows have its keys, otherwise the most specific kind.
    Damaged rows have the keys of their kind too, so whether rows are valid decides only between
    kinds with equally many keys.

    Returns:
        The kind; None if no row has the keys of any.
    """
    in_name = [kind for kind in ("evaluation_prompts", *TRAINING) if kind in Path(path).stem]
    rows = [value for _, value in islice(file_rows(path, Reading()), GUESSED_ROWS)]
    recognised: Counter[str] = Counter()  # kind → rows that have its keys
    keys: Counter[str] = Counter()  # kind → the keys that these rows had to have
    valid: Counter[str] = Counter()  # kind → rows without an error
    for value in rows:
        for kind in dict.fromkeys([*in_name, *TRAINING]):
            try:
                form, row = recognise(kind, value)
                recognised[kind] += 1
                keys[kind] += len(form.needs)
                PARSERS[kind](form.convert(row))
                valid[kind] += 1
            except ValueError:
                pass
    for kind in in_name:
        if recognised[kind] == len(rows) > 0:
            return kind
    if not recognised:
        return None
    return max(TRAINING, key=lambda kind: (keys[kind], valid[kind]))


def unknown_kind(value: object) -> str:
    """Return the error line of a row that has no known kind."""
    keys = f"the keys {', '.join(value)}" if isinstance(value, dict) else describe(value)
    known = "; ".join(f"{kind} {' or '.join(map(str, FORMS[kind]))}" for kind in TRAINING)
    return f"{keys} are no known kind of row; known are {known}"


def add_rows(report: Report, loaded: Loaded) -> None:
    """Report the number of rows, of each form, and of keys that are not read."""
    blanks = f" · {loaded.blanks:,} blank lines skipped" if loaded.blanks else ""
    report.add("rows", f"{loaded.forms.total():,}{blanks}")
    for form, count in loaded.forms.most_common():
        report.add("form", f"{form}: {count:,} rows")
    if loaded.unread:
        keys = ", ".join(f"{key} ({count:,})" for key, count in sorted(loaded.unread.items()))
        report.add("keys not read", keys)
