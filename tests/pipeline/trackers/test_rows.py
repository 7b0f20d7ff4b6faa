"""Test how journals are read while they grow: one order, whatever has been written when."""

import json
import math
import random

from pipeline.trackers.rows import Entry, Journals
from pipeline.tracking import Tracker


def write(folder, name, *rows):
    with open(folder / f"{name}.jsonl", "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def keys(entries):
    return [(entry.step, entry.kind) for entry in entries]


def test_names_are_grouped_and_times_belong_to_the_metrics(tmp_path):
    write(tmp_path, "timing", {"step": 1, "seconds": 0.5})
    write(tmp_path, "metrics", {"step": 1, "loss": 1.5, "objective/kl": "NaN", "keep": True, "note": "text", "x": None})
    write(tmp_path, "evaluations", {"step": 1, "loss": 2, "val/ratio": "-Infinity"})
    write(tmp_path, "samples", {"step": 1, "prompt": "a"}, {"step": 1, "prompt": "b"})
    first, second, third = Journals(tmp_path).new_entries(complete=True)
    assert math.isnan(first.figures.pop("objective/kl"))
    assert first == Entry(1, "metrics", {"train/loss": 1.5, "train/keep": 1.0, "time/seconds": 0.5})
    assert second.figures == {"eval/loss": 2.0, "eval/val/ratio": -math.inf}
    assert [row["prompt"] for row in third.texts] == ["a", "b"]


def test_a_row_that_is_half_written_waits(tmp_path):
    journals = Journals(tmp_path)
    assert journals.new_entries(complete=False) == []
    write(tmp_path, "metrics", {"step": 1, "loss": 1.0})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    assert journals.new_entries(complete=False) == []
    assert keys(journals.new_entries(complete=False)) == [(1, "metrics")]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('ss": 1.0}\n')
    assert keys(journals.new_entries(complete=True)) == [(2, "metrics")]


def test_the_order_does_not_depend_on_when_the_journals_are_read(tmp_path):
    """A tracker that counts its rows relies on it. Read after every write, then at random."""
    whole = []
    for reader in range(20):
        folder = tmp_path / str(reader)
        folder.mkdir()
        journals, draw, found = Journals(folder), random.Random(reader), []

        def look(journals=journals, draw=draw, found=found, always=reader == 0):
            if always or draw.random() < 0.3:
                found += journals.new_entries(complete=False)

        tracker = Tracker(folder, "sft")
        append = tracker._append
        tracker._append = lambda name, rows, append=append, look=look: (append(name, rows), look())
        tracker.evaluation(0, {"loss": 3.0})
        for step in range(1, 13):
            tracker.log(step, {"loss": 1.0}, 0.5, 10)
            if step % 3 == 0:
                tracker.evaluation(step, {"loss": 2.0})
                tracker.samples(step, [{"prompt": "a"}, {"prompt": "b"}])
        found += journals.new_entries(complete=True)
        whole.append(keys(found))
        assert all("time/seconds" in entry.figures for entry in found if entry.kind == "metrics")
        assert all(len(entry.texts) == 2 for entry in found if entry.kind == "samples")
    assert whole[0][:3] == [(0, "evaluations"), (1, "metrics"), (2, "metrics")] and len(whole[0]) == 1 + 12 + 4 + 4
    assert all(other == whole[0] for other in whole)
