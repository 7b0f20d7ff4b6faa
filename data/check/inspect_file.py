"""Inspect one file: recognise its kind, read it as training would, and report what it holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from data.check.guess import TRAINING, all_rows, guess_kind, hint
from data.check.lengths import LengthTally, TemplateTally
from data.check.pairs import PairTally
from data.check.prompts import Compared, PromptTally, add_shared_prompts
from data.check.report import Limits, OtherData, Report
from data.error_lines import shorten
from data.files.reading import Reading
from data.forms import FORMS
from data.parsing import describe
from data.progress import Note, Watch, unwatched
from data.records import Demonstration, Ranking, Record
from data.row_reader import no_wanted_row
from data.source import Loaded, Source
from data.sources import stream
from data.turns import TurnCount, count_turns

DROPPED_SHOWN = 5
"""Kinds of mistakes of rows that were dropped that are shown at most."""
TEMPLATED = {"strip": "read without it", "keep": "read as plain text"}
"""What a source says of text that has a chat template in it → what becomes of it."""
AT_ONCE = 512
"""Records that are measured together."""


def check(
    source: Source,
    kind: str | None = None,
    limits: Limits | None = None,
    against: Sequence[OtherData] = (),
    max_rows: int | None = None,
    watch: Watch = unwatched,
) -> Report:
    """Inspect a source of data and return the report.

    Records are read one by one and not kept, so that data may be larger than the memory. Only those
    of the Hub that are streamed, which a source with a limit says, are loaded once and kept.

    Args:
        source: Where the rows come from and how they are read.
        kind: The kind of data; None: what its keys say.
        limits: What lengths are counted with, and what limits hold; None: none.
        against: Data that must not share prompts with this file.
        max_rows: The number of rows after which reading stops; None: all are read.
        watch: Shows how far reading is.
    """
    limits = limits or Limits()
    report = Report(source.name, kind or guess_kind(source))
    if report.kind is None:
        reading = Reading()
        rows = all_rows(source, reading)
        first = next((f"{location}: {unknown_kind(value)}" for location, value in rows), no_rows(source))
        report.errors += reading.errors or [first]
        return report
    is_kept = any(part.hub is not None and part.limit is not None for part in source.parts or (source,))
    kept: list[tuple[str, Record]] = []
    tally = Tally(report.kind, limits)
    with watch(f"{source.name}: reading") as note:
        loaded = Loaded(note=note)
        items: Iterable[tuple[str, Record]] = stream(report.kind, source, loaded, max_rows)
        if is_kept:
            items = kept = list(items)
        tally.add_all(items)

    def found(note: Note) -> Iterator[tuple[str, Record]]:
        """Return an iterator over (location, record) of the source once more."""
        assert report.kind is not None
        return iter(kept) if is_kept else stream(report.kind, source, Loaded(note=note), max_rows)

    report.errors += loaded.errors
    add_rows(report, loaded, source)
    if (source.skip or source.limit is not None) and tally.prompts.rows:
        report.add("taken", f"records {source.skip + 1:,} to {source.skip + tally.prompts.rows:,}")
    if not tally.prompts.rows:
        return report
    tally.report(report, loaded)
    if report.kind == "rankings" and not source.parts and not report.errors and not tally.pairs.usable():
        counts = ", ".join(f"{number} {verdict}" for verdict, number in sorted(tally.pairs.verdicts.items()))
        problem = f"not one usable pair ({counts}); at least one needs different responses with different ranks"
        report.errors.append(f"{source.name}: {problem}")
    for other in against:
        other_kind = other.name if other.name in FORMS else guess_kind(other.source)
        if other_kind is not None and "documents" not in (other_kind, report.kind):
            both_train = other.name in TRAINING and report.kind in TRAINING
            own = tally.prompts.prompts | tally.prompts.row_texts
            compared = Compared(found, own, other, other_kind, watch)
            add_shared_prompts(report, compared, may_share=both_train)
    return report


@dataclass
class Tally:
    """Count everything that is reported of records, one batch after the other."""

    kind: str
    """The kind of data."""
    limits: Limits
    """What lengths are counted with, and what limits hold."""

    def __post_init__(self) -> None:
        self.lengths = LengthTally(self.limits)
        self.template = TemplateTally()
        self.prompts = PromptTally()
        self.turns = TurnCount(0, 0, 0)
        cut = None
        if self.limits.tokenizer is not None and self.limits.max_length and self.limits.on_too_long == "truncate":
            cut = (self.limits.tokenizer, self.limits.max_length)
        self.pairs = PairTally(cut)

    def add_all(self, found: Iterable[tuple[str, Record]]) -> None:
        """Count all records."""
        found = iter(found)
        while batch := list(islice(found, AT_ONCE)):
            names, batch_records = [name for name, _ in batch], [record for _, record in batch]
            self.lengths.add(batch_records, names)
            if self.lengths.errors:
                self.pairs.cut = None  # which pairs are cut can be said only where every row could be encoded
            for name, record in batch:
                self._add(name, record)

    def _add(self, name: str, record: Record) -> None:
        """Count a record for everything but its lengths."""
        prompt = self.prompts.add(record)
        if isinstance(record, Ranking):
            self.pairs.add(record, name, prompt)
        if isinstance(record, Demonstration):
            one = count_turns([record], self.limits.turns)
            self.turns = TurnCount(
                self.turns.conversations + 1, self.turns.assistant + one.assistant, self.turns.learnt + one.learnt
            )
        if isinstance(record, Ranking | Demonstration) and self.limits.tokenizer is not None:
            self.template.add(record, name)

    def report(self, report: Report, loaded: Loaded) -> None:
        """Report what was counted.

        Args:
            report: Where facts and errors go.
            loaded: What reading has counted.
        """
        tokenizer = self.limits.tokenizer
        if self.kind == "demonstrations":
            report.add("turns", self.turns.text() + self.lengths.apart_text())
        self.lengths.report(report)
        if self.kind == "demonstrations" and tokenizer is not None and self.limits.response_length is not None:
            self.lengths.report_room(report, self.limits.response_length)
        if self.template.rows and tokenizer is not None:
            self.template.report(report, tokenizer)
        self.prompts.report(report, loaded.duplicates)
        if self.kind == "rankings":
            self.pairs.report(report)


def no_rows(source: Source) -> str:
    """Return the error line of a source none of whose rows are read."""
    return no_wanted_row(source) if source.where else f"{source.name}: no rows; give at least one"


def unknown_kind(value: object) -> str:
    """Return the error line of a row that has no known kind."""
    keys = f"the keys {', '.join(value)}" if isinstance(value, dict) else describe(value)
    known = "; ".join(f"{kind} {' or '.join(own_keys(kind))}" for kind in TRAINING)
    return (
        f"{keys} are no known kind of row; known are {known}; and those of data sets and tools that data/README.md "
        f"lists. Other keys can be named: columns.prompt=question{hint(value)}"
    )


def own_keys(kind: str) -> list[str]:
    """Return the keys of our own forms of a kind: "{prompt, completion}"."""
    return list(dict.fromkeys("{" + ", ".join(form.needs) + "}" for form in FORMS[kind] if not form.name))


def add_rows(report: Report, loaded: Loaded, source: Source) -> None:
    """Report the number of rows, of each form, and what is not read, with the reasons.

    Args:
        report: Where facts go; it has the kind.
        loaded: What reading has found.
        source: How the rows are read.
    """
    judgments = {str(form): form.by for form in FORMS[report.kind or ""] if form.by}
    blanks = f" · {loaded.blanks:,} blank lines skipped" if loaded.blanks else ""
    first = "the first " if loaded.cut else ""
    report.add("rows", f"{first}{loaded.rows:,}{blanks}")
    for form, count in loaded.forms.most_common():
        by = judgments.get(form, ())
        chosen = f", ranks by {source.by or by[0]} (by: {', '.join(by)})" if by and not source.parts else ""
        report.add("form", f"{form}: {count:,} rows{chosen}")
    for wording, count in loaded.wordings.most_common():
        report.add("wording", f"{wording}: {count:,} rows")
    if loaded.unread:
        keys = ", ".join(f"{key} ({count:,})" for key, count in sorted(loaded.unread.items()))
        report.add("keys not read", keys)
    if source.templated is not None:
        report.add("templated", f"{source.templated}: text with a chat template in it is {TEMPLATED[source.templated]}")
    if loaded.filtered:
        report.add("filtered", f"{loaded.filtered:,} rows are not those of where")
    for line in loaded.left_out_lines():
        report.add("left out", line)
    if loaded.dropped:
        report.add("dropped", f"{len(loaded.dropped):,} rows with mistakes, as on_bad_row: drop says")
        for line in shorten(f"{location}: {problem}" for location, problem in loaded.dropped)[:DROPPED_SHOWN]:
            report.add("", line)
