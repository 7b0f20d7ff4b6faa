"""Count how far the collection of rankings is."""

import sqlite3
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from stages.people.rank.assign import LIVE, MOST_SKIPS
from stages.people.rank.judged import Judged
from stages.people.rank.rules import Rules

DAYS = 14
"""Days that the page shows."""
DAY = 24 * 3600.0

OF_TASKS = f"""
SELECT t.uid, COALESCE(SUM(a.state = 'skipped'), 0) AS skips,
       COALESCE(SUM({LIVE} AND v.id IS NOT NULL AND v.accepted <> 'excluded'), 0) AS done
FROM tasks t LEFT JOIN assignments a ON a.task_id = t.id LEFT JOIN verdicts v ON v.assignment_id = a.id
WHERE t.known IS NULL GROUP BY t.id
"""
"""Of each task: how many labelers skipped it, and how many rankings of it count."""


def progress(connection: sqlite3.Connection, rules: Rules, judged: Sequence[Judged], now: float) -> dict[str, Any]:
    """Return how far the collection is.

    Args:
        connection: Inside a transaction.
        rules: The rules of the page: how many labelers a task is for.
        judged: What was judged.
        now: The time.

    Returns:
        {tasks, finished (with as many rankings as are wanted), given_up (skipped too often), wanted
        and made (rankings), open (tasks in somebody's hands), days: [{day, rankings}], decisions:
        {pending, accepted, excluded, sent_back, skipped}}.
    """
    counts = Counter[str]()
    for row in connection.execute(OF_TASKS):
        copies = rules.copies(row["uid"])
        counts["tasks"] += 1
        counts["wanted"] += copies
        counts["made"] += min(row["done"], copies)
        if row["done"] >= copies:
            counts["finished"] += 1
        elif row["skips"] >= MOST_SKIPS:
            counts["given_up"] += 1
    names = ("tasks", "finished", "given_up", "wanted", "made")
    is_open = connection.execute("SELECT COUNT(*) FROM assignments WHERE state = 'open'").fetchone()[0]
    return {
        **{name: counts[name] for name in names},
        "open": is_open,
        "days": days(judged, now),
        "decisions": decisions(judged),
    }


def decisions(judged: Iterable[Judged]) -> dict[str, int]:
    """Return how many rankings the lead has decided on in which way, and how many are skips."""
    counts = Counter("skipped" if row.skipped is not None else row.decision for row in judged)
    return {name: counts[name] for name in ("pending", "accepted", "excluded", "sent_back", "skipped")}


def days(judged: Iterable[Judged], now: float) -> list[dict[str, Any]]:
    """Return how many rankings were made on each of the last days, the oldest first."""
    made = Counter(day_of(row.made) for row in judged if row.skipped is None)
    dates = list(dict.fromkeys(day_of(now - DAY * back) for back in reversed(range(DAYS))))
    return [{"day": day, "rankings": made[day]} for day in dates]


def day_of(moment: float) -> str:
    """Return the local date of a time."""
    return time.strftime("%Y-%m-%d", time.localtime(moment))
