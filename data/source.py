"""Define where records come from and how they are read, and what reading gives."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.forms.form import Options
from data.progress import Note, no_note
from data.records import Record

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
    wordings: str | None = None
    """A file of wordings, by which the rows of a task become prompts and responses."""
    wording_choice: str = "one"
    """Whether a row gets one of them ("one") or all of them ("each")."""
    shots: int | None = None
    """The number of rows to show before a prompt; None for none."""
    shots_from: str | None = None
    """The file, folder or glob that they are drawn from; None for the source itself."""
    shots_as: str = "turns"
    """Whether they are turns before the prompt ("turns") or part of it ("text")."""
    wordings_sha256: str | None = None
    """What the file of wordings must hold; None if that does not matter."""
    shots_sha256: str | None = None
    """What the file of `shots_from` must hold; None if that does not matter."""
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
    wordings: Counter[str] = field(default_factory=Counter)
    """Wording → the number of rows that it was applied to."""
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
    differing: int = 0
    """Those of them whose rows have other values than the first one under the same keys (`answer`,
    …), as far as both are in one source."""
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
