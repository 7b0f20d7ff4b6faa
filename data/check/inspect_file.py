"""Inspect one file: recognise its kind, read it as training would, and report what it holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from data.check.guess import TRAINING, guess_kind, hint
from data.check.lengths import add_answer_lengths, add_lengths, add_template_agreement
from data.check.pairs import add_pairs
from data.check.prompts import add_duplicates, add_shared_prompts
from data.check.report import OtherData, Report
from data.check.turns import add_turns
from data.files.reading import Reading
from data.forms import FORMS
from data.parsing import describe
from data.sources import Loaded, Source, read, source_rows
from data.turns import Turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check(
    source: Source,
    kind: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
    on_too_long: str | None = "error",
    against: Sequence[OtherData] = (),
    response_length: int | None = None,
    turns: Turns = "all",
) -> Report:
    """Inspect a source of data and return the report.

    Args:
        source: Where the rows come from and how they are read.
        kind: The kind of data; None: what its keys say.
        tokenizer: What lengths are counted with; None: lengths are in words.
        max_length: The limit in tokens of the section that reads this kind; for prompts without the
            response.
        on_too_long: "error", "drop" or "truncate", as of that section; None: nothing is too long.
        against: Data that must not share prompts with this file.
        response_length: ppo.response_length, with which the demonstrations' answers are compared.
        turns: sft.turns: which of the demonstrations' answers are learnt.
    """
    report = Report(source.name, kind or guess_kind(source))
    if report.kind is None:
        reading = Reading()
        rows = all_rows(source, reading)
        first = next((f"{location}: {unknown_kind(value)}" for location, value in rows), "")
        report.errors += reading.errors or [first]
        return report
    loaded = read(report.kind, source)
    report.errors += loaded.errors
    add_rows(report, loaded)
    if (source.skip or source.limit is not None) and loaded.records:
        report.add("taken", f"records {source.skip + 1:,} to {source.skip + len(loaded.records):,}")
    if not loaded.records:
        return report
    add_lengths(report, loaded, tokenizer, max_length, on_too_long, turns)
    if report.kind == "demonstrations":
        add_turns(report, loaded, tokenizer if not report.errors else None, turns)
        if tokenizer is not None and response_length is not None:
            add_answer_lengths(report, loaded, tokenizer, response_length, turns)
    if report.kind in ("demonstrations", "rankings") and tokenizer is not None:
        add_template_agreement(report, loaded, tokenizer)
    add_duplicates(report, loaded)
    if report.kind == "rankings":
        # Which pairs truncation makes equal can be said only where every row could be encoded.
        cut = tokenizer is not None and on_too_long == "truncate" and not report.errors
        add_pairs(report, loaded, tokenizer if cut else None, max_length if cut else None)
    for other in against:
        other_kind = other.name if other.name in FORMS else guess_kind(other.source)
        if other_kind is not None and "documents" not in (other_kind, report.kind):
            both_train = other.name in TRAINING and report.kind in TRAINING
            theirs = read(other_kind, other.source)
            add_shared_prompts(report, loaded, theirs, other.name, may_share=both_train)
    return report


def all_rows(source: Source, reading: Reading) -> Iterator[tuple[str, object]]:
    """Yield (location, row) of a source, of a mixture those of each part in turn."""
    for part in source.parts or (source,):
        yield from source_rows(part, reading)


def unknown_kind(value: object) -> str:
    """Return the error line of a row that has no known kind."""
    keys = f"the keys {', '.join(value)}" if isinstance(value, dict) else describe(value)
    known = "; ".join(f"{kind} {' or '.join(map(str, FORMS[kind]))}" for kind in TRAINING)
    return f"{keys} are no known kind of row; known are {known}{hint(value)}"


def add_rows(report: Report, loaded: Loaded) -> None:
    """Report the number of rows, of each form, and of keys that are not read."""
    blanks = f" · {loaded.blanks:,} blank lines skipped" if loaded.blanks else ""
    report.add("rows", f"{loaded.forms.total():,}{blanks}")
    for form, count in loaded.forms.most_common():
        report.add("form", f"{form}: {count:,} rows")
    if loaded.unread:
        keys = ", ".join(f"{key} ({count:,})" for key, count in sorted(loaded.unread.items()))
        report.add("keys not read", keys)
    for line in loaded.left_out_lines():
        report.add("left out", line)
