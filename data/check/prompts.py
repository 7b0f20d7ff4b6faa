"""Report prompts that occur twice, in one file or in two."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from data.check.judgments import hash64
from data.check.report import OtherData, Report
from data.forms import PROMPT_KINDS
from data.near_copies import nearest_copies
from data.progress import Note, Watch, no_note, unwatched
from data.records import Document, Record, own_text, prompt_key
from data.source import Loaded
from data.sources import stream

AT_ONCE = 20_000
"""Prompts that are compared with those of evaluation at once."""
Found = Callable[[Note], Iterator[tuple[str, Record]]]
MOST_LEAKS = 100
"""Prompts that are named at most."""


@dataclass
class PromptTally:
    """Count rows and prompts that came before, as 64-bit hashes."""

    rows: int = 0
    """Records."""
    different: set[int] = field(default_factory=set)
    """The hashes of rows, without their ids."""
    prompts: set[int] = field(default_factory=set)
    """The hashes of prompts."""
    row_texts: set[int] = field(default_factory=set)
    """The hashes of what rows say, of worded ones."""

    def add(self, record: Record) -> int:
        """Count a record, and return the hash of its prompt (of a document, of its text)."""
        self.rows += 1
        prompt = prompt_hash(record)
        if not isinstance(record, Document):
            self.prompts.add(prompt)
        if (text := getattr(record, "row_text", None)) is not None:
            self.row_texts.add(hash64(prompt_key(text)))
        content = [value for name, value in vars(record).items() if name not in ("id", "extra")]
        self.different.add(hash64(repr(content)))
        return prompt

    def report(self, report: Report, duplicates: int) -> None:
        """Report equal rows, and rows with a prompt that came before.

        Args:
            report: Where the fact goes.
            duplicates: Prompts that reading has left out.
        """
        if report.kind in PROMPT_KINDS:
            report.add("duplicates", f"{duplicates:,} prompts, left out")
            return
        text = f"{self.rows - len(self.different):,} rows"
        if report.kind != "documents":
            text += f" · {self.rows - len(self.prompts):,} prompts that came before"
        report.add("duplicates", text + ", kept")


def prompt_hash(record: Record) -> int:
    """Return a hash that is equal for equal prompts; of a document that of its text."""
    return hash64(record.text if isinstance(record, Document) else prompt_key(record.prompt))


def own_hashes(record: Record) -> set[int]:
    """Return the hash of a prompt and, if it is worded, that of what its row says.

    Two prompts that share one of them are copies: a row in two wordings, or with other rows before
    it, asks the same.
    """
    if isinstance(record, Document):
        return {prompt_hash(record)}
    return {prompt_hash(record), hash64(prompt_key(own_text(record)))}


@dataclass(frozen=True)
class Compared:
    """Hold two sources whose prompts are compared."""

    found: Found
    """Gives (location, record) of this source from its beginning, whenever it is called."""
    prompts: set[int]
    """The hashes of its prompts, and of what its rows say."""
    other: OtherData
    """The other source."""
    other_kind: str
    """Its kind."""
    watch: Watch = unwatched
    """Shows how far comparing is."""


def add_shared_prompts(report: Report, compared: Compared, *, may_share: bool) -> None:
    """Report the prompts of this source that also occur in another one.

    Args:
        report: Where facts and errors go; it has the kind.
        compared: The sources.
        may_share: Whether both are training data, which may share prompts. Otherwise a shared
            prompt is an error, and near copies are counted too, for a person to judge.
    """
    other, rows_there = compared.other, 0
    shared: dict[int, str] = {}  # hash → where the other source has it
    with compared.watch(f"{other.source.name}: reading for its prompts") as note:
        theirs = Loaded(note=note)
        for location, record in stream(compared.other_kind, other.source, theirs):
            rows_there += 1
            shared |= dict.fromkeys(own_hashes(record) & compared.prompts, location)
    leaks: list[str] = []
    rows = leaked = 0
    with compared.watch(f"{report.name}: looking for prompts of {other.name}") as note:
        for location, record in compared.found(note):
            rows += 1
            copied = [shared[key] for key in own_hashes(record) if key in shared]
            if copied:
                leaked += 1
                if len(leaks) < MOST_LEAKS:
                    problem = f"this prompt is at {copied[0]} ({other.name}) too: a leak"
                    leaks.append(f"{location}: {problem}; remove it from one of the two")
    unread = f" ({len(theirs.errors):,} errors in it: check it too)" if theirs.errors else ""
    report.add(f"also in {other.name}", f"{leaked:,} of {rows:,} prompts{unread}")
    if may_share:
        return
    report.errors += leaks
    if leaked > MOST_LEAKS:
        report.errors.append(f"{report.name}: {leaked - MOST_LEAKS:,} more prompts are in {other.name} too")
    add_near_copies(report, compared, (rows, rows_there), set(shared))


def add_near_copies(report: Report, compared: Compared, rows: tuple[int, int], shared: set[int]) -> None:
    """Report the prompts of this source that are near copies of prompts of another one.

    Args:
        report: Where the fact goes.
        compared: The sources.
        rows: The number of records of this source, and of the other.
        shared: The hashes of prompts that both have, which are not counted.
    """
    other = compared.other
    ours = (item for item in compared.found(no_note) if not own_hashes(item[1]) & shared)
    near, first, done = 0, "", 0
    with compared.watch(f"{report.name}: looking for near copies of {other.name}") as note:
        while batch := list(islice(ours, AT_ONCE)):
            theirs = stream(compared.other_kind, other.source, Loaded())
            copied: set[int] = set()
            done_there = 0
            while others := list(islice(theirs, AT_ONCE)):
                nearest = nearest_copies(_prompts(batch), _prompts(others))
                copies = [(i, copy) for i, copy in enumerate(nearest) if copy is not None]
                if copies and not first:
                    i, copy = copies[0]
                    first = f" · the first at {batch[i][0]}, of {others[copy][0]}"
                copied |= {i for i, _ in copies}
                done_there += len(others)
                note(done, (done + len(batch) * done_there / rows[1]) / rows[0])
            near += len(copied)
            done += len(batch)
    report.add("near copies", f"{near:,} of {rows[0]:,} prompts are near copies of prompts in {other.name}{first}")


def _prompts(items: Iterable[tuple[str, Record]]) -> list[str | tuple[dict, ...]]:
    """Return the prompts of (location, record); of worded ones what their rows say."""
    prompts: list[str | tuple[dict, ...]] = []
    for _, record in items:
        assert not isinstance(record, Document)
        prompts.append(own_text(record))
    return prompts
