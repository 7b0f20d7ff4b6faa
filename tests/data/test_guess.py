"""Test the guess of a file's kind: prompts must not swallow data of other kinds."""

import json

import pytest

from data.check.guess import guess_kind
from data.check.inspect_file import check
from data.source import Source

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
LONG = "one sentence after the other , so that this may well be what somebody answered to the prompt . " * 2


def guessed(tmp_path, *rows, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return guess_kind(Source(path))


@pytest.mark.parametrize("row", ["a bare string is a document , but see below", {"text": "a"}])
def test_documents(tmp_path, row):
    assert guessed(tmp_path, row) == "documents"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a"},
        {"prompt": LONG, "user_id": "u1", "timestamp": "2026-01-01T00:00:00Z", "lang": "en", "tags": ["x", "y"]},
        {"instruction": "a", "category": "open"},
        {"messages": [USER]},
        {"data_source": "x", "prompt": [USER], "ability": "math", "reward_model": {"style": "rule"}},
        {"messages": [USER, ANSWER, USER][:1], "id": 3, "temperature": 0.5},
    ],
)
def test_prompts_with_short_facts_beside_them(tmp_path, row):
    assert guessed(tmp_path, row) == "prompts"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "answer_1": "b", "answer_2": "c"},
        {"prompt": "a", "text_a": LONG, "text_b": LONG},
        {"prompt": "a", "candidates": [{"text": "b"}, {"text": "c"}]},
        {"prompt": "a", "model_scores": 5},
        {"instruction": "a", "humanResponse": "b", "rating": 4},
        {"prompt": "a", "code": "line\nline"},
    ],
)
def test_rows_with_what_may_be_answers_are_of_no_known_kind(tmp_path, row):
    assert guessed(tmp_path, row) is None
    report = check(Source(tmp_path / "rows.jsonl"))
    assert "--kind prompts" in report.errors[0] and list(row)[1] in report.errors[0]
    assert check(Source(tmp_path / "rows.jsonl"), "prompts").errors == []


@pytest.mark.parametrize(
    "row, kind",
    [
        ({"prompt": "a", "response": "b", "chosen": "b", "rejected": "c"}, "rankings"),
        ({"prompt": "a", "completion": "b"}, "demonstrations"),
        ({"messages": [USER, ANSWER]}, "demonstrations"),
        ({"messages": [USER, ANSWER, ANSWER]}, "demonstrations"),
        ({"messages": [USER, ANSWER, USER]}, "demonstrations"),
        ({"prompt": "### Instruction:\na\n\n### Response:\n", "completion": "b"}, "demonstrations"),
        ({"text": "### Human: a### Assistant: b"}, "demonstrations"),
        ({"instruction": "a", "input": "", "output": "b"}, "demonstrations"),
    ],
)
def test_the_kind_that_asks_for_most_keys(tmp_path, row, kind):
    assert guessed(tmp_path, row) == kind


def test_the_name_of_the_file_decides_where_it_fits(tmp_path):
    row = {"prompt": "a", "completion": "b"}
    assert guessed(tmp_path, row, name="my-prompts.jsonl") == "prompts"
    assert guessed(tmp_path, row, name="my-rankings.jsonl") == "demonstrations"


@pytest.mark.parametrize("keys", [("positive", "negative"), ("pos", "neg"), ("good", "bad"), ("winning", "losing")])
def test_short_answers_under_names_of_praise_and_blame_are_no_facts_about_a_prompt(tmp_path, keys):
    assert guessed(tmp_path, {"prompt": "a", **dict.fromkeys(keys, "b")}) is None


@pytest.mark.parametrize("where", [{"lang": "zz"}, {"langg": "en"}])
def test_a_file_none_of_whose_rows_are_wanted_says_so(tmp_path, where):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b", "lang": "en"}) + "\n", encoding="utf-8")
    [line] = check(Source(path, where=where)).errors
    assert "rows.jsonl: no row has what where asks for" in line
