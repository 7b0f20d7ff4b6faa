"""Test the measurement of starts on a tiny chain: its row, and that it leaves none out."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import starts as bench


@pytest.mark.slow
@pytest.mark.parametrize("stages", [["base"], pytest.param([], marks=pytest.mark.exhaustive)])
def test_a_row_has_every_command_and_stage(tmp_path, stages):
    micro = str(bench.ROOT / "tests/resume/micro.yaml")
    options = ["--gigabytes", "0.001", "--stages", *stages, "--repeat", "1", "--results", str(tmp_path / "rows")]
    assert bench.main(["-c", micro, *options, "base.max_steps=400", "launch.device=cpu"]) == 0
    row = json.loads((tmp_path / "rows").read_text())
    assert set(row["commands"]) == {"help", "status_verify", "status", "nothing_to_do"}
    assert all(times["cpu_s"] > 0 for times in row["commands"].values())
    assert all(set(times) == {"first_step_s", "resumed_step_s"} for times in row["stages"].values())
    assert list(row["stages"]) == stages


def test_the_large_file_belongs_to_the_artifact(tmp_path):
    from pipeline.store import integrity

    (tmp_path / "manifest.json").write_text(json.dumps(integrity.seal({"outputs": {}})))
    bench.grow(tmp_path, 2**20)
    outputs = integrity.read_sealed(tmp_path / "manifest.json")["outputs"]
    assert outputs[bench.PADDING]["bytes"] == 2**20 and integrity.check_files(tmp_path, outputs) == []
