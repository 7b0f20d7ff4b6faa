"""Test binary labels: what is marked as bad is no demonstration, and ranks below what is good."""

import json

import pytest

from data.check.guess import guess_kind
from data.source import Source
from data.sources import read


def pair(prompt, answer, mark):
    return {"prompt": prompt, "completion": answer, "label": mark}


def written(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


BOTH = [pair("p", "x", True), pair("p", "y", False), pair("q", "z", True), pair("q", "v", False), pair("p", "w", False)]


def test_only_good_answers_are_demonstrations_and_the_others_are_counted(tmp_path):
    result = read("demonstrations", Source(written(tmp_path, *BOTH)))
    assert [record.completion for record in result.records] == ["x", "z"] and result.errors == []
    assert list(result.left_out.values()) == [3]


def test_answers_to_one_prompt_are_ranked_good_above_bad(tmp_path):
    alone = pair("r", "u", True)
    result = read("rankings", Source(written(tmp_path, *BOTH, alone)))
    ranked = [(record.prompt, record.responses, record.ranks) for record in result.records]
    assert ranked == [("p", ("x", "y", "w"), (1, 2, 2)), ("q", ("z", "v"), (1, 2))]
    assert list(result.left_out.values()) == [1] and result.errors == []
    assert [place.rsplit(":", 1)[1] for place in result.locations] == ["1", "3"]


def test_all_prompts_are_read_whatever_the_mark(tmp_path):
    result = read("prompts", Source(written(tmp_path, *BOTH)))
    assert [record.prompt for record in result.records] == ["p", "q"]


@pytest.mark.parametrize(
    "good, bad",
    [(True, False), (1, 0), (1.0, 0.0), ("true", "False"), ("good", "bad"), ("Desirable", "undesirable"), (1, -1)],
)
def test_marks_as_tools_write_them(tmp_path, good, bad):
    result = read("demonstrations", Source(written(tmp_path, pair("p", "x", good), pair("p", "y", bad))))
    assert [record.completion for record in result.records] == ["x"] and result.errors == []


TURNS = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS, "label": True},
        {"conversations": [{"from": turn["role"], "value": turn["content"]} for turn in TURNS], "kto_tag": True},
        {"instruction": "c", "output": "d", "history": [["a", "b"]], "kto_tag": True},
        {"prompt": TURNS[:3], "output": TURNS[3:], "label": 1},
        {"prompt": TURNS[:3], "completion": TURNS[3:], "label": True},
    ],
)
def test_the_mark_is_of_the_last_answer_only(tmp_path, row):
    [record] = read("demonstrations", Source(written(tmp_path, row))).records
    assert (record.prompt, record.completion, record.learnt) == (tuple(TURNS[:3]), "d", ())


def test_a_label_that_is_no_mark_is_refused_or_ignored(tmp_path):
    path = written(tmp_path, pair("p", "x", "history"))
    [line] = read("demonstrations", Source(path)).errors
    assert "'label' is 'history'" in line and "ignore: [label]" in line
    [record] = read("demonstrations", Source(path, ignore=("label",))).records
    assert record.completion == "x"


def test_a_label_that_is_null_says_nothing(tmp_path):
    [record] = read("demonstrations", Source(written(tmp_path, pair("p", "x", None)))).records
    assert record.completion == "x"


def test_marked_rows_are_guessed_as_rankings_where_prompts_have_both_marks(tmp_path):
    assert guess_kind(Source(written(tmp_path, *BOTH))) == "rankings"
    singles = [pair(f"p{i}", "x", bool(i % 2)) for i in range(20)]
    assert guess_kind(Source(written(tmp_path, *singles))) == "demonstrations"


def test_floats_in_a_table_are_marks(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion,label\np,x,1.0\np,y,0.0\n", encoding="utf-8")
    [record] = read("rankings", Source(path)).records
    assert record.responses == ("x", "y") and record.ranks == (1, 2)


def test_answers_without_a_mark_among_marked_ones_are_not_taught_silently(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "p", "completion": "x", "label": True}, {"prompt": "p", "completion": "y", "label": None}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    [line] = read("demonstrations", Source(path)).errors
    assert "1 rows do not say whether their answer is good" in line
    assert len(read("demonstrations", Source(path, ignore=("label",))).records) == 2


@pytest.mark.parametrize(
    "row", [{"instruction": "p", "response": "x"}, {"conversation": [{"input": "p", "output": "x"}]}]
)
def test_dollys_and_capybaras_rows_may_be_marked_too(tmp_path, row):
    path = written(tmp_path, {**row, "label": True}, {**row, "label": False})
    assert len(read("demonstrations", Source(path)).records) == 1
