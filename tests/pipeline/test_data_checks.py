"""Test when the data of stages is checked before anything runs."""

import json

import pytest

from pipeline.data_checks import MEMORY
from pipeline.errors import UserError
from tests.pipeline import fakes


@pytest.fixture
def checked(world, tmp_path):
    """Let two stages read documents, and return (the file, the sources that were checked)."""
    file, calls = tmp_path / "documents.jsonl", []
    file.write_text('{"text": "a"}\n')

    def check(kind, source, note):
        calls.append((kind, source.path.name, source.skip))
        note(1, 0.5)
        return [f"{source.path}:1: bad; correct it"] * ("bad" in source.path.read_text())

    for name in ("text", "fit"):
        fakes.change(world.stages, name, reads=lambda experiment: ["documents"], check_data=check)
    return file, calls


def test_a_file_is_read_once_before_anything_runs(world, checked):
    file, calls = checked
    file.write_text('{"text": "bad"}\n')
    with pytest.raises(UserError) as caught:
        world.run("page", f"data.documents={file}")
    assert caught.value.lines == [f"{file}:1: bad; correct it"]
    assert calls == [("documents", "documents.jsonl", 0)]
    assert world.store.manifest("text") is None and not world.store.base.exists()
    file.write_text('{"text": "good"}\n')
    world.run("page", f"data.documents={file}")
    assert len(calls) == 2


def test_what_was_found_right_is_not_read_again_by_later_commands(world, checked):
    file, calls = checked
    world.run("fit", f"data.documents={file}")
    world.run("page", f"data.documents={file}")  # text and fit are up to date
    world.run("fit", f"data.documents={file}", force=True)  # fit runs again, on the same file
    assert len(calls) == 1
    world.run("fit", f"data.documents={{path: {file}, skip: 1}}")  # it is read otherwise
    assert calls[1:] == [("documents", "documents.jsonl", 1)]
    file.write_text('{"text": "b"}\n')
    world.run("fit", f"data.documents={{path: {file}, skip: 1}}")
    assert len(calls) == 3
    memory = world.store.base / MEMORY
    memory.write_text("{")  # damaged: everything is checked again
    world.run("fit", f"data.documents={{path: {file}, skip: 1}}", force=True)
    assert len(calls) == 4 and len(json.loads(memory.read_text())) == 1


def test_every_part_of_a_mixture_is_checked(world, checked, tmp_path):
    file, calls = checked
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "bad"}\n')
    with pytest.raises(UserError) as caught:
        world.run("fit", f"data.documents=[{file}, {{path: {other}, weight: 2}}]")
    assert caught.value.lines == [f"{other}:1: bad; correct it"]
    assert [name for _, name, _ in calls] == ["documents.jsonl", "other.jsonl"]


def test_a_data_set_that_nobody_has_is_refused(world, checked, monkeypatch, tmp_path):
    """Without a network, a data set in this machine's cache is used, with a line that says so."""
    _, calls = checked
    monkeypatch.setattr("pipeline.store.hub.request_commit", lambda name: (None, ""))
    monkeypatch.setattr("pipeline.store.hub.cached_commits", lambda name: [])
    monkeypatch.setattr("pipeline.data_checks.cached_commits", lambda name: [])
    with pytest.raises(UserError) as caught:
        world.run("fit", "data.documents=org/name")
    (line,) = caught.value.lines
    assert line.startswith("data.documents: org/name: the Hub gave no answer, and ")
    monkeypatch.setattr("pipeline.store.hub.cached_commits", lambda name: ["a" * 40])
    world.run("fit", "data.documents=org/name")
    assert calls == [] and "continuing with the cached commit aaaaaaa" in world.console.text
