"""Test that every step of the benchmark of large files runs, on few rows."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import data_size


def test_all_steps_run_in_their_order(tmp_path):
    data_size.write_rows(tmp_path, 200)
    data_size.write_tokenizer(tmp_path)
    for step in data_size.STEPS:
        taken = data_size.measure(step, tmp_path)
        assert taken.keys() == {"seconds", "processor_seconds", "peak_mb"} and taken["peak_mb"] > 0
    names = {path.name for path in (tmp_path / ".cache").iterdir()}
    assert {"groups-train.arrow", "prompts.arrow", "documents.ids"} <= names
