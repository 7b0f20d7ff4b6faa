"""Define typed records of the rows of people.sqlite, and read them."""

import json
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Prompt = str | list[dict[str, str]]


@dataclass(frozen=True)
class Labeler:
    """A person who ranks."""

    id: int
    """Number in the database."""
    code: str
    """What the data call the person."""
    name: str
    """What the person is called on the lead's page; never in the data."""
    state: str
    """"active" or "stopped": the latter gets no more tasks."""


@dataclass(frozen=True)
class Answer:
    """One of a task's answers."""

    id: int
    """Number in the database."""
    position: int
    """Place in the task, from 0."""
    text: str
    """The answer."""
    finished: bool
    """Whether it ended by itself."""
    models: tuple[str, ...]
    """All models that gave this very text."""


@dataclass(frozen=True)
class Task:
    """A prompt with its answers."""

    id: int
    """Number in the database."""
    uid: str
    """Digest of prompt, answers and models."""
    prompt: Prompt
    """A text, or messages."""
    kind: str | None
    """What sort of prompt it is."""
    user_id: str | None
    """Who wrote the prompt."""
    known: list[list[int]] | None
    """Tiers of positions, where the right ranking is known."""
    source: dict[str, Any]
    """Models, sampling settings, and where the task comes from."""
    round: int
    """Which round of collecting it belongs to."""
    answers: tuple[Answer, ...]
    """The answers by position."""


@dataclass(frozen=True)
class Assignment:
    """A task in the hands of one labeler."""

    id: int
    """Number in the database."""
    task_id: int
    """The task."""
    labeler_id: int
    """The labeler."""
    order_shown: tuple[int, ...]
    """Ids of the answers in the order in which the labeler sees them."""
    reason: str
    """Why the labeler has it: first, overlap, repeat or known."""
    state: str
    """open, done, skipped, abandoned or sent_back."""
    opened: float
    """When it was handed out, in seconds since 1970."""
    touched: float
    """When the labeler last did something with it."""
    closed: float | None
    """When it was submitted or skipped."""
    seconds: float
    """Seconds of work, without idle time."""
    number: int
    """Running number of the labeler's assignments, from 1."""
    guidelines: str | None
    """Digest of the guidelines that were in view."""


@dataclass(frozen=True)
class Draft:
    """What a labeler has decided so far: the fold of the moves."""

    tiers: tuple[tuple[int, ...], ...] = ()
    """Ids of answers in as many slots as there are answers, the best first; some may be empty."""
    set_aside: tuple[int, ...] = ()
    """Ids of answers that cannot be judged."""
    likert: Mapping[int, dict[str, Any]] = field(default_factory=dict)
    """{id: {"overall": 1 to 7 or None, "flags": {name: bool}}}."""
    confidence: int | None = None
    """How sure the labeler is, 1 to 5."""
    note: str = ""
    """A note in the labeler's words."""

    def as_json(self) -> dict[str, Any]:
        """Return the draft as pages and columns hold it."""
        return {
            "tiers": [list(tier) for tier in self.tiers],
            "set_aside": list(self.set_aside),
            "likert": {str(answer): value for answer, value in self.likert.items()},
            "confidence": self.confidence,
            "note": self.note,
        }


@dataclass(frozen=True)
class Verdict:
    """What a labeler said of a task in the end."""

    id: int
    """Number in the database."""
    assignment_id: int
    """The assignment."""
    tiers: list[list[int]]
    """Ids of answers, the best tier first."""
    set_aside: list[int]
    """Ids of answers that cannot be judged."""
    skipped: str | None
    """Why the whole task was skipped; None if it was not."""
    likert: dict[int, dict[str, Any]]
    """{id: {"overall", "flags"}}."""
    confidence: int | None
    """How sure the labeler is, 1 to 5."""
    note: str
    """A note."""
    made: float
    """When, in seconds since 1970."""
    accepted: str
    """pending, accepted or excluded: what the lead says."""
    sent_back: bool = False
    """Whether the labeler shall look at it again; until then it is excluded."""
    message: str = ""
    """What the lead wrote with that; the labeler sees it with a task that is sent back."""


def labeler_of(row: sqlite3.Row) -> Labeler:
    """Return a row of `labelers` as a record."""
    return Labeler(row["id"], row["code"], row["name"], row["state"])


def assignment_of(row: sqlite3.Row) -> Assignment:
    """Return a row of `assignments` as a record."""
    names = ("id", "task_id", "labeler_id", "reason", "state", "opened", "touched", "closed", "seconds", "number")
    plain = {name: row[name] for name in names}
    return Assignment(**plain, order_shown=tuple(json.loads(row["order_shown"])), guidelines=row["guidelines"])


def verdict_of(row: sqlite3.Row) -> Verdict:
    """Return a row of `verdicts` as a record."""
    return Verdict(
        id=row["id"],
        assignment_id=row["assignment_id"],
        tiers=json.loads(row["tiers"]),
        set_aside=json.loads(row["set_aside"]),
        skipped=row["skipped"],
        likert={int(answer): value for answer, value in json.loads(row["likert"]).items()},
        confidence=row["confidence"],
        note=row["note"],
        made=row["made"],
        accepted=row["accepted"],
        sent_back=bool(row["sent_back"]),
        message=row["message"],
    )


def answer_of(row: sqlite3.Row) -> Answer:
    """Return a row of `answers` as a record."""
    models = tuple(json.loads(row["models"]))
    return Answer(row["id"], row["position"], row["text"], bool(row["finished"]), models)


def task_of(row: sqlite3.Row, answers: Iterable[sqlite3.Row]) -> Task:
    """Return a row of `tasks` with its answers as a record."""
    return Task(
        id=row["id"],
        uid=row["uid"],
        prompt=json.loads(row["prompt"]),
        kind=row["kind"],
        user_id=row["user_id"],
        known=None if row["known"] is None else json.loads(row["known"]),
        source=json.loads(row["source"]),
        round=row["round"],
        answers=tuple(answer_of(answer) for answer in answers),
    )


def read_task(connection: sqlite3.Connection, task_id: int) -> Task:
    """Read a task with its answers."""
    row = connection.execute("SELECT * FROM tasks WHERE id = ?", (task_id,)).fetchone()
    answers = connection.execute("SELECT * FROM answers WHERE task_id = ? ORDER BY position", (task_id,))
    return task_of(row, answers)


def read_tasks(connection: sqlite3.Connection) -> dict[int, Task]:
    """Read all tasks with their answers, by id in the order in which they were made."""
    answers: dict[int, list[sqlite3.Row]] = {}
    for row in connection.execute("SELECT * FROM answers ORDER BY task_id, position"):
        answers.setdefault(row["task_id"], []).append(row)
    return {
        row["id"]: task_of(row, answers.get(row["id"], []))
        for row in connection.execute("SELECT * FROM tasks ORDER BY id")
    }


def read_labelers(connection: sqlite3.Connection) -> dict[int, Labeler]:
    """Read all labelers by id."""
    return {row["id"]: labeler_of(row) for row in connection.execute("SELECT * FROM labelers ORDER BY id")}
