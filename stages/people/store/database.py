"""Open people.sqlite: check it, change its tables behind a backup, and run transactions."""

import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.store import files
from stages.people.store.schema import STEPS, VERSION

FOLDER = "people"
"""Folder of what people said, below the experiment's."""
FILE = "people.sqlite"
"""Name of the database in it."""
PATIENCE = 10.0
"""Seconds that a transaction waits for another process."""


def people_folder(base: Path) -> Path:
    """Return the folder of what people said, below an experiment's folder."""
    return base / FOLDER


class Database:
    """Hold the connection to people.sqlite. Threads share it, one transaction at a time."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        """Build the database of an open connection; see `open_database`."""
        self.path = path
        self._connection = connection
        self._lock = threading.RLock()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Give the connection inside a transaction that is on the disk when the block ends.

        Raises:
            sqlite3.Error: It could not be written; then nothing of the block is kept.
        """
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """Give the connection for statements that all see one state of the file."""
        with self._lock:
            self._connection.execute("BEGIN")
            try:
                yield self._connection
            finally:
                self._connection.execute("COMMIT")

    @contextmanager
    def read_beside(self) -> Iterator[sqlite3.Connection]:
        """Give a connection of its own for a long read of one state, while others go on writing."""
        address = f"{self.path.absolute().as_uri()}?mode=ro"
        with closing(sqlite3.connect(address, uri=True, timeout=PATIENCE, isolation_level=None)) as connection:
            connection.row_factory = sqlite3.Row
            connection.execute("BEGIN")
            yield connection

    def close(self) -> None:
        """Close the file; the write-ahead log is merged into it."""
        with self._lock:
            self._connection.close()


def open_database(base: Path, name: str) -> Database:
    """Open the database of an experiment, and make it where there is none.

    Args:
        base: The experiment's folder.
        name: The experiment's name, which the file records.

    Raises:
        UserError: The file is damaged, of a newer version, or of another experiment. It is left as
            it is.
    """
    folder = people_folder(base)
    path = folder / FILE
    folder.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    if not is_new and not path.stat().st_size and (lost := held_something(folder)):
        raise damaged(path, f"it is empty, and {lost} says that it was not")
    if is_new:
        path.touch(mode=0o600)
        files.fsync_folder(folder)
    connection = connect(path)
    try:
        check(path, connection)
        upgrade(path, connection, name)
        check_name(path, connection, name)
    except BaseException:
        connection.close()
        raise
    return Database(path, connection)


def open_existing(base: Path, name: str) -> Database | None:
    """Open the database of an experiment; None if nobody has said anything yet."""
    return open_database(base, name) if (people_folder(base) / FILE).exists() else None


def held_something(folder: Path) -> str | None:
    """Return the name of what shows that an empty file has held something; None without a sign.

    A process that was killed while it made the file leaves an empty one and nothing else.
    """
    return next((name for name in ("ranked", "backups", "tokens.json") if (folder / name).exists()), None)


def connect(path: Path) -> sqlite3.Connection:
    """Return a connection whose commits survive a power cut."""
    # Transactions are begun by hand (isolation_level=None); threads take turns in `Database`.
    connection = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
    except sqlite3.DatabaseError as error:
        connection.close()
        raise damaged(path, str(error)) from None
    return connection


def damaged(path: Path, what: str) -> UserError:
    """Return the error of a file that cannot be trusted."""
    if "locked" in what:
        return UserError(f"{path}: another process writes to it ({what}); stop that one, or wait")
    backups = path.parent / "backups"
    copies = sorted(backups.glob("*.sqlite")) if backups.is_dir() else []
    remedy = f"put a copy back, such as {copies[-1]}" if copies else "put a copy of yours back"
    return UserError(
        f"{path}: the database is damaged ({what}); nothing was changed. Keep the file, its -wal and its -shm, and "
        f"{remedy}, or save what is readable with `sqlite3 {path.name} .recover`"
    )


def check(path: Path, connection: sqlite3.Connection) -> None:
    """Raise UserError if the file is damaged, or newer than this version of the program."""
    try:
        found = [row[0] for row in connection.execute("PRAGMA integrity_check(3)")]
        broken = connection.execute("PRAGMA foreign_key_check").fetchone()
        version = connection.execute("PRAGMA user_version").fetchone()[0]
    except sqlite3.DatabaseError as error:
        raise damaged(path, str(error)) from None
    if found != ["ok"]:
        raise damaged(path, "; ".join(found))
    if broken is not None:
        raise damaged(path, f"a row of {broken['table']} refers to nothing")
    if version > VERSION:
        raise UserError(
            f"{path}: its tables are of version {version}, and this program knows {VERSION}; install a newer version "
            f"of the program"
        )


def upgrade(path: Path, connection: sqlite3.Connection, name: str) -> None:
    """Bring the tables to today's version, after a backup of what is there.

    Args:
        path: The file.
        connection: The connection.
        name: The experiment, which a new file records.
    """
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version == VERSION:
        return
    if version > 0:
        backup(path, connection, f"version-{version}")
    connection.execute("BEGIN IMMEDIATE")
    try:
        now = connection.execute("PRAGMA user_version").fetchone()[0]  # another process may have been faster
        for step in range(now, VERSION):
            for statement in statements(STEPS[step]):
                connection.execute(statement)
        if now == 0:
            facts = {"experiment": name, "created": repr(time.time())}
            connection.executemany("INSERT INTO meta VALUES(?, ?)", list(facts.items()))
        connection.execute(f"PRAGMA user_version={VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def statements(script: str) -> list[str]:
    """Return the statements of a script, which end a line; `executescript` would commit them."""
    found, part = [], ""
    for line in script.splitlines(keepends=True):
        part += line
        if sqlite3.complete_statement(part):
            found.append(part)
            part = ""
    return found


def backup(path: Path, connection: sqlite3.Connection, why: str) -> Path:
    """Copy the whole database into the folder `backups` beside it.

    Args:
        path: The file.
        connection: The connection.
        why: A word for the copy's name.

    Returns:
        The copy; it is there whole or not at all.
    """
    folder = path.parent / "backups"
    folder.mkdir(exist_ok=True)
    copy = folder / f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{why}.sqlite"
    temporary = folder / f".tmp-{os.getpid()}.sqlite"
    temporary.unlink(missing_ok=True)
    with closing(sqlite3.connect(temporary)) as target:
        connection.backup(target)
    temporary.chmod(0o600)
    files.fsync_file(temporary)
    temporary.replace(copy)
    files.fsync_folder(folder)
    return copy


def check_name(path: Path, connection: sqlite3.Connection, name: str) -> None:
    """Raise UserError if the file belongs to another experiment."""
    row = connection.execute("SELECT value FROM meta WHERE key = 'experiment'").fetchone()
    if row is not None and row["value"] != name:
        raise UserError(f"{path}: belongs to the experiment {row['value']}, not to {name}; give it a folder of its own")


def dumps(value: Any) -> str:
    """Return a value as the JSON text of a column."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=True)
