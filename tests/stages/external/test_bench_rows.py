"""Test how rows of reward benchmarks are read, and what is refused."""

import json

import pytest

from pipeline.stage import Source
from stages.external import bench_rows
from stages.external.bench_rows import read_items

FOUR = {"id": "7", "prompt": "what is red?", "chosen": ["a fox"], "rejected": ["no", "x", "y"], "subset": "Focus",
        "num_correct": 1, "models": ["a"], "additional_metadata": None}  # fmt: skip
PAIR = {"id": 3, "prompt": "what is red?", "chosen": "a fox", "rejected": "no", "subset": "hep-js", "chosen_model": "a"}
REF = FOUR | {"id": "ref:0", "subset": "Ties"}
TIED = FOUR | {"id": "tied:0", "subset": "Ties", "chosen": ["a fox", "a fire"], "num_correct": 2}


def read(tmp_path, *rows, **options):
    """Write rows and read them."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_items(Source(path=path, **options))


def test_both_benchmarks_are_read(tmp_path):
    items, lines = read(tmp_path, FOUR, PAIR, REF, TIED)
    assert lines == []
    assert [item.is_pair for item in items] == [False, True, False, False]
    assert [item.is_tie for item in items] == [False, False, True, True]
    assert items[0].responses == ("a fox", "no", "x", "y") and items[3].chosen == ("a fox", "a fire")
    assert [item.id for item in items] == ["7", "3", "ref:0", "tied:0"] and items[1].subset == "hep-js"


def test_skip_and_limit(tmp_path):
    items, _ = read(tmp_path, *[PAIR | {"id": i} for i in range(5)], skip=1, limit=2)
    assert [item.id for item in items] == ["1", "2"]


@pytest.mark.parametrize(
    "rows, said",
    [
        ([{"prompt": "a", "completion": "b"}], "rows.jsonl:1: is no row of a reward benchmark"),
        ([FOUR | {"chosen": ["a", "b"]}], "'num_correct' is 1, and 'chosen' holds 2"),
        ([FOUR | {"chosen": ["a", "b"], "num_correct": 2}], "2 chosen responses outside the subset Ties"),
        ([FOUR | {"rejected": []}], "'rejected' is "),
        ([FOUR | {"rejected": ["a", 3]}], "'rejected' is "),
        ([REF | {"id": "12"}], "the id of a tie is '12'"),
        ([REF, TIED | {"id": "tied:1"}], "no tie has both its rows"),
        ([REF, REF], "the tie ref:0 is also at"),
        ([FOUR | {"prompt": " "}], "'prompt' is"),
        ([], "the file is empty"),
    ],
)
def test_a_wrong_row_is_an_error_line(tmp_path, rows, said):
    _, lines = read(tmp_path, *rows)
    assert said in lines[0]


@pytest.mark.parametrize(
    "hub, split, wanted",
    [("allenai/reward-bench-2", "train", "test"), ("allenai/reward-bench", "train", "filtered"),
     ("allenai/reward-bench", "raw", "raw"), ("mine/rows", "train", "train")],
)  # fmt: skip
def test_the_leaderboards_split_is_the_default(monkeypatch, hub, split, wanted):
    asked = []

    def rows(source, reading):
        asked.append(source.split)
        return iter([(f"{hub}: index 0", PAIR)])

    monkeypatch.setattr(bench_rows, "source_rows", rows)
    items, lines = read_items(Source(hub=hub, split=split))
    assert asked == [wanted] and len(items) == 1 and not lines
