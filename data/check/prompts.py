"""Report prompts that occur twice, in one file or in two."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from data.check.judgments import hash64
from data.check.report import OtherData, Report
from data.forms import PROMPT_KINDS
from data.near_copies import nearest_copies
from data.records import Document, Record, prompt_key
from data.sources import Loaded, Source, read, records

AT_ONCE = 20_000
"""Prompts that are compared with those of evaluation at once."""
Found = Callable[[], Iterator[tuple[str, Record]]]
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

    def add(self, record: Record) -> int:
        """Count a record, and return the hash of its prompt (of a document, of its text)."""
        self.rows += 1
        prompt = prompt_hash(record)
        if not isinstance(record, Document):
            self.prompts.add(prompt)
        content = [value for name, value in vars(record).items() if name != "id"]
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


def all_records(kind: str, source: Source, loaded: Loaded) -> Iterator[tuple[str, Record]]:
    """Yield (location, record) of a source; of a mixture those that it takes.

    Args:
        kind: The kind of data.
        source: The source.
        loaded: Gets its errors, complete when the records have ended.
    """
    if not source.parts:
        yield from records(kind, source, loaded)
        return
    whole = read(kind, source)
    loaded.errors += whole.errors
    yield from zip(whole.locations, whole.records, strict=True)


def add_shared_prompts(
    report: Report, found: Found, prompts: set[int], other: OtherData, other_kind: str, *, may_share: bool
) -> None:
    """Report the prompts of this source that also occur in another one.

    Args:
        report: Where facts and errors go; it has the kind.
        found: Returns (location, record) of this source from its beginning, whenever it is called.
        prompts: The hashes of its prompts.
        other: The other source.
        other_kind: Its kind.
        may_share: Whether both are training data, which may share prompts. Otherwise a shared
            prompt is an error, and near copies are counted too, for a person to judge.
    """
    shared: dict[int, str] = {}  # hash → where the other source has it
    theirs = Loaded()
    for location, record in all_records(other_kind, other.source, theirs):
        key = prompt_hash(record)
        if key in prompts:
            shared[key] = location
    leaks: list[str] = []
    rows = leaked = 0
    for location, record in found():
        rows += 1
        key = prompt_hash(record)
        if key in shared:
            leaked += 1
            if len(leaks) < MOST_LEAKS:
                problem = f"this prompt is at {shared[key]} ({other.name}) too: a leak"
                leaks.append(f"{location}: {problem}; remove it from one of the two")
    unread = f" ({len(theirs.errors):,} errors in it: check it too)" if theirs.errors else ""
    report.add(f"also in {other.name}", f"{leaked:,} of {rows:,} prompts{unread}")
    if may_share:
        return
    report.errors += leaks
    if leaked > MOST_LEAKS:
        report.errors.append(f"{report.name}: {leaked - MOST_LEAKS:,} more prompts are in {other.name} too")
    add_near_copies(report, found, rows, other_kind, other, set(shared))


def add_near_copies(
    report: Report, found: Found, rows: int, other_kind: str, other: OtherData, shared: set[int]
) -> None:
    """Report the prompts of this source that are near copies of prompts of another one.

    Args:
        report: Where the fact goes.
        found: As of `add_shared_prompts`.
        rows: Its number of records.
        other_kind: The kind of the other source.
        other: The other source.
        shared: The hashes of prompts that both have, which are not counted.
    """
    ours = (item for item in found() if prompt_hash(item[1]) not in shared)
    near, first = 0, ""
    while batch := list(islice(ours, AT_ONCE)):
        theirs = all_records(other_kind, other.source, Loaded())
        copied: set[int] = set()
        while others := list(islice(theirs, AT_ONCE)):
            nearest = nearest_copies(_prompts(batch), _prompts(others))
            copies = [(i, copy) for i, copy in enumerate(nearest) if copy is not None]
            if copies and not first:
                i, copy = copies[0]
                first = f" · the first at {batch[i][0]}, of {others[copy][0]}"
            copied |= {i for i, _ in copies}
        near += len(copied)
    report.add("near copies", f"{near:,} of {rows:,} prompts are near copies of prompts in {other.name}{first}")


def _prompts(items: Iterable[tuple[str, Record]]) -> list[str | tuple[dict, ...]]:
    """Return the prompts of (location, record)."""
    prompts: list[str | tuple[dict, ...]] = []
    for _, record in items:
        assert not isinstance(record, Document)
        prompts.append(record.prompt)
    return prompts
