"""Test keys that change what a row means: errors unless they are read, ignored, or say nothing."""

import json

import pytest

from data.sources import Source, read

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
PLAIN = {"prompt": "a", "completion": "b"}


def loaded(tmp_path, kind, row, *ignore):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    return read(kind, Source(path, ignore=ignore))


@pytest.mark.parametrize(
    "row, key",
    [
        ({**PLAIN, "weight": 0.5}, "weight"),
        ({**PLAIN, "rejected_response": "c"}, "rejected_response"),
        ({**PLAIN, "images": ["1.png"]}, "images"),
        ({**PLAIN, "context": "c"}, "context"),
        ({**PLAIN, "generations": ["c", "d"]}, "generations"),
        ({"messages": [USER, ANSWER], "tools": [{"name": "f"}]}, "tools"),
        ({"messages": [USER, ANSWER], "chosen": "c"}, "chosen"),
        ({"messages": [USER, {**ANSWER, "reasoning_content": "r"}]}, "reasoning_content"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{"id": 1}]}]}, "tool_calls"),
        ({"messages": [USER, {**ANSWER, "refusal": "no"}]}, "refusal"),
        ({"messages": json.dumps([USER, {**ANSWER, "reasoning_content": "r"}])}, "reasoning_content"),
        ({"prompt": [USER], "completion": [{**ANSWER, "weight": 0}]}, "weight"),
        ({"instruction": "a", "output": "b", "videos": ["x"]}, "videos"),
        ({"question": "a", "answer": "b", "passage": "x"}, "passage"),
    ],
)
def test_such_a_key_is_refused_unless_it_is_ignored(tmp_path, row, key):
    [line] = loaded(tmp_path, "demonstrations", row).errors
    assert f"the key '{key}'" in line and f"ignore: [{key}]" in line
    assert len(loaded(tmp_path, "demonstrations", row, key).records) == 1


@pytest.mark.parametrize("nothing", [None, "", [], {}, "[]"])
def test_a_key_without_a_value_says_nothing(tmp_path, nothing):
    row = {"messages": [USER, {**ANSWER, "tool_calls": nothing}], "tools": nothing, "images": nothing}
    assert len(loaded(tmp_path, "demonstrations", row).records) == 1


@pytest.mark.parametrize("row", [{**PLAIN, "weight": 1}, {**PLAIN, "loss": True}, {**PLAIN, "meta": {"label": 0}}])
def test_a_weight_of_one_and_whatever_is_in_meta_change_nothing(tmp_path, row):
    assert len(loaded(tmp_path, "demonstrations", row).records) == 1


def test_marks_of_loss_are_read_in_conversations(tmp_path):
    row = {
        "messages": [USER, {**ANSWER, "weight": 0}, {**USER, "content": "c"}, {**ANSWER, "content": "d", "weight": 1}]
    }
    [record] = loaded(tmp_path, "demonstrations", row).records
    assert record.completion == "d" and record.learnt == ()


def test_prompts_need_their_context_but_no_labels(tmp_path):
    assert len(loaded(tmp_path, "prompts", {"prompt": "a", "answers": ["x"], "rank": 2}).records) == 1
    assert "'images'" in loaded(tmp_path, "prompts", {"prompt": "a", "images": ["1.png"]}).errors[0]
