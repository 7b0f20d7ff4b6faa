"""Test that prompts read back from their file as they were written."""

import numpy as np
import pytest

from data import prompt_rows
from data.prompt_rows import EncodedPrompt, part_of, read_prompts, text_of, write_prompts
from pipeline.errors import UserError

ROWS = [
    {"prompt": "what ?", "answer": 4, "share": 0.1, "none": None, "deep": {"a": [1, {"b": True}]}},
    {"prompt": [{"role": "user", "content": "é \ud800"}], "extra": "x"},
    {"image": b"\xff\x00", "prompt": "bytes"},
    {"map": {1: "one"}, "prompt": "a key that is a number"},
    {"pair": (1, 2), "prompt": "a tuple"},
]


def written(folder, rows):
    """Write rows and read them again."""
    prompts = [EncodedPrompt([i, 2**31 - 1], row, f"p.jsonl:{i}") for i, row in enumerate(rows, 1)]
    write_prompts(folder / "prompts", ((one, i / 8) for i, one in enumerate(prompts)))
    return prompts, *read_prompts(folder / "prompts")


def test_rows_are_the_same_whatever_they_hold(tmp_path):
    prompts, read, positions = written(tmp_path, ROWS)
    assert list(read) == prompts and positions.tolist() == [i / 8 for i in range(len(ROWS))]
    assert [type(one.data_row.get("pair")) for one in read][-1] is tuple
    assert read[-1] == prompts[-1] and read[1:3] == prompts[1:3] and read.ids(2) == [3, 2**31 - 1]
    assert read[1].prompt == ROWS[1]["prompt"]


def test_batches_of_a_file_and_parts_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_rows, "ROWS_AT_ONCE", 3)
    prompts, read, positions = written(tmp_path, [{"prompt": str(i)} for i in range(8)])
    assert read.reader.num_record_batches == 3 and list(read) == prompts and len(positions) == 8
    part = part_of(part_of(read, positions > 0.3), np.array([4, 0]))
    assert list(part) == [prompts[7], prompts[3]]


def test_a_file_of_no_prompts(tmp_path):
    _, read, positions = written(tmp_path, [])
    assert len(read) == len(positions) == 0


def test_a_value_that_cannot_be_kept_is_refused():
    with pytest.raises(UserError, match=r"^p.jsonl:1: the row holds values that are no JSON; write it without them"):
        text_of(EncodedPrompt([], {"prompt": "a", "x": object()}, "p.jsonl:1"))
