"""Test exports of Argilla and Label Studio."""

import json

import pytest

from data.source import Source
from data.sources import read


def loaded(tmp_path, *rows, kind="rankings", **fields):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read(kind, Source(path, **fields))


def ranks(result) -> list[tuple]:
    assert not result.errors
    return [record.ranks for record in result.records]


# ── Argilla ──────────────────────────────────────────────────────────────────────────────────────

FIELDS = {"prompt": "p", "response_1": "x", "response_2": "y"}
NESTED = {
    "id": "r1",
    "fields": FIELDS,
    "suggestions": {"ranking": {"value": ["response_2", "response_1"]}},
    "responses": {
        "ranking": [
            {"value": ["response_2", "response_1"], "user_id": "u1", "status": "submitted"},
            {"value": ["response_1", "response_2"], "user_id": "u2"},
            {"value": ["response_1", "response_2"], "user_id": "u3", "status": "discarded"},
        ],
        "comment": [{"value": "good", "user_id": "u1", "status": "submitted"}],
    },
}
FLAT = {
    "id": "r1",
    "status": "completed",
    "_server_id": None,
    **FIELDS,
    "ranking.responses": [["response_2", "response_1"], ["response_1", "response_2"], ["response_1", "response_2"]],
    "ranking.responses.users": ["u1", "u2", "u3"],
    "ranking.responses.status": ["submitted", "submitted", "discarded"],
    "ranking.suggestion": ["response_2", "response_1"],
}
OLDER = {
    **NESTED,
    "responses": [
        {"user_id": "u1", "status": "submitted", "values": {"ranking": {"value": [
            {"value": "response_2", "rank": 1}, {"value": "response_1", "rank": 2}]}}},
        {"user_id": "u2", "status": "submitted", "values": {"ranking": {"value": [
            {"value": "response_1", "rank": 1}, {"value": "response_2", "rank": 2}]}}},
        {"user_id": "u3", "status": "discarded", "values": {"ranking": {"value": [
            {"value": "response_1", "rank": 1}, {"value": "response_2", "rank": 2}]}}},
    ],
}  # fmt: skip
OLD_TABLE = {
    **FIELDS,
    "metadata": "{}",
    "external_id": None,
    "ranking": [
        {"user_id": "u1", "status": "submitted", "value": {"value": ["response_2", "response_1"], "rank": [1, 2]}},
        {"user_id": "u2", "status": "submitted", "value": {"value": ["response_1", "response_2"], "rank": [1, 2]}},
        {"user_id": "u3", "status": "discarded", "value": {"value": ["response_1", "response_2"], "rank": [1, 2]}},
    ],
}


@pytest.mark.parametrize("row", [NESTED, FLAT, OLDER, OLD_TABLE], ids=["nested", "flat", "older", "old table"])
def test_users_of_argilla_are_labelers_and_discarded_answers_do_not_count(tmp_path, row):
    result = loaded(tmp_path, row)
    assert ranks(result) == [(2, 1), (1, 2)]
    assert [record.labeler for record in result.records] == ["u1", "u2"]
    assert result.records[0].prompt == "p" and result.records[0].responses == ("x", "y")
    assert list(result.left_out.values()) == [1]


def test_ties_of_argilla_are_kept(tmp_path):
    tied = [{"value": "response_1", "rank": 1}, {"value": "response_2", "rank": 1}]
    row = {**NESTED, "responses": {"ranking": [{"value": tied, "user_id": "u1"}, NESTED["responses"]["ranking"][0]]}}
    assert ranks(loaded(tmp_path, row)) == [(1, 1), (2, 1)]


def test_a_record_that_nobody_answered_is_left_out(tmp_path):
    result = loaded(tmp_path, NESTED, {**NESTED, "id": "r2", "responses": {}})
    assert len(result.records) == 2 and sum(result.left_out.values()) == 2


def test_a_ranking_of_an_unknown_field_is_an_error(tmp_path):
    row = {**NESTED, "responses": {"ranking": [{"value": ["response_2", "response_9"], "user_id": "u1"}]}}
    [error] = loaded(tmp_path, row).errors
    assert "response_9" in error


# ── Label Studio ─────────────────────────────────────────────────────────────────────────────────

PAIR = {"prompt": "p", "answer1": "x", "answer2": "y"}
ITEMS = {"prompt": "p", "items": [{"id": "a", "body": "x"}, {"id": "b", "body": "y"}, {"id": "c", "title": "z"}]}


def task(data, *values, kind="ranker", number=7):
    """Return a task with an annotation for each (person, value, whether it was cancelled)."""
    annotations = []
    for person, value, cancelled in values:
        result = [{"type": kind, "from_name": "rank", "to_name": "items", "value": value}]
        annotations.append({"completed_by": person, "result": result, "was_cancelled": cancelled})
    return {"id": number, "annotations": annotations, "predictions": [], "data": data, "meta": {}}


def test_left_is_the_first_answer_and_cancelled_annotations_do_not_count(tmp_path):
    values = [(1, {"selected": "left"}, False), (2, {"selected": "right"}, False), (3, {"selected": "left"}, True)]
    result = loaded(tmp_path, task(PAIR, *values, kind="pairwise"))
    assert ranks(result) == [(1, 2), (2, 1)]
    assert [record.responses for record in result.records] == [("x", "y"), ("x", "y")]
    assert [record.labeler for record in result.records] == ["1", "2"]
    assert sum(result.left_out.values()) == 1


@pytest.mark.parametrize("data", [
    {"text": "p", "text1": "x", "text2": "y"},
    {"question": "p", "left": "x", "right": "y"},
    {"dialogue": "p", "model_a": "x", "model_b": "y"},
])  # fmt: skip
def test_other_names_of_the_two_sides(tmp_path, data):
    [record] = loaded(tmp_path, task(data, (1, {"selected": "left"}, False), kind="pairwise")).records
    assert (record.prompt, record.responses, record.ranks) == ("p", ("x", "y"), (1, 2))


def test_sides_that_cannot_be_told_are_named_with_columns(tmp_path):
    row = task({"prompt": "p", "ours": "x", "theirs": "y"}, (1, {"selected": "left"}, False), kind="pairwise")
    [error] = loaded(tmp_path, row).errors
    assert "columns" in error and "ours" in error
    columns = {"response_1": "data.ours", "response_2": "data.theirs"}
    assert ranks(loaded(tmp_path, row, columns=columns)) == [(1, 2)]


@pytest.mark.parametrize("value", [["b", "a"], {"rank": ["b", "a"]}])
def test_an_item_that_was_not_ranked_is_not_judged(tmp_path, value):
    [record] = loaded(tmp_path, task(ITEMS, (1, {"ranker": value}, False))).records
    assert (record.responses, record.ranks) == (("x", "y", "z"), (2, 1, None))


def test_buckets_need_tiers(tmp_path):
    first = task(ITEMS, (1, {"ranker": {"good": ["b"], "bad": ["a", "c"], "_": []}}, False))
    second = task(ITEMS, (1, {"ranker": {"good": ["a", "b"], "awful": ["c"], "_": []}}, False), number=8)
    [error] = loaded(tmp_path, first, second).errors
    assert all(name in error for name in ("tiers", "good", "bad", "awful"))
    assert ranks(loaded(tmp_path, first, second, tiers=("good", "bad", "awful"))) == [(2, 1, 2), (1, 1, 3)]
    assert ranks(loaded(tmp_path, first, tiers=("bad", "good"))) == [(1, 3, 1)]
    [error] = loaded(tmp_path, second, tiers=("good", "bad")).errors
    assert "awful" in error


def test_tiers_without_buckets_are_refused(tmp_path):
    in_order = task(ITEMS, (1, {"ranker": ["b", "a"]}, False))
    assert not loaded(tmp_path, in_order, tiers=("good", "bad")).errors  # the tool has them
    [error] = loaded(tmp_path, {"prompt": "p", "chosen": "x", "rejected": "y"}, tiers=("good", "bad")).errors
    assert "tiers: no row comes from a tool with buckets" in error


def test_no_name_and_no_address_of_a_labeler_gets_into_a_record(tmp_path):
    people = ["Ada.Lovelace@example.org", {"id": 5, "email": "bob@example.org", "first_name": "Bob"},
              {"email": "ada.lovelace@example.org", "first_name": "Ada"}]  # fmt: skip
    result = loaded(tmp_path, task(ITEMS, *((person, {"ranker": ["a", "b", "c"]}, False) for person in people)))
    assert not result.errors
    text = str(result.records).lower()
    assert "example.org" not in text and "lovelace" not in text and "bob" not in text
    first, second, third = (record.labeler for record in result.records)
    assert second == "5" and first == third and len(first) == 8


def test_prompts_of_tasks_need_no_tiers_and_no_annotation(tmp_path):
    rows = [task(ITEMS, (1, {"ranker": {"good": ["a"], "_": []}}, False)), task({**PAIR, "prompt": "q"})]
    result = loaded(tmp_path, *rows, kind="prompts")
    assert not result.errors and [record.prompt for record in result.records] == ["p", "q"]


def test_a_task_that_nobody_labeled_is_left_out(tmp_path):
    labeled = task(ITEMS, (1, {"ranker": ["a", "b", "c"]}, False))
    result = loaded(tmp_path, labeled, task(ITEMS, number=8))
    assert len(result.records) == 1 and sum(result.left_out.values()) == 1 and not result.errors


def test_the_names_of_a_comparison_say_which_answer_is_left(tmp_path):
    row = task(PAIR, (1, {"selected": "left"}, False), kind="pairwise")
    names = [key for key in PAIR if key != "prompt"]
    [forwards] = loaded(tmp_path, row).records
    row["annotations"][0]["result"][0]["to_name"] = ",".join(reversed(names))
    [backwards] = loaded(tmp_path, row).records
    assert backwards.responses == forwards.responses[::-1] and forwards.ranks == backwards.ranks == (1, 2)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "responses": ["x", "y"], "ranks": [1, 2], "labeler": "ann@x.org", "user_id": "ann@x.org"},
        {"instruction": "p", "output_1": "x", "output_2": "y", "preference": 1, "annotator": "ann@x.org"},
        {"info": {"post": "p"}, "summaries": [{"text": "x"}, {"text": "y"}], "choice": 0, "worker": "ann@x.org"},
        {**FLAT, "ranking.responses.users": ["ann@x.org"] * len(FLAT["ranking.responses.users"])},
    ],
    ids=["ours", "AlpacaFarm", "TL;DR", "Argilla"],
)
def test_no_address_gets_into_a_record_of_any_form(tmp_path, row):
    result = loaded(tmp_path, row)
    assert result.records and not result.errors
    assert "ann@x.org" not in str(result.records)
    assert len({record.labeler for record in result.records} - {None}) == 1
