"""Do what the lead decides: accept, exclude or send back verdicts, stop a labeler."""

import sqlite3

from stages.people.web.errors import Refused

DECISIONS = ("accepted", "excluded", "sent_back", "pending")
LONGEST_MESSAGE = 1000
LARGEST_ID = 2**62


def judge(
    connection: sqlite3.Connection, verdict_id: int, decision: str, message: str = "", made: float | None = None
) -> None:
    """Accept a verdict, exclude it, send it back to its labeler, or leave it pending.

    A verdict that is sent back is excluded until the labeler has submitted it again.

    Args:
        connection: Inside a transaction.
        verdict_id: The verdict.
        decision: One of DECISIONS.
        message: What the lead writes with it; the labeler sees it with a task that is sent back.
        made: When the verdict that the lead has seen was made; None: whatever it says now.

    Raises:
        Refused: There is no such verdict or decision, or the labeler has changed it meanwhile.
    """
    check(decision)
    row = connection.execute("SELECT * FROM verdicts WHERE id = ?", (min(verdict_id, LARGEST_ID),)).fetchone()
    if row is None:
        raise Refused(404, "there is no such verdict; reload the page")
    if made is not None and made != row["made"]:
        raise Refused(409, "the labeler has changed this ranking meanwhile; look at it again")
    decide(connection, row, decision, message)


def judge_all(connection: sqlite3.Connection, labeler_id: int, decision: str, message: str = "") -> int:
    """Decide on all verdicts of a labeler at once.

    To accept touches only what is pending, so that single decisions stay; the others change all.

    Args:
        connection: Inside a transaction.
        labeler_id: The labeler.
        decision: One of DECISIONS.
        message: What the lead writes with it.

    Returns:
        How many verdicts have changed.

    Raises:
        Refused: There is no such labeler or decision.
    """
    check(decision)
    labeler_id = min(labeler_id, LARGEST_ID)
    if connection.execute("SELECT 1 FROM labelers WHERE id = ?", (labeler_id,)).fetchone() is None:
        raise Refused(404, "there is no such labeler; reload the page")
    rows = connection.execute(
        """SELECT v.* FROM verdicts v JOIN assignments a ON a.id = v.assignment_id
           WHERE a.labeler_id = ? ORDER BY v.id""",
        (labeler_id,),
    ).fetchall()
    changed = 0
    for row in rows:
        now = "sent_back" if row["sent_back"] else row["accepted"]
        if now != decision and (decision != "accepted" or now == "pending"):
            decide(connection, row, decision, message)
            changed += 1
    return changed


def check(decision: str) -> None:
    """Raise Refused if there is no such decision."""
    if decision not in DECISIONS:
        raise Refused(400, f"decision: {decision!r} is none of {', '.join(DECISIONS)}")


def decide(connection: sqlite3.Connection, verdict: sqlite3.Row, decision: str, message: str) -> None:
    """Store a decision on a verdict.

    An assignment that its labeler has opened again stays in the labeler's hands.
    """
    is_sent_back = decision == "sent_back"
    connection.execute(
        "UPDATE verdicts SET accepted = ?, sent_back = ?, message = ? WHERE id = ?",
        ("excluded" if is_sent_back else decision, is_sent_back, message, verdict["id"]),
    )
    state = "done" if verdict["skipped"] is None else "skipped"
    connection.execute(
        "UPDATE assignments SET state = ? WHERE id = ? AND state <> 'open'",
        ("sent_back" if is_sent_back else state, verdict["assignment_id"]),
    )


def set_labeler(connection: sqlite3.Connection, labeler_id: int, state: str) -> None:
    """Let a labeler have further tasks ("active") or not ("stopped").

    Raises:
        Refused: There is no such labeler or state.
    """
    if state not in ("active", "stopped"):
        raise Refused(400, f"state: {state!r} is neither active nor stopped")
    found = connection.execute("UPDATE labelers SET state = ? WHERE id = ?", (state, min(labeler_id, LARGEST_ID)))
    if not found.rowcount:
        raise Refused(404, "there is no such labeler; reload the page")
