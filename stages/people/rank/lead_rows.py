"""Return single rankings as the lead's page shows them: a list, and one with everything."""

import json
import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

from stages.people.rank.rules import LETTERS
from stages.people.store.rows import Assignment, Verdict, assignment_of, read_task, verdict_of
from stages.people.web.errors import Refused

SHOWS = ("all", "pending", "accepted", "excluded", "sent_back", "skipped", "noted")
"""What the list can be narrowed to; noted: with a note of the labeler."""
PAGE = 20
"""Rows of one answer."""
OPENING = 160
"""Characters of a prompt in the list."""
LARGEST_ID = 2**62

CONDITIONS = {
    "all": "1",
    "pending": "v.accepted = 'pending' AND v.skipped IS NULL",
    "accepted": "v.accepted = 'accepted' AND v.skipped IS NULL",
    "excluded": "v.accepted = 'excluded' AND NOT v.sent_back",
    "sent_back": "v.sent_back",
    "skipped": "v.skipped IS NOT NULL",
    "noted": "v.note <> ''",
}
LIST = """
SELECT v.id AS verdict, a.id AS assignment FROM verdicts v JOIN assignments a ON a.id = v.assignment_id
WHERE (:labeler IS NULL OR a.labeler_id = :labeler) AND (:before IS NULL OR v.id < :before) AND {condition}
ORDER BY v.id DESC LIMIT :limit
"""


def list_rows(connection: sqlite3.Connection, labeler: int | None, show: str, before: int | None) -> dict[str, Any]:
    """Return a page of rankings, the newest first.

    Args:
        connection: Inside a transaction.
        labeler: Whose; None: everybody's.
        show: One of SHOWS.
        before: The id before which to begin; None: at the newest.

    Returns:
        {rows, more: the `before` of the next page, or None}.

    Raises:
        Refused: `show` is none of SHOWS.
    """
    if show not in CONDITIONS:
        raise Refused(400, f"show: {show!r} is none of {', '.join(SHOWS)}")
    limits = {"labeler": labeler, "before": before, "limit": PAGE + 1}
    found = connection.execute(LIST.format(condition=CONDITIONS[show]), limits).fetchall()
    rows = [short(connection, row["verdict"]) for row in found[:PAGE]]
    return {"rows": rows, "more": rows[-1]["id"] if len(found) > PAGE else None}


def short(connection: sqlite3.Connection, verdict_id: int) -> dict[str, Any]:
    """Return a ranking as a row of the list."""
    verdict, assignment = read(connection, verdict_id)
    row = connection.execute("SELECT prompt, kind FROM tasks WHERE id = ?", (assignment.task_id,)).fetchone()
    prompt = json.loads(row["prompt"])
    last = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return {
        "id": verdict.id,
        "labeler": code_of(connection, assignment.labeler_id),
        "number": assignment.number,
        "reason": assignment.reason,
        "kind": row["kind"],
        "opening": last[:OPENING],
        "order": order_in_letters(verdict, letters_of(assignment.order_shown)),
        "skipped": verdict.skipped,
        "seconds": assignment.seconds,
        "made": verdict.made,
        "decision": "sent_back" if verdict.sent_back else verdict.accepted,
        "message": verdict.message,
        "note": verdict.note,
    }


def whole(connection: sqlite3.Connection, verdict_id: int) -> dict[str, Any]:
    """Return a ranking with its conversation, its answers, and what others said of the task.

    Raises:
        Refused: There is no such verdict.
    """
    verdict, assignment = read(connection, verdict_id)
    task = read_task(connection, assignment.task_id)
    letters, answers = letters_of(assignment.order_shown), {answer.id: answer for answer in task.answers}
    places = place_of(verdict.tiers)
    known = {} if task.known is None else place_of([[task.answers[i].id for i in tier] for tier in task.known])
    others = connection.execute(
        """SELECT v.id FROM verdicts v JOIN assignments a ON a.id = v.assignment_id
           WHERE a.task_id = ? AND v.id <> ? ORDER BY v.id""",
        (task.id, verdict.id),
    )
    return {
        **short(connection, verdict_id),
        "prompt": [{"role": "user", "content": task.prompt}] if isinstance(task.prompt, str) else task.prompt,
        "answers": [
            {
                "label": letters[answer],
                "text": answers[answer].text,
                "models": list(answers[answer].models),
                "place": places.get(answer),
                "known": known.get(answer),
                "likert": verdict.likert.get(answer),
            }
            for answer in assignment.order_shown
        ],
        "confidence": verdict.confidence,
        "others": [beside(connection, row["id"], letters) for row in others],
    }


def beside(connection: sqlite3.Connection, verdict_id: int, letters: Mapping[int, str]) -> dict[str, Any]:
    """Return what another verdict says, in the letters of the one that is shown."""
    verdict, assignment = read(connection, verdict_id)
    return {
        "labeler": code_of(connection, assignment.labeler_id),
        "reason": assignment.reason,
        "order": order_in_letters(verdict, letters),
        "skipped": verdict.skipped,
        "decision": "sent_back" if verdict.sent_back else verdict.accepted,
    }


def read(connection: sqlite3.Connection, verdict_id: int) -> tuple[Verdict, Assignment]:
    """Read a verdict and its assignment.

    Raises:
        Refused: There is no such verdict.
    """
    row = connection.execute("SELECT * FROM verdicts WHERE id = ?", (min(verdict_id, LARGEST_ID),)).fetchone()
    if row is None:
        raise Refused(404, "there is no such verdict; reload the page")
    verdict = verdict_of(row)
    query = "SELECT * FROM assignments WHERE id = ?"
    return verdict, assignment_of(connection.execute(query, (verdict.assignment_id,)).fetchone())


def code_of(connection: sqlite3.Connection, labeler: int) -> str:
    """Return a labeler's code."""
    return str(connection.execute("SELECT code FROM labelers WHERE id = ?", (labeler,)).fetchone()["code"])


def letters_of(order_shown: Sequence[int]) -> dict[int, str]:
    """Return the letter under which each answer was shown."""
    return {answer: LETTERS[number] for number, answer in enumerate(order_shown)}


def place_of(tiers: Sequence[Sequence[int]]) -> dict[int, int]:
    """Return the place of each answer, from 1."""
    return {answer: number for number, tier in enumerate(tiers, 1) for answer in tier}


def order_in_letters(verdict: Verdict, letters: Mapping[int, str]) -> str:
    """Return what a verdict says in one line: "B, then A = C; cannot judge D"."""
    said = ", then ".join(" = ".join(sorted(letters[answer] for answer in tier)) for tier in verdict.tiers)
    if verdict.set_aside:
        said += ("; " if said else "") + "cannot judge " + ", ".join(sorted(letters[one] for one in verdict.set_aside))
    return said
