"""Put tasks into the database: a prompt with its answers, identical texts merged."""

import hashlib
import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from data.records import as_messages
from stages.people.store.database import dumps

MOST_ANSWERS = 9
"""Answers of a task: as many as there are number keys."""


@dataclass(frozen=True)
class Given:
    """An answer as a model, a file or a person gave it."""

    text: str
    """The answer."""
    finished: bool = True
    """Whether it ended by itself."""
    model: str = ""
    """Who gave it; never shown to labelers."""
    settings: dict[str, Any] = field(default_factory=dict)
    """How it was sampled."""


@dataclass(frozen=True)
class Merged:
    """An answer with all that gave it."""

    text: str
    """The answer."""
    finished: bool
    """Whether it ended by itself."""
    models: list[str]
    """All who gave it, each once, in order."""
    settings: dict[str, dict[str, Any]]
    """How each of them sampled it."""
    position: int
    """Index of the first of them among the given answers."""


@dataclass(frozen=True)
class NewTask:
    """A task before it is in the database."""

    prompt: str | list[dict[str, str]]
    """A text, or messages."""
    answers: tuple[Given, ...]
    """The answers, repeated ones among them."""
    kind: str | None = None
    """What sort of prompt it is."""
    user_id: str | None = None
    """Who wrote the prompt."""
    known: tuple[int | None, ...] | None = None
    """The right rank of each answer, if it is known."""
    source: dict[str, Any] = field(default_factory=dict)
    """Where it comes from."""
    round: int = 1
    """Which round of collecting it belongs to."""


def merge(answers: Sequence[Given]) -> list[Merged]:
    """Return answers without repetitions, in their order.

    The same text once finished and once cut off is two answers: a model must not learn to end
    there.
    """
    merged: dict[tuple[str, bool], Merged] = {}
    for position, given in enumerate(answers):
        key = (given.text, given.finished)
        one = merged.setdefault(key, Merged(given.text, given.finished, [], {}, position))
        if given.model and given.model not in one.models:
            one.models.append(given.model)
            one.settings[given.model] = given.settings
    return list(merged.values())


def uid_of(task: NewTask, answers: Sequence[Merged]) -> str:
    """Return the digest of prompt, answers and models: 32 hexadecimal digits."""
    content = [as_messages(task.prompt), sorted([one.text, one.finished, sorted(one.models)] for one in answers)]
    if task.known is not None:
        content.append("known")
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def add_task(connection: sqlite3.Connection, task: NewTask, now: float) -> str:
    """Add a task.

    Args:
        connection: Inside a transaction.
        task: The task.
        now: The time.

    Returns:
        "added"; "same": it is there already; "alike": there are no two different answers.
    """
    answers = merge(task.answers)
    if len({one.text for one in answers}) < 2:
        return "alike"
    assert len(answers) <= MOST_ANSWERS, "checked where answers come in"
    uid = uid_of(task, answers)
    if connection.execute("SELECT 1 FROM tasks WHERE uid = ?", (uid,)).fetchone():
        return "same"
    known = None if task.known is None else dumps(known_tiers(task.known, answers))
    prompt = task.prompt if isinstance(task.prompt, str) else list(task.prompt)
    row = connection.execute(
        """INSERT INTO tasks(uid, prompt, kind, user_id, known, source, created, round)
           VALUES(?, ?, ?, ?, ?, ?, ?, ?)""",
        (uid, dumps(prompt), task.kind, task.user_id, known, dumps(task.source), now, task.round),
    )
    for position, one in enumerate(answers):
        connection.execute(
            """INSERT INTO answers(task_id, position, text, finished, models, model_settings)
               VALUES(?, ?, ?, ?, ?, ?)""",
            (row.lastrowid, position, one.text, one.finished, dumps(one.models), dumps(one.settings)),
        )
    return "added"


def known_tiers(ranks: Sequence[int | None], answers: Sequence[Merged]) -> list[list[int]]:
    """Return the tiers of positions that known ranks give; unranked answers are in none.

    Args:
        ranks: The rank of each given answer.
        answers: The merged answers.
    """
    tiers: dict[int, list[int]] = {}
    for position, one in enumerate(answers):
        rank = ranks[one.position]
        if rank is not None:
            tiers.setdefault(rank, []).append(position)
    return [tiers[rank] for rank in sorted(tiers)]
