"""Write what people said, or the tasks, as files: rankings, Label Studio, Argilla."""

import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

from data.check.config import Input
from data.records import Ranking, write_jsonl
from data.source import Source
from data.tools import export
from pipeline.errors import UserError
from stages.people.rank.snapshots import rankings
from stages.people.store.database import Database
from stages.people.store.rows import read_tasks

TOOLS = ("rankings", "labelstudio", "argilla")
"""What `rlhf rank --export` writes."""


def export_to(database: Database, tool: str, output: Path) -> str:
    """Write a file of rankings, or a folder of tasks for another tool.

    Args:
        database: The database.
        tool: One of TOOLS.
        output: The file (rankings) or folder, which must not exist.

    Returns:
        A line that says what was written.

    Raises:
        UserError: The place is taken, or there is nothing to write.
    """
    if output.exists():
        raise UserError(f"{output}: exists; give another name, or remove it")
    if tool == "rankings":
        if output.suffix != ".jsonl":
            raise UserError(f"{output}: rankings are written as JSON lines; give a name that ends in .jsonl")
        with database.read() as connection:
            rows = list(rankings(connection, skipped=True))
        write_jsonl(output, rows)
        return f"{output}: {len(rows):,} rankings, skipped tasks without ranks among them"
    with database.read() as connection:
        unjudged = list(tasks_as_rankings(connection))
    if not unjudged:
        raise UserError(f"{database.path}: has no tasks yet; `rlhf rank -c CONFIG --tasks-only` makes them")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tasks.jsonl"
        write_jsonl(file, unjudged)
        export.run([Input(Source(path=file, templated="keep"))], "rankings", export.Request(tool, output), None)
    return f"{output}: what people rank there comes back with `rlhf rank -c CONFIG --import EXPORT.json`"


def tasks_as_rankings(connection: sqlite3.Connection) -> Iterator[Ranking]:
    """Yield the tasks as rankings in which nothing is judged, without those with a known answer."""
    for task in read_tasks(connection).values():
        if task.known is None:
            yield Ranking(
                id=task.uid[:16],
                prompt=task.prompt if isinstance(task.prompt, str) else tuple(task.prompt),
                responses=tuple(answer.text for answer in task.answers),
                ranks=(None,) * len(task.answers),
                finished=tuple(answer.finished for answer in task.answers),
            )
