"""people.sqlite: made, checked, named when damaged, backed up before its tables change."""

import sqlite3

import pytest

from pipeline.errors import UserError
from stages.people.rank.tasks import add_task
from stages.people.store import database, schema
from stages.people.store.database import open_database, open_existing, people_folder
from tests.people.conftest import task


def make(folder, tasks=300):
    opened = open_database(folder, "test")
    with opened.transaction() as connection:
        for number in range(tasks):
            add_task(connection, task(number), 0.0)
    opened.close()
    return people_folder(folder) / "people.sqlite"


def test_it_is_made_with_the_promised_settings(tmp_path):
    assert open_existing(tmp_path, "test") is None
    opened = open_database(tmp_path, "test")
    with opened.read() as connection:
        facts = [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "foreign_keys")]
        assert facts == ["wal", 1] and connection.execute("PRAGMA synchronous").fetchone()[0] == 2
        assert connection.execute("PRAGMA user_version").fetchone()[0] == schema.VERSION
    opened.close()
    assert (people_folder(tmp_path) / "people.sqlite").stat().st_mode & 0o777 == 0o600
    open_existing(tmp_path, "test").close()


def test_a_failed_transaction_leaves_nothing(tmp_path):
    opened = open_database(tmp_path, "test")
    with pytest.raises(RuntimeError), opened.transaction() as connection:
        add_task(connection, task(1), 0.0)
        raise RuntimeError
    with opened.transaction() as connection:
        assert connection.execute("SELECT COUNT(*) FROM tasks").fetchone()[0] == 0
    with pytest.raises(sqlite3.IntegrityError), opened.transaction() as connection:
        connection.execute("INSERT INTO moves(assignment_id, seq, kind, body, made) VALUES(9, 1, 'a', '{}', 0)")
    opened.close()


@pytest.mark.parametrize("where", [0, 30, 4096, 20_480])
def test_a_damaged_file_is_named_and_left_as_it_is(tmp_path, where):
    path = make(tmp_path)
    raw = bytearray(path.read_bytes())
    raw[where : where + 600] = b"\x5a" * 600
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"people\.sqlite: the database is damaged"):
        open_database(tmp_path, "test")
    assert path.read_bytes() == raw


def test_a_file_that_is_cut_off_is_named(tmp_path):
    path = make(tmp_path)
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(UserError, match="damaged"):
        open_database(tmp_path, "test")


@pytest.mark.parametrize("sign", ["ranked", "backups", "tokens.json"])
def test_a_file_that_lost_everything_is_not_begun_anew(tmp_path, sign):
    path = make(tmp_path)
    path.write_bytes(b"")
    open_database(tmp_path, "test").close()  # as after a kill while it was made: nothing says that it held anything
    path.write_bytes(b"")
    (path.parent / sign).mkdir()
    with pytest.raises(UserError, match=f"damaged .it is empty, and {sign}"):
        open_database(tmp_path, "test")
    assert path.read_bytes() == b""


def test_newer_tables_and_other_experiments_are_refused(tmp_path):
    path = make(tmp_path, 1)
    with pytest.raises(UserError, match="belongs to the experiment test, not to other"):
        open_database(tmp_path, "other")
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version={schema.VERSION + 1}")
    connection.close()
    with pytest.raises(UserError, match="newer version"):
        open_database(tmp_path, "test")


def test_a_backup_is_made_before_the_tables_change(tmp_path, monkeypatch):
    path = make(tmp_path, 3)
    steps = {**schema.STEPS, schema.VERSION: "ALTER TABLE tasks ADD COLUMN extra TEXT;"}
    monkeypatch.setattr(database, "STEPS", steps)
    monkeypatch.setattr(database, "VERSION", schema.VERSION + 1)
    opened = open_database(tmp_path, "test")
    with opened.read() as connection:
        assert connection.execute("SELECT extra FROM tasks").fetchall()[0]["extra"] is None
    opened.close()
    (copy,) = (path.parent / "backups").glob("*.sqlite")
    old = sqlite3.connect(copy)
    assert old.execute("SELECT COUNT(*) FROM tasks").fetchone()[0] == 3
    assert old.execute("PRAGMA user_version").fetchone()[0] == schema.VERSION
    with pytest.raises(sqlite3.OperationalError):
        old.execute("SELECT extra FROM tasks")


def test_a_change_that_fails_leaves_the_old_tables(tmp_path, monkeypatch):
    path = make(tmp_path, 3)
    broken = "ALTER TABLE tasks ADD COLUMN extra TEXT;\nINSERT INTO nowhere VALUES(1);"
    monkeypatch.setattr(database, "STEPS", {**schema.STEPS, schema.VERSION: broken})
    monkeypatch.setattr(database, "VERSION", schema.VERSION + 1)
    with pytest.raises(sqlite3.OperationalError):
        open_database(tmp_path, "test")
    monkeypatch.undo()
    opened = open_database(tmp_path, "test")
    with opened.read() as connection:
        assert len(connection.execute("SELECT * FROM tasks").fetchone()) == 9
    opened.close()
    assert list((path.parent / "backups").glob("*.sqlite"))
