"""Do what a labeler asks for: join, move, submit, skip, look back. One transaction each.

Every function takes a connection inside a transaction, so that what a page was told is on the disk
once the transaction has ended.
"""

import hashlib
import json
import re
import secrets
import sqlite3
from typing import Any

from stages.people.rank import assign
from stages.people.rank.drafts import TRANSPARENT, Move, apply, effective, fold, missing
from stages.people.rank.rules import Rules
from stages.people.store.database import dumps
from stages.people.store.rows import Assignment, Draft, Labeler, labeler_of
from stages.people.web.errors import Refused, number_of, text_of

CODE = re.compile(r"[A-Za-z0-9_-]{1,24}")
KINDS = ("place", "same", "aside", "unaside", "likert", "flag", "confidence", "note", "undo", "tick")
"""Moves that a page may make."""
MOST_MOVES = 5_000
"""Moves of an assignment."""
MOST_JOINS = 200
"""Labelers who may join within a minute."""
LONGEST_REASON = 500
LONGEST_DAY = 24 * 3600 * 1000
HISTORY = 10
"""Assignments that a labeler can go back to."""
GAP = 300.0
"""Seconds without a move that count as a break."""


# -- labelers ------------------------------------------------------------------------------------


def join(connection: sqlite3.Connection, body: dict[str, Any], now: float) -> tuple[Labeler, str]:
    """Add a labeler.

    Args:
        connection: Inside a transaction.
        body: {name, code?}: what the lead sees, and what the data will say.
        now: The time.

    Returns:
        The labeler, and the key that the browser keeps; of it only a hash is stored.

    Raises:
        Refused: The code is taken or no code, or too many people join.
    """
    name = text_of(body, "name", 100)
    wanted = text_of(body, "code", 40, default="")
    recent = connection.execute("SELECT COUNT(*) FROM labelers WHERE created > ?", (now - 60,)).fetchone()[0]
    if recent >= MOST_JOINS:
        raise Refused(429, "too many people joined within a minute; try again in a minute")
    if wanted and not CODE.fullmatch(wanted):
        raise Refused(400, "code: use 1 to 24 letters, digits, - or _")
    if wanted and connection.execute("SELECT 1 FROM labelers WHERE code = ? COLLATE NOCASE", (wanted,)).fetchone():
        raise Refused(409, f"code: {wanted} is taken; choose another one")
    key = secrets.token_urlsafe(24)
    code = wanted or free_code(connection)
    row = connection.execute(
        "INSERT INTO labelers(code, name, key_hash, created) VALUES(?, ?, ?, ?)", (code, name, hash_of(key), now)
    )
    assert row.lastrowid is not None
    return Labeler(row.lastrowid, code, name, "active"), key


def free_code(connection: sqlite3.Connection) -> str:
    """Return the first code L1, L2, … that nobody has."""
    taken = {row["code"].upper() for row in connection.execute("SELECT code FROM labelers")}
    number = 1
    while f"L{number}" in taken:
        number += 1
    return f"L{number}"


def hash_of(key: str) -> str:
    """Return what is stored of a labeler's key, which is random: a plain hash is enough."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def find_labeler(connection: sqlite3.Connection, key: str, status: int = 401) -> Labeler:
    """Return the labeler with a key.

    Args:
        connection: Inside a transaction.
        key: The key.
        status: The status of the refusal if nobody has it.

    Raises:
        Refused: There is none.
    """
    row = connection.execute("SELECT * FROM labelers WHERE key_hash = ?", (hash_of(key),)).fetchone()
    if row is None:
        raise Refused(status, "nobody has joined with this key; give a name first", need="labeler")
    return labeler_of(row)


# -- moves ---------------------------------------------------------------------------------------


def own_assignment(connection: sqlite3.Connection, labeler: Labeler, assignment_id: int) -> Assignment:
    """Return an assignment of a labeler.

    Raises:
        Refused: It is somebody else's, or there is none.
    """
    row = connection.execute("SELECT labeler_id FROM assignments WHERE id = ?", (assignment_id,)).fetchone()
    if row is None or row["labeler_id"] != labeler.id:
        raise Refused(404, "this task is not yours; reload the page")
    return assign.read(connection, assignment_id)


def read_moves(connection: sqlite3.Connection, assignment_id: int) -> list[Move]:
    """Read the moves of an assignment in order."""
    rows = connection.execute("SELECT kind, body FROM moves WHERE assignment_id = ? ORDER BY seq", (assignment_id,))
    return [Move(row["kind"], json.loads(row["body"])) for row in rows]


def state_of(moves: list[Move], assignment: Assignment) -> dict[str, Any]:
    """Return what a page is told of a draft: {seq, draft, can_undo}."""
    draft = fold(moves, assignment.order_shown)
    return {"seq": len(moves), "draft": draft.as_json(), "can_undo": bool(effective(moves))}


def make_move(
    connection: sqlite3.Connection, labeler: Labeler, assignment_id: int, body: dict[str, Any], now: float
) -> dict[str, Any]:
    """Add a move of a labeler.

    Args:
        connection: Inside a transaction.
        labeler: The labeler.
        assignment_id: The assignment.
        body: {seq, kind, body, active_ms, idle_ms, id?}.
        now: The time.

    Returns:
        {seq, draft, can_undo, saved}.

    Raises:
        Refused: 409 with today's state if the page knows an older one; 400 for a senseless move.
    """
    assignment = own_assignment(connection, labeler, assignment_id)
    moves = read_moves(connection, assignment.id)
    if was_made(connection, assignment, body):
        return {**state_of(moves, assignment), "saved": now}
    kind, content = text_of(body, "kind", 20), body.get("body") or {}
    if kind not in KINDS or not isinstance(content, dict):
        raise Refused(400, f"{kind!r} is not a move; reload the page")
    seq = at_seq(body, moves, assignment)
    if assignment.state not in ("open", "abandoned"):
        raise Refused(409, "this task is closed; reopen it first", **state_of(moves, assignment))
    if len(moves) >= MOST_MOVES:
        raise Refused(429, f"this task has {MOST_MOVES:,} moves; submit or skip it")
    move = Move(kind, content)
    if kind not in ("undo", *TRANSPARENT):
        apply(fold(moves, assignment.order_shown), move, assignment.order_shown)  # refused before it is stored
    add_move(connection, assignment, seq, move, body, now)
    # Somebody who comes back to an abandoned task goes on with it, even if another has it now.
    connection.execute("UPDATE assignments SET state = 'open' WHERE id = ?", (assignment.id,))
    return {**state_of([*moves, move], assignment), "saved": now}


def was_made(connection: sqlite3.Connection, assignment: Assignment, body: dict[str, Any]) -> bool:
    """Return whether a page asks again for what is already done, because it missed the answer."""
    name = text_of(body, "id", 40, default="")
    if not name:
        return False
    row = connection.execute("SELECT 1 FROM moves WHERE assignment_id = ? AND client_id = ?", (assignment.id, name))
    return row.fetchone() is not None


def at_seq(body: dict[str, Any], moves: list[Move], assignment: Assignment) -> int:
    """Return the number of the next move.

    Raises:
        Refused: The page does not know the last one: another tab moved meanwhile.
    """
    if number_of(body, "seq", 0, 2**31) != len(moves):
        sentence = "this task has changed in another tab; this is what it looks like now"
        raise Refused(409, sentence, **state_of(moves, assignment))
    return len(moves) + 1


def add_move(
    connection: sqlite3.Connection, assignment: Assignment, seq: int, move: Move, body: dict[str, Any], now: float
) -> None:
    """Store a move, and count the seconds of work before it."""
    spent = {}
    for key in ("active_ms", "idle_ms"):
        given = body.get(key) or 0
        given = round(min(max(given, -1), 2 * LONGEST_DAY)) if isinstance(given, float) else given
        spent[key] = number_of({key: given}, key, 0, LONGEST_DAY)
    # Nobody works longer than the time since the last move; clocks of browsers are not trusted.
    worked = min(spent["active_ms"] / 1000, max(0.0, now - assignment.touched))
    connection.execute(
        "INSERT INTO moves(assignment_id, seq, kind, body, made, client_id) VALUES(?, ?, ?, ?, ?, ?)",
        (
            assignment.id,
            seq,
            move.kind,
            dumps({**move.body, **spent}),
            now,
            text_of(body, "id", 40, default="") or None,
        ),
    )
    connection.execute(
        "UPDATE assignments SET touched = ?, seconds = seconds + ? WHERE id = ?", (now, worked, assignment.id)
    )


# -- submit, skip, look back ---------------------------------------------------------------------


def submit(
    connection: sqlite3.Connection, labeler: Labeler, assignment_id: int, body: dict[str, Any], rules: Rules, now: float
) -> None:
    """Close an assignment with what its draft says.

    Raises:
        Refused: Something is missing, or the page knows an older state.
    """
    close(connection, labeler, assignment_id, body, "submit", None, rules, now)


def skip(
    connection: sqlite3.Connection, labeler: Labeler, assignment_id: int, body: dict[str, Any], rules: Rules, now: float
) -> None:
    """Close an assignment without a ranking, with the labeler's reason.

    Raises:
        Refused: There is no reason, or the page knows an older state.
    """
    reason = text_of(body, "reason", LONGEST_REASON)
    close(connection, labeler, assignment_id, body, "skip", reason, rules, now)


def close(
    connection: sqlite3.Connection,
    labeler: Labeler,
    assignment_id: int,
    body: dict[str, Any],
    kind: str,
    reason: str | None,
    rules: Rules,
    now: float,
) -> None:
    """Close an assignment and store its verdict, in place of an earlier one."""
    assignment = own_assignment(connection, labeler, assignment_id)
    if was_made(connection, assignment, body):
        return
    moves = read_moves(connection, assignment.id)
    seq = at_seq(body, moves, assignment)
    if assignment.state not in ("open", "abandoned"):
        raise Refused(409, "this task is closed already; reopen it first", **state_of(moves, assignment))
    draft = fold(moves, assignment.order_shown)
    if reason is None and (lacks := missing(draft, assignment.order_shown, rules.likert)) is not None:
        raise Refused(400, lacks)
    add_move(connection, assignment, seq, Move(kind, {} if reason is None else {"reason": reason}), body, now)
    store_verdict(connection, assignment.id, draft, reason, now)
    state = "done" if reason is None else "skipped"
    connection.execute("UPDATE assignments SET state = ?, closed = ? WHERE id = ?", (state, now, assignment.id))


def store_verdict(
    connection: sqlite3.Connection, assignment_id: int, draft: Draft, reason: str | None, now: float
) -> None:
    """Store what a labeler said; the lead looks at a changed verdict anew."""
    said = draft.as_json()
    tiers = [] if reason is not None else [tier for tier in said["tiers"] if tier]
    connection.execute(
        """INSERT INTO verdicts(assignment_id, tiers, set_aside, skipped, likert, confidence, note, made)
           VALUES(?, ?, ?, ?, ?, ?, ?, ?)
           ON CONFLICT(assignment_id) DO UPDATE SET tiers = excluded.tiers, set_aside = excluded.set_aside,
               skipped = excluded.skipped, likert = excluded.likert, confidence = excluded.confidence,
               note = excluded.note, made = excluded.made, accepted = 'pending', message = '', sent_back = 0""",
        (
            assignment_id,
            dumps(tiers),
            dumps(said["set_aside"]),
            reason,
            dumps(said["likert"]),
            said["confidence"],
            said["note"],
            now,
        ),
    )


def reopen(connection: sqlite3.Connection, labeler: Labeler, assignment_id: int, now: float) -> None:
    """Put a closed assignment back into its labeler's hands; its verdict counts until the next one.

    Raises:
        Refused: It is not among the labeler's last.
    """
    assignment = own_assignment(connection, labeler, assignment_id)
    if assignment.state == "open":
        assign.touch(connection, assignment.id, now)
        return
    if assignment.id not in [row["id"] for row in closed(connection, labeler)]:
        raise Refused(403, f"only your last {HISTORY} tasks can be opened again")
    count = connection.execute("SELECT COUNT(*) FROM moves WHERE assignment_id = ?", (assignment.id,)).fetchone()[0]
    connection.execute(
        "INSERT INTO moves(assignment_id, seq, kind, body, made) VALUES(?, ?, 'reopen', '{}', ?)",
        (assignment.id, count + 1, now),
    )
    assign.touch(connection, assignment.id, now)


def closed(connection: sqlite3.Connection, labeler: Labeler, limit: int = HISTORY) -> list[sqlite3.Row]:
    """Return the assignments that a labeler closed last, the newest first."""
    return connection.execute(
        """SELECT a.*, t.prompt, v.message FROM assignments a JOIN tasks t ON t.id = a.task_id
           LEFT JOIN verdicts v ON v.assignment_id = a.id
           WHERE a.labeler_id = ? AND a.closed IS NOT NULL AND a.state <> 'open'
           ORDER BY a.closed DESC, a.id DESC LIMIT ?""",
        (labeler.id, limit),
    ).fetchall()


# -- progress ------------------------------------------------------------------------------------


def progress(
    connection: sqlite3.Connection, labeler: Labeler, rules: Rules, left: int, now: float, day_began: float
) -> dict[str, Any]:
    """Return how far a labeler is.

    Args:
        connection: Inside a transaction.
        labeler: The labeler.
        rules: The rules.
        left: Further tasks for this labeler.
        now: The time.
        day_began: When today began.

    Returns:
        {done_today, done, left, break_due}.
    """
    query = "SELECT COUNT(*), COALESCE(SUM(closed >= ?), 0) FROM assignments WHERE labeler_id = ? AND state = 'done'"
    done, today = connection.execute(query, (day_began, labeler.id)).fetchone()
    due = rules.break_every > 0 and now - stretch_began(connection, labeler, rules, now) >= rules.break_every
    return {"done_today": today, "done": done, "left": left, "break_due": due}


def stretch_began(connection: sqlite3.Connection, labeler: Labeler, rules: Rules, now: float) -> float:
    """Return when a labeler began to work without a break."""
    rows = connection.execute(
        """SELECT m.made FROM moves m JOIN assignments a ON a.id = m.assignment_id
           WHERE a.labeler_id = ? AND m.made > ? ORDER BY m.made DESC""",
        (labeler.id, now - rules.break_every - 2 * GAP),
    )
    began = now
    for row in rows:
        if began - row["made"] > GAP:
            break
        began = row["made"]
    return began
