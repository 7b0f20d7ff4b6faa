"""Test digests: an unchanged file is read once, unless its times might hide a change."""

import hashlib
import os
import time

import pytest

from pipeline.errors import UserError
from pipeline.store import digests
from pipeline.store.digests import Digests, code_sha256


@pytest.fixture
def reads(monkeypatch):
    """Return a list that collects the paths that are hashed from now on."""
    paths, read_file = [], digests.read_file
    monkeypatch.setattr(digests, "read_file", lambda path: (paths.append(path), read_file(path))[1])
    return paths


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def test_an_unchanged_file_is_read_once(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(digests, "TIMESTAMP_STEP", 0.0)
    file, known = tmp_path / "rows.jsonl", Digests()
    file.write_text("{}\n\n{}\n")
    time.sleep(0.02)
    facts = known.facts(file)
    assert facts.sha256 == sha256("{}\n\n{}\n") and facts.rows == 2
    assert known.facts(file) == facts and reads == [file]
    file.write_text("{}\n")
    assert known.facts(file).sha256 == sha256("{}\n") and len(reads) == 2


def test_a_new_file_is_read_again(tmp_path, reads):
    """A second write within the file system's clock tick can leave size and times as they were."""
    file, known = tmp_path / "notes.txt", Digests()
    file.write_text("a")
    known.facts(file)
    stamp = file.stat()
    file.write_text("b")
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert known.facts(file).sha256 == sha256("b") and known.facts(file).rows is None


def test_restored_contents_are_noticed(tmp_path):
    file, known = tmp_path / "a", Digests()
    file.write_text("a")
    stamp, before = file.stat(), known.facts(file)
    file.write_text("b")
    file.write_text("a")
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    after = known.facts(file)
    assert after.sha256 == before.sha256 and after.signature != before.signature


def test_hidden_files_of_a_folder_do_not_count(tmp_path):
    folder, known = tmp_path / "model", Digests()
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "a.bin").write_text("a")
    before = known.facts(folder)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "lock").write_text("")
    assert known.facts(folder) == before
    (folder / "deep" / "a.bin").rename(folder / "b.bin")
    assert known.facts(folder).sha256 != before.sha256


def test_an_unreadable_or_changing_file_is_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"gone: cannot be read \(No such file or directory\)"):
        Digests().facts(tmp_path / "gone")
    file = tmp_path / "growing"
    file.write_text("a")
    monkeypatch.setattr(digests, "read_file", lambda path: path.write_text("more"))
    with pytest.raises(UserError, match="growing: is being written; run again when that is done"):
        Digests().facts(file)


def test_the_digest_of_code_is_that_of_its_python_files(tmp_path):
    for name in ("a.py", "room/b.py", "room/__pycache__/b.pyc", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    before = code_sha256(tmp_path)
    for name in ("room/__pycache__/b.pyc", "README.md"):
        (tmp_path / name).write_text("other")
    assert code_sha256(tmp_path) == before
    (tmp_path / "room/b.py").write_text("other")
    assert code_sha256(tmp_path) != before
