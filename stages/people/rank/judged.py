"""Read what the lead's figures are made of: one record a ranking, without texts."""

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass

Tiers = tuple[tuple[int, ...], ...]
"""Ids of answers, the best tier first."""


def ranks_of(tiers: Tiers) -> dict[int, int]:
    """Return the tier of each answer in some tiers, from 0."""
    return {answer: number for number, tier in enumerate(tiers) for answer in tier}


@dataclass(frozen=True)
class Judged:
    """What one labeler said of one task."""

    assignment: int
    """Number of the assignment; later ones are larger."""
    labeler: int
    """Number of the labeler."""
    task: int
    """Number of the task."""
    reason: str
    """Why the labeler had it: first, overlap, repeat or known."""
    shown: tuple[int, ...]
    """Ids of the answers in the order in which they were shown."""
    tiers: Tiers
    """What the labeler ranked; empty if the task was skipped."""
    skipped: str | None
    """Why the whole task was skipped."""
    seconds: float
    """Seconds of work."""
    made: float
    """When, in seconds since 1970."""
    decision: str
    """What the lead says: pending, accepted, excluded or sent_back."""
    on_page: bool = True
    """Whether it was made on the page; imported ones have no order shown, and no seconds."""

    @property
    def counts(self) -> bool:
        """Return whether the lead has not excluded it."""
        return self.decision in ("pending", "accepted")

    @property
    def ranks(self) -> dict[int, int]:
        """Return the tier of each answer that was judged, from 0."""
        return ranks_of(self.tiers)


@dataclass(frozen=True)
class Facts:
    """What does not belong to one ranking."""

    lengths: Mapping[int, int]
    """Characters of each answer."""
    known: Mapping[int, Tiers]
    """The right tiers of each task with a known answer."""


READ = """
SELECT a.id, a.labeler_id, a.task_id, a.reason, a.order_shown, a.seconds,
       v.tiers, v.skipped, v.made, v.accepted, v.sent_back,
       EXISTS(SELECT 1 FROM moves m WHERE m.assignment_id = a.id) AS on_page
FROM assignments a JOIN verdicts v ON v.assignment_id = a.id ORDER BY a.id
"""


def read_judged(connection: sqlite3.Connection) -> list[Judged]:
    """Read all verdicts in the order in which their tasks were handed out."""
    return [judged_of(row) for row in connection.execute(READ)]


def judged_of(row: sqlite3.Row) -> Judged:
    """Return a row of READ as a record."""
    return Judged(
        assignment=row["id"],
        labeler=row["labeler_id"],
        task=row["task_id"],
        reason=row["reason"],
        shown=tuple(json.loads(row["order_shown"])),
        tiers=tuple(tuple(tier) for tier in json.loads(row["tiers"])),
        skipped=row["skipped"],
        seconds=row["seconds"],
        made=row["made"],
        decision="sent_back" if row["sent_back"] else row["accepted"],
        on_page=bool(row["on_page"]),
    )


def read_facts(connection: sqlite3.Connection) -> Facts:
    """Read the lengths of answers, and the known answers."""
    # Counted here: SQLite's LENGTH ends at the first NUL.
    lengths = {row["id"]: len(row["text"]) for row in connection.execute("SELECT id, text FROM answers")}
    known = {}
    for row in connection.execute("SELECT id, known FROM tasks WHERE known IS NOT NULL"):
        answers = connection.execute("SELECT id FROM answers WHERE task_id = ? ORDER BY position", (row["id"],))
        ids = [answer["id"] for answer in answers]
        known[row["id"]] = tuple(tuple(ids[position] for position in tier) for tier in json.loads(row["known"]))
    return Facts(lengths, known)
