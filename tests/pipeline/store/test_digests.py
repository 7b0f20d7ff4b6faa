"""Test digests: an unchanged file is read once, unless its times might hide a change."""

import hashlib
import json
import os
import threading
import time

import pytest

from pipeline.errors import UserError
from pipeline.store import digest_memory, digests, integrity
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


@pytest.mark.parametrize("content", ["", "{}", "{}\n \t\n\n{}\r\n\x0b\n", "\n" * 40 + "[1]"])
def test_rows_are_counted_in_the_reading_that_hashes(tmp_path, monkeypatch, content):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content.encode())
    monkeypatch.setattr(digests, "SOME_LINES", 4)
    monkeypatch.setattr(integrity, "sha256_file", None)  # a second reading
    rows = sum(1 for line in content.encode().split(b"\n") if line.strip())
    assert digests.read_file(file) == (sha256(content), rows)


# -- threads --------------------------------------------------------------------------------------


def test_threads_read_the_largest_first_and_answer_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(integrity, "WORTH_THREADS", 0)
    monkeypatch.setattr(integrity.os, "cpu_count", lambda: 2)
    names, started = ["a", "bbb", "cc"], []
    for name in names:
        (tmp_path / name).write_text(name)
    barrier = threading.Barrier(2, timeout=60)

    def read(path):
        started.append(path.name)
        if len(path.name) > 1:
            barrier.wait()  # two are read at a time, or this fails
        return path.name

    sizes = {tmp_path / name: len(name) for name in names}
    assert list(integrity.read_in_threads(read, sizes).items()) == [(tmp_path / name, name) for name in names]
    assert set(started[:2]) == {"bbb", "cc"}
    assert integrity.sha256_files(sizes) == {tmp_path / name: sha256(name) for name in names}
    (tmp_path / "cc").unlink()
    with pytest.raises(FileNotFoundError):
        integrity.read_in_threads(integrity.sha256_file, sizes)


# -- the memory -----------------------------------------------------------------------------------


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """Return a memory's path; times are distinct after 0.02 s."""
    monkeypatch.setattr(digests, "TIMESTAMP_STEP", 0.0)
    (tmp_path / "artifacts").mkdir()
    return tmp_path / "artifacts" / digest_memory.NAME


def write(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    time.sleep(0.02)
    return path


def test_a_later_command_reads_only_what_has_changed(memory, reads):
    inside, outside = write(memory.parent / "a" / "x.jsonl", "{}\n"), write(memory.parents[1] / "y", "y")
    first = Digests(memory)
    assert first.facts(inside).rows == 1 and first.facts(outside).sha256 == sha256("y") and first.sentences() == []
    reads.clear()
    second = Digests(memory)
    assert second.facts(inside) == first.facts(inside) and second.facts(outside) == first.facts(outside)
    assert reads == [] and second.sentences()[0].startswith("2 files, 4 B: digests remembered")
    stamp = outside.stat()
    write(outside, "z")
    os.utime(outside, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert Digests(memory).facts(outside).sha256 == sha256("z") and reads == [outside]
    moved = memory.parent.rename(memory.parents[1] / "elsewhere")
    assert Digests(moved / memory.name).facts(moved / "a" / "x.jsonl").rows == 1 and len(reads) == 1


def test_a_file_that_is_young_is_not_remembered(memory, monkeypatch):
    file = write(memory.parent / "x", "x")
    monkeypatch.setattr(digests, "TIMESTAMP_STEP", 2.0)
    Digests(memory).facts(file)
    assert not memory.exists()


def test_what_was_remembered_is_confirmed_by_reading(memory, reads):
    file = write(memory.parent / "x", "x")
    Digests(memory).facts(file)
    entry = digest_memory.load(memory)["x"]
    digest_memory.add(memory, {"x": entry._replace(facts=digest_memory.FileFacts("0" * 64, None))})
    command = Digests(memory)
    assert command.facts(file).sha256 == "0" * 64 and command.unread_bytes([file]) == 1
    assert command.confirm([file]) and command.facts(file).sha256 == sha256("x")
    reads.clear()
    assert not command.confirm([file]) and command.unread_bytes([file]) == 0 and reads == []
    assert Digests(memory).facts(file).sha256 == sha256("x") and reads == []


@pytest.mark.parametrize("content", ["", "{", "[]", "\0" * 99, '{"files": {}}', "sealed", "folder"])
def test_a_memory_that_cannot_be_used_costs_time_and_no_more(memory, reads, content):
    file = write(memory.parent / "x", "x")
    if content == "folder":
        memory.mkdir()
    elif content == "sealed":
        memory.write_text(json.dumps(integrity.seal({"files": {"x": [[1, 2], ["0", None]]}})))  # of another version
    else:
        memory.write_text(content)
    assert Digests(memory).facts(file).sha256 == sha256("x")
    assert Digests(memory).facts(file).sha256 == sha256("x")
    assert reads == ([file, file] if content == "folder" else [file])
    assert sorted(path.name for path in memory.parent.iterdir()) == [memory.name, "x"]


def test_a_folder_that_cannot_be_written_is_left_alone(memory, monkeypatch, reads):
    file = write(memory.parent / "x", "x")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(digest_memory.Path, "write_text", refuse)
    assert Digests(memory).facts(file).sha256 == sha256("x") and not memory.exists()
    assert Digests(memory.parent / "gone" / memory.name).facts(file).sha256 == sha256("x")


def test_commands_that_run_at_once_keep_each_others_entries(memory, monkeypatch):
    a, b = Digests(memory), Digests(memory)
    names = [write(memory.parent / name, name) for name in "xyz"]
    for command, file in zip((a, b, a), names, strict=True):
        command.facts(file)
    assert list(digest_memory.load(memory)) == ["x", "y", "z"]
    monkeypatch.setattr(digest_memory, "MOST_REMEMBERED", 2)
    a.facts(write(memory.parent / "w", "w"))
    assert list(digest_memory.load(memory)) == ["z", "w"]


def test_published_files_are_known_after_their_rename(memory, reads):
    source, target = memory.parent / "new", memory.parent / "there"
    write(source / "w", "w")
    command = Digests(memory)
    command.read([source / "w"])
    source.rename(target)
    command.moved(source, target, ["w"])
    reads.clear()
    assert command.facts(target / "w").sha256 == Digests(memory).facts(target / "w").sha256 == sha256("w")
    assert reads == []


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
