"""Test keys that change what a row means: errors unless they are read, ignored, or say nothing."""

import json

import pytest

from data.source import Source
from data.sources import read

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


@pytest.mark.parametrize(
    "answer, context",
    [
        ({**ANSWER, "training": False}, {**ANSWER, "content": "d", "training": True}),
        ({**ANSWER, "loss_mask": 0}, {**ANSWER, "content": "d", "loss_mask": 1}),
    ],
)
def test_marks_of_loss_have_many_names(tmp_path, answer, context):
    [record] = loaded(tmp_path, "demonstrations", {"messages": [USER, answer, USER, context]}).records
    assert record.completion == "d" and record.learnt == ()


def test_a_mark_beside_a_pair_of_texts_is_the_answers(tmp_path):
    pairs = [{"input": "a", "output": "b", "output_with_loss": False}, {"input": "c", "output": "d"}]
    [record] = loaded(tmp_path, "demonstrations", {"conversation": pairs}).records
    assert record.completion == "d" and record.learnt == ()


@pytest.mark.parametrize("key, value", [("train_detail", [{"begin_offset": 0}]), ("masked", True)])
def test_a_part_of_an_answer_that_is_not_learnt_is_refused(tmp_path, key, value):
    [line] = loaded(tmp_path, "demonstrations", {"messages": [USER, {**ANSWER, key: value}]}).errors
    assert f"the key '{key}'" in line
    assert not loaded(tmp_path, "demonstrations", {"messages": [USER, {**ANSWER, key: None}]}).errors


@pytest.mark.parametrize(
    "key, bad, good", [("is_correct", False, True), ("feedback", "thumbs_down", "thumbs_up"), ("vote", -1, 1)]
)
def test_an_answer_that_is_said_to_be_bad_is_not_taught(tmp_path, key, bad, good):
    row = {**PLAIN, key: bad}
    [line] = loaded(tmp_path, "demonstrations", row).errors
    assert f"columns: {{label: {key}}}" in line
    assert len(loaded(tmp_path, "demonstrations", row, key).records) == 1
    assert len(loaded(tmp_path, "demonstrations", {**PLAIN, key: good}).records) == 1
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps({**PLAIN, key: good}) + "\n", encoding="utf-8")
    result = read("demonstrations", Source(path, columns={"label": key}))
    assert len(result.records) == 1 and sum(result.left_out.values()) == 1


def test_what_people_answered_in_argilla_is_not_lost(tmp_path):
    row = {"prompt": "a", "response": "b", "status": "completed", "rating.responses": [1]}
    [line] = loaded(tmp_path, "demonstrations", row).errors
    assert "'rating.responses'" in line and "Argilla" in line


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_a_conversation_without_messages_is_left_out(tmp_path, key):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({key: []}) + "\n" + json.dumps({key: [USER, ANSWER]}) + "\n", encoding="utf-8")
    result = read("demonstrations", Source(path))
    assert len(result.records) == 1 and result.left_out == {"a conversation without messages": 1}


@pytest.mark.parametrize(
    "row, later, word",
    [
        ({**PLAIN, "weight": 1}, {**PLAIN, "weight": 0}, "'weight'"),
        ({**PLAIN, "is_correct": True}, {**PLAIN, "is_correct": False}, "'is_correct'"),
        ({"prompt": "a", "completion": [ANSWER]}, {"prompt": "a", "completion": [{**ANSWER, "label": 0}]}, "'label'"),
        ({**PLAIN, "note": 1}, {**PLAIN, "sistem": "c"}, "'sistem'"),
    ],
)
def test_rows_with_the_keys_of_an_earlier_one_are_checked_too(tmp_path, row, later, word):
    """Check that what is known of a set of keys hides no value, and no other key."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in (row, row, later, row)), encoding="utf-8")
    [line] = read("demonstrations", Source(path)).errors
    assert line.startswith(f"{path}:3: ") and word in line


def test_keys_that_nobody_reads_are_counted_in_every_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{**PLAIN, "note": 1}, {"note": 2, **PLAIN}, {**PLAIN, "note": 3, "other": 4}, {**PLAIN, "note": 5}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert read("demonstrations", Source(path)).unread == {"note": 4, "other": 1}
