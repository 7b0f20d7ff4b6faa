"""Run a part of the fault matrix with the slow tests; `make faults` runs all of it."""

import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = Path(__file__).with_name("faults.py")
KILLED_AND_STOPPED = ("C1", "C2", "C4", "C6", "C12", "C18")
DAMAGED_AND_CHANGED = ("C8", "C9b", "C8i", "D4", "M")


@pytest.mark.slow
def test_killed_stopped_damaged_and_changed(oracle):
    """All in one program, which measures each stage once."""
    cases = [f"{case}:4" for case in (*KILLED_AND_STOPPED, *DAMAGED_AND_CHANGED)]
    command = [sys.executable, str(FAULTS), "--artifacts", str(oracle), "--cases", *cases]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=2400)
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-2000:]
