"""Write what people said as rankings, and keep snapshots that the chain reads.

A snapshot never changes, so that labels that arrive while a stage trains change nothing. The link
`rankings.jsonl` names the one that `data.rankings: ranked` reads.
"""

import hashlib
import json
import os
import sqlite3
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.records import Ranking, to_json
from pipeline.errors import UserError
from pipeline.store import files
from stages.people.store.database import Database, open_existing, people_folder
from stages.people.store.rows import (
    Assignment,
    Labeler,
    Task,
    Verdict,
    assignment_of,
    read_labelers,
    read_task,
    verdict_of,
)

FOLDER = "ranked"
"""Folder of the snapshots, below that of what people said."""
LINK = "rankings.jsonl"
"""Link to the snapshot in use."""
TRAINED = ("first", "overlap")
"""Reasons of assignments whose rankings train something: repetitions and known answers do not."""


@dataclass(frozen=True)
class Counts:
    """How many rankings there are."""

    rankings: int
    """Rankings in the snapshot in use; 0 without one."""
    now: int
    """Rankings that a snapshot taken now would have."""
    new: int
    """Those of them that are not in the one in use, or say something else there."""
    gone: int
    """Rankings in the one in use that say something else by now, or are excluded."""
    labelers: int
    """Labelers of all of them."""


def rankings(connection: sqlite3.Connection, skipped: bool = False) -> Iterator[Ranking]:
    """Yield what people said, one ranking a labeler and task, in the order of assignments.

    Rows that the lead excludes, repetitions and tasks with a known answer are left out.

    Args:
        connection: Inside a transaction.
        skipped: Whether to yield skipped tasks, without ranks.
    """
    labelers = read_labelers(connection)
    reasons = ", ".join("?" for _ in TRAINED)
    rows = connection.execute(  # one at a time: there may be more than the memory holds
        f"""SELECT a.* FROM assignments a JOIN verdicts v ON v.assignment_id = a.id
            WHERE v.accepted <> 'excluded' AND a.reason IN ({reasons}) AND (v.skipped IS NULL OR ?) ORDER BY a.id""",
        (*TRAINED, skipped),
    )
    for row in rows:
        assignment = assignment_of(row)
        said = connection.execute("SELECT * FROM verdicts WHERE assignment_id = ?", (assignment.id,)).fetchone()
        task = read_task(connection, assignment.task_id)
        yield ranking_of(task, assignment, verdict_of(said), labelers[assignment.labeler_id])


def ranking_of(task: Task, assignment: Assignment, verdict: Verdict, labeler: Labeler) -> Ranking:
    """Return a verdict as a ranking; everything else that is known of it is under `meta`."""
    rank_of: dict[int, int] = {}
    better = 0
    for tier in verdict.tiers:  # competition ranks: 1, 2, 2, 4
        rank_of |= dict.fromkeys(tier, better + 1)
        better += len(tier)
    position = {answer.id: answer.position for answer in task.answers}
    meta: dict[str, Any] = {
        "task": task.uid,
        "assignment": assignment.id,
        "reason": assignment.reason,
        "order_shown": [position[answer] for answer in assignment.order_shown],
        "set_aside": [position[answer] for answer in verdict.set_aside],
        "likert": [verdict.likert.get(answer.id, {}).get("overall") for answer in task.answers],
        "flags": [verdict.likert.get(answer.id, {}).get("flags", {}) for answer in task.answers],
        "confidence": verdict.confidence,
        "note": verdict.note,
        "skipped": verdict.skipped,
        "seconds": round(assignment.seconds, 1),
        "made": round(verdict.made, 3),
        "accepted": verdict.accepted,
        "guidelines": assignment.guidelines,
        "models": [list(answer.models) for answer in task.answers],
        "sampling": task.source.get("policies"),
        "file": task.source.get("file"),
        "round": task.round,
    }
    if not verdict.likert:
        del meta["likert"], meta["flags"]
    return Ranking(
        id=f"{task.uid[:16]}-{labeler.code}",
        prompt=task.prompt if isinstance(task.prompt, str) else tuple(task.prompt),
        responses=tuple(answer.text for answer in task.answers),
        ranks=tuple(rank_of.get(answer.id) for answer in task.answers),
        labeler=labeler.code,
        finished=tuple(answer.finished for answer in task.answers),
        user_id=task.user_id,
        kind=task.kind,
        meta={key: value for key, value in meta.items() if value not in (None, "", [])},
    )


def lines_of(connection: sqlite3.Connection) -> list[bytes]:
    """Return the lines of a snapshot that would be taken now."""
    return [json.dumps(to_json(ranking), ensure_ascii=False).encode() + b"\n" for ranking in rankings(connection)]


def link_of(base: Path) -> Path:
    """Return the link to the snapshot in use, below an experiment's folder."""
    return people_folder(base) / FOLDER / LINK


def take(base: Path, name: str, database: Database | None = None) -> Path | None:
    """Take a snapshot of what people said, and let `ranked` mean it.

    Args:
        base: The experiment's folder.
        name: The experiment's name.
        database: Its database, if it is open; otherwise it is opened.

    Returns:
        The snapshot; None if nobody has ranked anything.
    """
    opened = database or open_existing(base, name)
    if opened is None:
        return None
    try:
        with opened.transaction() as connection:  # one at a time, also of several processes
            return write_snapshot(base, lines_of(connection))
    finally:
        if database is None:
            opened.close()


def current(base: Path, name: str) -> Path | None:
    """Return the snapshot in use; None without one.

    Raises:
        UserError: It is damaged.
    """
    link = link_of(base)
    if not link.is_symlink():
        return None
    path = link.parent / link.readlink()
    if not path.is_file() or path.name != name_of(path.read_bytes()):
        remedy = f"remove {link.name} beside it, and `rlhf rank -c CONFIG --snapshot` takes another"
        raise UserError(f"{path}: the snapshot of {name} is damaged or missing; put it back, or {remedy}")
    return path


def name_of(content: bytes) -> str:
    """Return the name of a snapshot."""
    return f"rankings-{hashlib.sha256(content).hexdigest()[:16]}.jsonl"


def first(base: Path, name: str) -> Path | None:
    """Return the snapshot in use; if there is none, take the first.

    Args:
        base: The experiment's folder.
        name: The experiment's name.

    Returns:
        The snapshot; None if nobody has ranked anything.
    """
    if (path := current(base, name)) is not None:
        return path
    opened = open_existing(base, name)
    if opened is None:
        return None
    try:
        with opened.transaction() as connection:
            if (path := current(base, name)) is not None:  # another process of this run took it
                return path
            return write_snapshot(base, lines_of(connection))
    finally:
        opened.close()


def write_snapshot(base: Path, lines: list[bytes]) -> Path | None:
    """Write a snapshot under its digest and point the link to it; None without a line."""
    if not lines:
        return None
    content = b"".join(lines)
    link = link_of(base)
    link.parent.mkdir(exist_ok=True)
    path = link.with_name(name_of(content))
    temporary = link.with_name(f".tmp-{os.getpid()}")
    if not path.exists() or path.read_bytes() != content:
        temporary.write_bytes(content)
        files.fsync_file(temporary)
        temporary.replace(path)
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(path.name)
    temporary.replace(link)
    files.fsync_folder(link.parent)
    return path


def count(base: Path, name: str) -> Counts | None:
    """Return how many rankings there are, and how many are new; None if nobody has ranked anything.

    Args:
        base: The experiment's folder.
        name: The experiment's name.
    """
    opened = open_existing(base, name)
    if opened is None:
        return None
    try:
        with opened.read() as connection:
            now = [comparable(line) for line in lines_of(connection)]
    finally:
        opened.close()
    link, used = link_of(base), Counter[str]()
    if link.exists():
        used = Counter(comparable(line) for line in link.read_bytes().splitlines())
    present = Counter(now)
    new, gone = present - used, used - present
    people = {json.loads(line)["labeler"] for line in now}
    return Counts(used.total(), present.total(), new.total(), gone.total(), len(people))


def comparable(line: bytes) -> str:
    """Return what a ranking says, without what the lead says of it."""
    row = json.loads(line)
    for key in ("accepted", "seconds"):
        row.get("meta", {}).pop(key, None)
    return json.dumps(row, sort_keys=True)


def status_lines(base: Path, experiment: Any) -> list[str]:
    """Return what `rlhf status` shows of rankings by people: one line, or none.

    Args:
        base: The experiment's folder.
        experiment: The validated experiment.
    """
    counts = count(base, experiment.name)
    if counts is None or not (counts.rankings or counts.new):
        return []
    value = experiment.data.rankings
    parts = value if isinstance(value, list) else [value]
    if "ranked" not in [getattr(part, "path", part) for part in parts]:
        return [f"ranked: people have made {counts.now:,} rankings; data.rankings: ranked trains on them"]
    people = f"{counts.labelers} labeler{'s' if counts.labelers != 1 else ''}"
    if not counts.rankings:
        return [f"ranked: {counts.new:,} rankings of {people}; the stage rankings takes them"]
    line = f"ranked: {counts.rankings:,} rankings in the snapshot that the chain reads"
    line += f"; {counts.new:,} are new or changed since" if counts.new else "; none is new since"
    line += f", and {counts.gone:,} are excluded or changed" if counts.gone else ""
    if counts.new or counts.gone:
        line += ": `rlhf rank -c CONFIG --snapshot` takes that in"
    return [line]


def require(base: Path, name: str) -> Path:
    """Take a snapshot.

    Raises:
        UserError: Nobody has ranked anything.
    """
    path = take(base, name)
    if path is None:
        raise UserError(f"{people_folder(base)}: nobody has ranked anything yet; `rlhf rank -c CONFIG` opens the page")
    return path
