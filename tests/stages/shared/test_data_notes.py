"""Test what is said and listed of data that a stage does not take."""

import json

from data import sources
from data.source import Source
from stages.shared.data_notes import DataNotes

GOOD = {"prompt": "what is red ?", "completion": "the fox", "label": True}


def taken_down(tmp_path, rows):
    """Return the lines of left_out.jsonl, and the notes."""
    file = tmp_path / "kto.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = sources.load_whole("demonstrations", Source(path=file))
    notes = DataNotes(lambda line: None, tmp_path)
    notes.take_down("demonstrations", str(file), loaded)
    return [json.loads(line) for line in (tmp_path / "left_out.jsonl").open()], notes, str(file)


def test_rows_that_hold_nothing_of_the_kind_are_listed_with_file_and_line(tmp_path):
    rows, notes, file = taken_down(tmp_path, [GOOD, GOOD | {"label": False}, GOOD, GOOD | {"label": False}])
    assert [(row["file"], row["line"]) for row in rows] == [(file, 2), (file, 4)]
    assert len({row["reason"] for row in rows}) == 1 and notes.figures == {"left_out": 2}


def test_of_many_the_last_line_counts_those_that_are_not_listed(tmp_path, monkeypatch):
    monkeypatch.setattr("data.source.MOST_PLACES", 2)
    rows, notes, file = taken_down(tmp_path, [GOOD, *[GOOD | {"label": False}] * 5])
    assert [row.get("line") for row in rows] == [2, 3, None] and notes.figures == {"left_out": 5}
    assert rows[2] == {"data": "demonstrations", "file": file, "reason": rows[0]["reason"], "rows": 3}


def test_what_scorers_would_miss_of_prompts_is_said(tmp_path):
    """The second answer to a prompt is lost, and other keys are there for scorers alone."""
    file, said = tmp_path / "prompts.jsonl", []
    rows = [{"prompt": "what is red ?", "answer": answer, "level": 1} for answer in ("fox", "fox", "hen")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    DataNotes(said.append, tmp_path).take_down("prompts", str(file), sources.load_whole("prompts", Source(path=file)))
    assert said == [
        "prompts: 2 repeated prompts left out, 1 of them with other values than the first; keys that scorers alone "
        "read: level"
    ]
