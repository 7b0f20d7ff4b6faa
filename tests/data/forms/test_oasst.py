"""Test OpenAssistant's trees and flat tables: as rankings, demonstrations and prompts."""

import json

import pytest

from data.source import Source
from data.sources import read


def message(name, role, rank=None, parent=None, **fields):
    """Return a message of a tree, without its replies."""
    row = {"message_id": name, "parent_id": parent, "text": name, "role": role, "rank": rank, "user_id": f"u-{name}"}
    return {**row, "message_tree_id": "t", "tree_state": "ready_for_export", "deleted": False, "review_result": True,
            "lang": "en", **fields}  # fmt: skip


ROWS = [
    message("p", "prompter"),
    message("worse", "assistant", 1, "p"),
    message("best", "assistant", 0, "p"),
    message("deleted", "assistant", 2, "p", deleted=True),
    message("unreviewed", "assistant", 3, "p", review_result=None),
    message("spam", "assistant", 4, "p", labels={"name": ["quality", "spam"], "value": [0.2, 1.0], "count": [3, 3]}),
    message("last", "assistant", 5, "p", labels={"spam": {"value": 0.0, "count": 3}}),
    message("q", "prompter", None, "worse"),
    message("second", "assistant", 1, "q"),
    message("first", "assistant", 0, "q"),
    message("r", "prompter", None, "deleted"),
    message("lost", "assistant", 0, "r"),
]


def as_tree():
    """Return the same messages as one tree."""
    nodes = {row["message_id"]: {**row, "replies": []} for row in ROWS}
    for row in ROWS[1:]:
        nodes[row["parent_id"]]["replies"].append(nodes[row["message_id"]])
    return {"message_tree_id": "t", "tree_state": "ready_for_export", "prompt": nodes["p"]}


def loaded(tmp_path, rows, kind, **fields):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result = read(kind, Source(path, **fields))
    assert not result.errors
    return result


def texts(prompt):
    return [one["content"] for one in prompt]


FORMS = pytest.mark.parametrize("rows", [ROWS, [as_tree()]], ids=["flat", "tree"])


@FORMS
def test_rank_0_is_the_best_at_every_depth(tmp_path, rows):
    records = loaded(tmp_path, rows, "rankings").records
    assert [(texts(r.prompt), r.responses, r.ranks) for r in records] == [
        (["p"], ("worse", "best", "last"), (2, 1, 3)),
        (["p", "worse", "q"], ("second", "first"), (2, 1)),
    ]
    assert [r.prompt[-1]["role"] for r in records] == ["user", "user"]
    assert [r.user_id for r in records] == ["u-p", "u-q"]


@FORMS
def test_deleted_unreviewed_and_spam_messages_are_counted(tmp_path, rows):
    left_out = loaded(tmp_path, rows, "rankings").left_out
    assert sorted(left_out.values()) == [1, 1, 1]


@FORMS
def test_the_best_answers_are_demonstrations(tmp_path, rows):
    records = loaded(tmp_path, rows, "demonstrations").records
    assert [(texts(r.prompt), r.completion) for r in records] == [(["p"], "best"), (["p", "worse", "q"], "first")]


@FORMS
def test_every_message_of_a_user_is_a_prompt(tmp_path, rows):
    records = loaded(tmp_path, rows, "prompts").records
    assert [texts(r.prompt) for r in records] == [["p"], ["p", "worse", "q"]]


def test_a_message_without_its_parent_is_left_out(tmp_path):
    records = loaded(tmp_path, [*ROWS, message("x", "assistant", 0, "nobody")], "rankings")
    assert len(records.records) == 2 and sum(records.left_out.values()) == 4


def test_a_language_is_chosen_with_where(tmp_path):
    german = [{**row, "message_id": f"de-{row['message_id']}", "lang": "de"} for row in ROWS]
    german = [{**row, "parent_id": f"de-{row['parent_id']}" if row["parent_id"] else None} for row in german]
    records = loaded(tmp_path, [*ROWS, *german], "rankings", where={"lang": "de"}).records
    assert [r.user_id for r in records] == ["u-p", "u-q"]


def test_a_single_unranked_answer_is_a_demonstration_and_several_are_not(tmp_path):
    one = [message("p", "prompter"), message("a", "assistant", None, "p")]
    two = [message("q", "prompter"), *(message(name, "assistant", None, "q") for name in "bc")]
    result = loaded(tmp_path, [*one, *two], "demonstrations")
    assert [r.completion for r in result.records] == ["a"]
    assert sum(result.left_out.values()) == 1


@pytest.mark.parametrize("state", ["aborted_low_grade", "halted_by_moderator"])
def test_trees_that_were_given_up_are_left_out(tmp_path, state):
    stopped = [{**row, "tree_state": state, "message_id": f"s-{row['message_id']}"} for row in ROWS[:1]]
    assert len(loaded(tmp_path, [*ROWS, *stopped], "prompts").records) == 2
    tree = {**as_tree(), "tree_state": state}
    assert len(loaded(tmp_path, [as_tree(), tree], "rankings").records) == 2
