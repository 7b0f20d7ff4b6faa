"""Decide which task a labeler gets next, inside a transaction.

What is drawn depends on the seed and on the database alone, so that the same history leads to the
same next task.
"""

import random
import sqlite3
from collections.abc import Sequence

from data.streams import derive_seed
from stages.people.rank.rules import LARGEST, Rules
from stages.people.store.database import dumps
from stages.people.store.rows import Assignment, Labeler, assignment_of

MOST_SKIPS = 2
"""Labelers who skip a task before nobody gets it any more."""
REPEAT_DISTANCE = 5
"""Tasks between a ranking and its repetition, so that nobody ranks from memory."""

LIVE = """
a.reason IN ('first', 'overlap')
AND (a.state IN ('open', 'sent_back') OR (a.state = 'done' AND v.accepted <> 'excluded'))
"""
"""Whether an assignment a with a verdict v counts as work on its task."""
TAKEN = f"""
SELECT a.task_id, SUM({LIVE}) AS live, SUM(a.state = 'skipped') AS skips, SUM(a.labeler_id = ?) AS own
FROM assignments a LEFT JOIN verdicts v ON v.assignment_id = a.id GROUP BY a.task_id
"""
"""Of each task that anybody has had: who works on it or has ranked it, skips, and one's own."""
REPEATABLE = """
SELECT a.task_id FROM assignments a JOIN verdicts v ON v.assignment_id = a.id
WHERE a.labeler_id = :labeler AND a.state = 'done' AND a.reason IN ('first', 'overlap')
  AND v.skipped IS NULL AND a.number <= :latest
  AND NOT EXISTS (SELECT 1 FROM assignments b
                  WHERE b.labeler_id = :labeler AND b.task_id = a.task_id AND b.reason = 'repeat')
ORDER BY a.id
"""
KNOWN = """
SELECT t.id AS task_id FROM tasks t
WHERE t.known IS NOT NULL
  AND NOT EXISTS (SELECT 1 FROM assignments a WHERE a.task_id = t.id AND a.labeler_id = ?)
ORDER BY t.id
"""


def next_assignment(
    connection: sqlite3.Connection, labeler: Labeler, rules: Rules, now: float
) -> tuple[Assignment | None, int]:
    """Return what a labeler works on next, and how many further tasks there are for this labeler.

    That is what is open, then what the lead sent back, then what the labeler left and nobody took,
    then a new task.

    Args:
        connection: Inside a transaction.
        labeler: The labeler.
        rules: The rules.
        now: The time, in seconds since 1970.

    Returns:
        The assignment, or None if there is nothing left; and the number of tasks after it.
    """
    abandon(connection, rules, now)
    candidates = open_tasks(connection, labeler, rules)
    for state in ("open", "sent_back", "abandoned"):
        rows = connection.execute(
            """SELECT * FROM assignments WHERE labeler_id = ? AND state = ?
               ORDER BY touched DESC, closed IS NULL, id DESC""",
            (labeler.id, state),
        ).fetchall()
        for row in rows:
            if state == "abandoned" and not has_room(connection, row["task_id"], rules):
                continue
            if state != "open":
                touch(connection, row["id"], now)
            return read(connection, row["id"]), len(candidates)
    if labeler.state != "active" or not candidates:
        return None, len(candidates)
    number = next_number(connection, labeler.id)
    task_id, reason = choose(connection, labeler, rules, number, candidates)
    left = len(candidates) - (reason in ("first", "overlap"))
    return create(connection, labeler, rules, task_id=task_id, reason=reason, number=number, now=now), left


def next_number(connection: sqlite3.Connection, labeler_id: int) -> int:
    """Return the running number of a labeler's next assignment."""
    query = "SELECT COALESCE(MAX(number), 0) FROM assignments WHERE labeler_id = ?"
    return 1 + int(connection.execute(query, (labeler_id,)).fetchone()[0])


def abandon(connection: sqlite3.Connection, rules: Rules, now: float) -> None:
    """Free the tasks that nobody has touched for long.

    A task that was reopened to look at it again goes back to what was submitted. A touch far in the
    future is that of a clock that was wrong, and frees the task, too.
    """
    limit = now - rules.abandon_after
    connection.execute(
        """UPDATE assignments SET state = CASE
               WHEN id IN (SELECT assignment_id FROM verdicts WHERE sent_back) THEN 'sent_back'
               WHEN id IN (SELECT assignment_id FROM verdicts WHERE skipped IS NOT NULL) THEN 'skipped'
               WHEN id IN (SELECT assignment_id FROM verdicts) THEN 'done'
               ELSE 'abandoned' END
           WHERE state = 'open' AND (touched < ? OR touched > ?)""",
        (limit, now + rules.abandon_after),
    )


def open_tasks(connection: sqlite3.Connection, labeler: Labeler, rules: Rules) -> list[tuple[int, str]]:
    """Return (task, first or overlap) of each task that a labeler can get now, in their order."""
    taken = {row["task_id"]: row for row in connection.execute(TAKEN, (labeler.id,))}
    found = []
    for row in connection.execute("SELECT id, uid FROM tasks WHERE known IS NULL ORDER BY id"):
        before = taken.get(row["id"])
        if before is None:
            found.append((row["id"], "first"))
        elif not before["own"] and before["skips"] < MOST_SKIPS and (before["live"] or 0) < rules.copies(row["uid"]):
            found.append((row["id"], "overlap" if before["live"] else "first"))
    return found


def has_room(connection: sqlite3.Connection, task_id: int, rules: Rules) -> bool:
    """Return whether fewer labelers than are wanted work on a task or have ranked it."""
    task = connection.execute("SELECT uid, known FROM tasks WHERE id = ?", (task_id,)).fetchone()
    query = f"""SELECT COALESCE(SUM({LIVE}), 0) FROM assignments a
                LEFT JOIN verdicts v ON v.assignment_id = a.id WHERE a.task_id = ?"""
    live = connection.execute(query, (task_id,)).fetchone()[0]
    return task["known"] is not None or live < rules.copies(task["uid"])


def choose(
    connection: sqlite3.Connection, labeler: Labeler, rules: Rules, number: int, candidates: Sequence[tuple[int, str]]
) -> tuple[int, str]:
    """Choose a labeler's next task.

    Args:
        connection: Inside a transaction.
        labeler: The labeler.
        rules: The rules.
        number: The running number of the labeler's new assignment.
        candidates: (task, first or overlap) of ordinary tasks, at least one.

    Returns:
        (task, reason).
    """
    drawn = derive_seed(rules.seed, "reason", labeler.id, number) / LARGEST
    if drawn < rules.repeat:
        limits = {"labeler": labeler.id, "latest": number - 1 - REPEAT_DISTANCE}
        again = [row["task_id"] for row in connection.execute(REPEATABLE, limits)]
        if again:
            return again[derive_seed(rules.seed, "repeat", labeler.id, number) % len(again)], "repeat"
    elif drawn < rules.repeat + rules.known_share:
        known = [row["task_id"] for row in connection.execute(KNOWN, (labeler.id,))]
        if known:
            return known[derive_seed(rules.seed, "known", labeler.id, number) % len(known)], "known"
    return candidates[0]


def create(
    connection: sqlite3.Connection,
    labeler: Labeler,
    rules: Rules,
    *,
    task_id: int,
    reason: str,
    number: int,
    now: float,
) -> Assignment:
    """Hand a task to a labeler, its answers in an order of their own."""
    uid = connection.execute("SELECT uid FROM tasks WHERE id = ?", (task_id,)).fetchone()["uid"]
    rows = connection.execute("SELECT id FROM answers WHERE task_id = ? ORDER BY position", (task_id,))
    order = [row["id"] for row in rows]
    random.Random(derive_seed(rules.seed, "shown", uid, labeler.id, number)).shuffle(order)
    row = connection.execute(
        """INSERT INTO assignments(task_id, labeler_id, order_shown, reason, state, opened, touched, number, guidelines)
           VALUES(?, ?, ?, ?, 'open', ?, ?, ?, ?)""",
        (task_id, labeler.id, dumps(order), reason, now, now, number, rules.guidelines_digest),
    )
    assert row.lastrowid is not None
    return read(connection, row.lastrowid)


def touch(connection: sqlite3.Connection, assignment_id: int, now: float) -> None:
    """Put an assignment back into its labeler's hands."""
    connection.execute("UPDATE assignments SET state = 'open', touched = ? WHERE id = ?", (now, assignment_id))


def read(connection: sqlite3.Connection, assignment_id: int) -> Assignment:
    """Read an assignment that exists."""
    return assignment_of(connection.execute("SELECT * FROM assignments WHERE id = ?", (assignment_id,)).fetchone())
