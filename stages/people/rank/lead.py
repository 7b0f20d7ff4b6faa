"""Do what the lead decides: accept, exclude or send back a verdict, stop a labeler."""

import sqlite3

from stages.people.web.errors import Refused

DECISIONS = ("accepted", "excluded", "sent_back", "pending")


def judge(connection: sqlite3.Connection, verdict_id: int, decision: str) -> None:
    """Accept a verdict, exclude it, send it back to its labeler, or leave it pending.

    A verdict that is sent back is excluded until the labeler has submitted it again.

    Raises:
        Refused: There is no such verdict or decision.
    """
    if decision not in DECISIONS:
        raise Refused(400, f"decision: {decision!r} is none of {', '.join(DECISIONS)}")
    row = connection.execute("SELECT * FROM verdicts WHERE id = ?", (min(verdict_id, 2**62),)).fetchone()
    if row is None:
        raise Refused(404, "there is no such verdict; reload the page")
    accepted = "excluded" if decision == "sent_back" else decision
    connection.execute("UPDATE verdicts SET accepted = ? WHERE id = ?", (accepted, row["id"]))
    state = "done" if row["skipped"] is None else "skipped"
    connection.execute(
        "UPDATE assignments SET state = ? WHERE id = ? AND state <> 'open'",
        ("sent_back" if decision == "sent_back" else state, row["assignment_id"]),
    )


def set_labeler(connection: sqlite3.Connection, labeler_id: int, state: str) -> None:
    """Let a labeler have further tasks ("active") or not ("stopped").

    Raises:
        Refused: There is no such labeler or state.
    """
    if state not in ("active", "stopped"):
        raise Refused(400, f"state: {state!r} is neither active nor stopped")
    found = connection.execute("UPDATE labelers SET state = ? WHERE id = ?", (state, min(labeler_id, 2**62)))
    if not found.rowcount:
        raise Refused(404, "there is no such labeler; reload the page")
