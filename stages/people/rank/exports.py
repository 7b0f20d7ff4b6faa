"""Write what people said, or the tasks, as files: rankings, Label Studio, Argilla."""

import sqlite3
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.check.command import Context
from data.check.config import Input
from data.progress import unwatched
from data.records import Ranking, jsonl_writer, write_jsonl
from data.source import Source
from data.tools import export
from pipeline.errors import UserError
from stages.people.rank.snapshots import rankings
from stages.people.store.database import Database
from stages.people.store.rows import read_task

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
        UserError: The place is taken, or has no folder to be in, or there is nothing to write.
    """
    if output.exists():
        raise UserError(f"{output}: exists; give another name, or remove it")
    if not (parent := output.absolute().parent).is_dir():
        raise UserError(f"{output}: there is no folder {parent}; make it first")
    if tool == "rankings":
        if output.suffix != ".jsonl":
            raise UserError(f"{output}: rankings are written as JSON lines; give a name that ends in .jsonl")
        count = write_rankings(database, output)
        return f"{output}: {count:,} rankings, skipped tasks without ranks among them"
    with tasks_file(database) as file:
        export.run([file], "rankings", export.Request(tool, output), None)
    return f"{output}: what people rank there comes back with `rlhf rank -c CONFIG --import EXPORT.json`"


def download(database: Database, tool: str, folder: Path) -> Path:
    """Write what a browser downloads, row by row: JSON lines of rankings, or a ZIP of tasks.

    Args:
        database: The database.
        tool: One of TOOLS.
        folder: An empty folder to write into.

    Returns:
        The file.

    Raises:
        UserError: There is nothing to write.
    """
    if tool == "rankings":
        path = folder / "rankings.jsonl"
        if not write_rankings(database, path):
            raise UserError("download: nobody has ranked anything yet that is not excluded; try again later")
        return path
    made = folder / tool
    with tasks_file(database) as file:
        context = Context.of(None, "artifacts", tokenizer=False, watch=unwatched)
        export.write([file], "rankings", export.Request(tool, made), context)
    path = folder / f"{tool}.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for part in sorted(made.iterdir()):
            archive.write(part, part.name)
    return path


def write_rankings(database: Database, output: Path) -> int:
    """Write what people said as JSON lines, skipped tasks too, and return the number of rows."""
    count = 0
    with database.read_beside() as connection, jsonl_writer(output) as write:
        for ranking in rankings(connection, skipped=True):
            write(ranking)
            count += 1
    return count


@contextmanager
def tasks_file(database: Database) -> Iterator[Input]:
    """Give a file of all tasks as rankings in which nothing is judged; it goes when the block ends.

    Raises:
        UserError: There are none.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tasks.jsonl"
        with database.read_beside() as connection:
            write_jsonl(file, tasks_as_rankings(connection))
        if not file.stat().st_size:
            raise UserError(f"{database.path}: has no tasks yet; `rlhf rank -c CONFIG --tasks-only` makes them")
        yield Input(Source(path=file, templated="keep"))


def tasks_as_rankings(connection: sqlite3.Connection) -> Iterator[Ranking]:
    """Yield the tasks as rankings in which nothing is judged, without those with a known answer."""
    for row in connection.execute("SELECT id FROM tasks WHERE known IS NULL ORDER BY id"):
        task = read_task(connection, row["id"])
        yield Ranking(
            id=task.uid[:16],
            prompt=task.prompt if isinstance(task.prompt, str) else tuple(task.prompt),
            responses=tuple(answer.text for answer in task.answers),
            ranks=(None,) * len(task.answers),
            finished=tuple(answer.finished for answer in task.answers),
        )
