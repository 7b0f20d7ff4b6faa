"""Test how tasks of lm-eval are found and loaded, and what is refused."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # local_tasks

from local_tasks import FACTS, write_tasks

from pipeline.errors import UserError
from stages.external.tasks import load_tasks, problems_of_tasks, task_manager, unknown_tasks

pytest.importorskip("lm_eval")


@pytest.fixture
def tasks(tmp_path):
    return write_tasks(tmp_path / "tasks")


def load(names, folder):
    """Load tasks, and return the names of tasks and groups."""
    loaded = load_tasks(task_manager(names, str(folder)), names, str(folder))
    return set(loaded["tasks"]), set(loaded.get("groups", {}))


def test_a_folder_with_data_is_read_from_anywhere(tasks, tmp_path, monkeypatch):
    assert unknown_tasks(["tiny_facts"], str(tasks)) == []
    assert load(["tiny_facts"], tasks) == ({"tiny_facts"}, set())
    monkeypatch.chdir(tmp_path)
    assert load(["tiny_f*"], "tasks") == ({"tiny_facts"}, set()), "a relative path, and a pattern"
    (tmp_path / "facts.jsonl").write_text((tasks / "facts.jsonl").read_text())
    (tasks / "facts.jsonl").unlink()
    (tmp_path / "words.jsonl").write_text((tasks / "words.jsonl").read_text())
    assert load(["tiny_facts"], "tasks") == ({"tiny_facts"}, set()), "as lm-eval reads it"


def test_a_missing_data_file_is_named(tasks):
    (tasks / "facts.jsonl").unlink()
    lines = unknown_tasks(["tiny_facts"], str(tasks))
    assert any("facts.yaml: no data file facts.jsonl" in line for line in lines)
    with pytest.raises(UserError, match=r"no data file facts\.jsonl"):
        load(["tiny_facts"], tasks)


def test_broken_data_are_one_line(tasks):
    (tasks / "facts.jsonl").write_text('{"question": "what?"\n')
    with pytest.raises(UserError, match=r"lm_eval\.tasks: tiny_facts: cannot be loaded") as raised:
        load(["tiny_facts"], tasks)
    assert len(raised.value.lines) == 1 and "\n" not in raised.value.lines[0]


def test_everything_is_tried_before_anything_runs(tasks):
    assert problems_of_tasks(["tiny_facts"], str(tasks)) == []
    (tasks / "facts.jsonl").write_text("[")
    (line,) = problems_of_tasks(["tiny_facts"], str(tasks))
    assert "tiny_facts: cannot be loaded" in line


def test_data_of_the_hub_without_a_network(tasks, monkeypatch):
    import datasets

    def offline(*_, **__):
        raise ConnectionError("Couldn't reach 'nobody/nothing' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match=r"data of the Hub cannot be read .* --include-path"):
        load(["tiny_hub"], tasks)


@pytest.mark.slow  # it lists lm-eval's own tasks
def test_an_unknown_name_is_refused_with_its_neighbours(tasks):
    assert load(["tiny_all"], tasks) == ({"tiny_facts", "tiny_words"}, {"tiny_all"})
    (line,) = unknown_tasks(["tiny_fact", "tiny_all", "arc_easy"], str(tasks))
    assert line.startswith("lm_eval.tasks: 'tiny_fact' is no task of lm-eval") and "did you mean tiny_facts" in line
    (line,) = unknown_tasks(["qqqqqqqqqqqq"], None)
    assert "--include-path" in line


def test_a_yaml_file_is_a_task(tasks, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(FACTS.replace("tiny_facts", "mine"))
    assert load([str(path)], tasks)[0] == {"mine"}
