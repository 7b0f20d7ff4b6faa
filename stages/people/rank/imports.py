"""Take rankings from outside into the database: labels of other tools, or of another machine."""

import hashlib
import secrets
import sqlite3
from collections import Counter
from pathlib import Path

from data.check.guess import without_tiers
from data.records import Ranking, prompt_key
from data.source import Source
from data.tools.export import TIERS as EXPORTED
from pipeline.errors import UserError
from stages.people.rank import assign, moves
from stages.people.rank.answer_files import ranking_task, read_records
from stages.people.rank.tasks import MOST_ANSWERS, add_task, merge, uid_of
from stages.people.store.database import Database, dumps
from stages.people.store.rows import Labeler, Task, read_task, read_tasks

NOBODY = "imported"
"""The labeler of rankings that name none."""


def import_rankings(database: Database, path: Path, tiers: tuple[str, ...], now: float) -> Counter[str]:
    """Add the rankings of a file of any form; a second time adds nothing.

    A ranking belongs to the task with its prompt and all of its answers, otherwise it makes one.

    Args:
        database: The database.
        path: The file.
        tiers: The names of buckets, the best first, if it is Label Studio's; none: those that our
            own export makes.
        now: The time.

    Returns:
        What became of the rankings → how many.

    Raises:
        UserError: With a line for every mistake in the file; nothing is added then.
    """
    source = Source(path=path, templated="keep", tiers=tiers or EXPORTED)
    rankings = list(read_records("rankings", source if tiers else without_tiers(source)))
    counts: Counter[str] = Counter()
    with database.transaction() as connection:
        by_prompt: dict[str, list[Task]] = {}
        for task in read_tasks(connection).values():
            by_prompt.setdefault(prompt_key(task.prompt), []).append(task)
        for place, ranking in rankings:
            if len({text for text in ranking.responses}) < 2 or all(rank is None for rank in ranking.ranks):
                counts["without a judgment of two answers"] += 1
                continue
            task = task_of(connection, ranking, path, place, by_prompt, now)
            counts[add_verdict(connection, task, ranking, now)] += 1
    return counts


def task_of(
    connection: sqlite3.Connection,
    ranking: Ranking,
    path: Path,
    place: str,
    by_prompt: dict[str, list[Task]],
    now: float,
) -> Task:
    """Return the task that a ranking judges; a new one where there is none."""
    texts, key = set(ranking.responses), prompt_key(ranking.prompt)
    for task in by_prompt.get(key, []):
        if texts <= {answer.text for answer in task.answers}:
            return task
    new = ranking_task(ranking, path, place)
    if len(merge(new.answers)) > MOST_ANSWERS:
        raise UserError(f"{place}: {len(ranking.responses)} answers; a task has at most {MOST_ANSWERS}")
    add_task(connection, new, now)
    row = connection.execute("SELECT id FROM tasks WHERE uid = ?", (uid_of(new, merge(new.answers)),)).fetchone()
    task = read_task(connection, row["id"])
    by_prompt.setdefault(key, []).append(task)
    return task


def add_verdict(connection: sqlite3.Connection, task: Task, ranking: Ranking, now: float) -> str:
    """Add what a ranking says as a verdict of its labeler, and return what became of it."""
    labeler = labeler_named(connection, ranking.labeler or NOBODY, now)
    before = connection.execute(
        "SELECT 1 FROM assignments WHERE task_id = ? AND labeler_id = ?", (task.id, labeler.id)
    ).fetchone()
    if before is not None:
        return "there already"
    tiers, aside = tiers_of(task, ranking)
    others = connection.execute("SELECT COUNT(*) FROM assignments WHERE task_id = ?", (task.id,)).fetchone()[0]
    row = connection.execute(
        """INSERT INTO assignments(task_id, labeler_id, order_shown, reason, state, opened, touched, closed, number)
           VALUES(?, ?, ?, ?, 'done', ?, ?, ?, ?)""",
        (
            task.id,
            labeler.id,
            dumps([answer.id for answer in task.answers]),
            "overlap" if others else "first",
            now,
            now,
            now,
            assign.next_number(connection, labeler.id),
        ),
    )
    connection.execute(
        "INSERT INTO verdicts(assignment_id, tiers, set_aside, likert, made) VALUES(?, ?, ?, '{}', ?)",
        (row.lastrowid, dumps(tiers), dumps(aside), now),
    )
    return "added"


def tiers_of(task: Task, ranking: Ranking) -> tuple[list[list[int]], list[int]]:
    """Return the tiers of a task that a ranking gives, and the answers that it does not judge."""
    rank_of: dict[tuple[str, bool], int] = {}
    for given, rank in zip(ranking.answers, ranking.ranks, strict=True):
        if rank is not None:
            rank_of[given] = min(rank, rank_of.get(given, rank))
    by_text = {text: rank for (text, _), rank in rank_of.items()}  # other tools do not keep `finished`
    tiers: dict[int, list[int]] = {}
    aside = []
    for answer in task.answers:
        rank = rank_of.get((answer.text, answer.finished), by_text.get(answer.text))
        if rank is None:
            aside.append(answer.id)
        else:
            tiers.setdefault(rank, []).append(answer.id)
    return [tiers[rank] for rank in sorted(tiers)], aside


def labeler_named(connection: sqlite3.Connection, name: str, now: float) -> Labeler:
    """Return the labeler with a code; a new one, whom no browser can be, where there is none."""
    code = name if moves.CODE.fullmatch(name) else f"x-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    row = connection.execute("SELECT * FROM labelers WHERE code = ? COLLATE NOCASE", (code,)).fetchone()
    if row is not None:
        return Labeler(row["id"], row["code"], row["name"], row["state"])
    new = connection.execute(
        "INSERT INTO labelers(code, name, key_hash, created) VALUES(?, ?, ?, ?)",
        (code, f"{code} (imported)", moves.hash_of(secrets.token_urlsafe(24)), now),
    )
    assert new.lastrowid is not None
    return Labeler(new.lastrowid, code, f"{code} (imported)", "active")
