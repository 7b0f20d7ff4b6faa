"""Files of answers, of known rankings, of guidelines and of questions."""

import json
from pathlib import Path

import pytest

from pipeline import api
from pipeline.errors import UserError
from stages.people.rank.answer_files import read_answer_tasks, read_known_tasks
from stages.people.rank.command import read_flags, rules_of
from stages.settings.rank import RankSettings, problems


def write(folder, *rows):
    path = folder / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_that_nobody_judged(tmp_path):
    path = write(
        tmp_path,
        {"prompt": "p", "responses": ["a", "b"], "models": ["m", "n"], "kind": "qa", "user_id": "u"},
        {"prompt": [{"role": "user", "content": "q"}], "responses": ["a", "b"], "finished": [True, False]},
    )
    one, two = read_answer_tasks(path, "rank.answers")
    assert [(given.text, given.model) for given in one.answers] == [("a", "m"), ("b", "n")]
    assert (one.kind, one.user_id, one.known) == ("qa", "u", None)
    assert two.prompt == [{"role": "user", "content": "q"}] and [given.finished for given in two.answers] == [
        True,
        False,
    ]


def test_judgments_in_a_file_are_not_read(tmp_path):
    path = write(
        tmp_path, {"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "c", "rejected": "d"}
    )
    assert [[given.text for given in task.answers] for task in read_answer_tasks(path, "k")] == [["a", "b"], ["c", "d"]]
    assert [task.known for task in read_known_tasks(path, "k")] == [(1, 2), (1, 2)]


def test_demonstrations_of_one_prompt_are_one_task(tmp_path):
    rows = [{"prompt": "p", "completion": "a"}, {"prompt": "q", "completion": "b"}, {"prompt": "p ", "completion": "c"}]
    tasks = read_answer_tasks(write(tmp_path, *rows), "k")
    assert [[given.text for given in task.answers] for task in tasks] == [["a", "c"], ["b"]]


@pytest.mark.parametrize(
    "rows, words",
    [
        ([{"prompt": "p", "responses": ["a", "b"], "models": ["m"]}], "a name for each response"),
        ([{"prompt": "p", "responses": ["a"]}], "at least 2 responses"),
        ([{"prompt": "", "responses": ["a", "b"]}], "'prompt' is blank"),
        ([{"prompt": "p", "responses": [str(k) for k in range(10)]}], "at most 9"),
        ([{"prompt": "p", "responses": ["a", "a"]}], "two different answers"),
        ([{"text": "a"}], "documents"),
        ([{"prompt": "p"}], "prompts"),
    ],
)
def test_mistakes_are_named(tmp_path, rows, words):
    with pytest.raises(UserError, match=words):
        read_answer_tasks(write(tmp_path, *rows), "rank.answers")


def test_known_rankings_must_know_something(tmp_path):
    with pytest.raises(UserError, match="no answer is known to be better"):
        read_known_tasks(write(tmp_path, {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 1]}), "rank.known")


def test_guidelines_and_questions(tmp_path):
    ours = rules_of(RankSettings(likert=True), 0)
    assert "Harmless" in ours.guidelines and len(ours.guidelines_digest) == 16 and len(ours.flags) >= 10
    assert rules_of(RankSettings(), 0).flags == () and rules_of(RankSettings(), 0).known_share == 0
    (tmp_path / "flags.yaml").write_text("false: Is it false?\n")
    with pytest.raises(UserError, match=r"rank\.flags"):  # YAML reads the name as a truth value
        read_flags(str(tmp_path / "flags.yaml"))
    (tmp_path / "flags.yaml").write_text("untrue: Is it false?\n")
    assert [(flag.name, flag.question) for flag in read_flags(str(tmp_path / "flags.yaml"))] == [
        ("untrue", "Is it false?")
    ]
    (tmp_path / "rules.md").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"rank\.guidelines"):
        rules_of(RankSettings(guidelines=str(tmp_path / "rules.md")), 0)


@pytest.mark.parametrize(
    "settings, words",
    [
        (["rank.guidelines=none.md"], "rank.guidelines: no such file"),
        (["rank.flags=none.yaml"], "rank.flags: has no effect without rank.likert"),
        (["rank.repeat=0.6", "rank.known_share=0.6"], "rank.repeat: with rank.known_share"),
        (["rank.policies=[]"], "rank.policies: names no policy"),
        (["rank.policies=[sft,sft]"], "names a policy twice"),
        (["rank.policies=[sft,ppo,dpo]", "rank.samples_per_prompt=2"], "cannot share 2 answers"),
        (["rank.response_length=64", "rank.max_length=64"], "leaves no room for a prompt"),
        (["rank.max_length=4096"], "more than the model's context"),
    ],
)
def test_settings_that_cannot_work_are_named(tmp_path, monkeypatch, settings, words):
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("name: a\n")
    assert any(words in line for line in problems(api.load_experiment("a.yaml", *settings)))
    assert problems(api.load_experiment("a.yaml")) == []
