"""The sft benchmark runs: both sides agree, and ours packs rows and reads labels only."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SFT = Path(__file__).resolve().parent / "sft.py"


@pytest.mark.slow
def test_quick():
    done = subprocess.run([sys.executable, str(SFT), "--quick"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    equal, mixed = map(json.loads, done.stdout.splitlines())
    for line in (equal, mixed):
        assert line["equal_math"]["max_rel_err"] < 1e-5 and line["equal_math"]["tensors"] > 10
        tokens = line["tokens"]
        assert tokens["through_head"]["ours"] == tokens["learnt"] < tokens["through_head"]["peer"]
    assert mixed["tokens"]["processed"]["ours"] == mixed["tokens"]["real"] <= mixed["tokens"]["processed"]["peer"]
    assert mixed["config"]["ours"]["pass"] == {"rows": "packed", "labels_only": True, "why": None}
    assert equal["config"]["ours"]["pass"] == {"rows": "padded", "labels_only": True, "why": None}
