"""Run a part of the fault matrix with the slow tests; `make faults` runs all of it."""

import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = Path(__file__).with_name("faults.py")


def matrix(*words: str) -> None:
    ended = subprocess.run([sys.executable, str(FAULTS), *words], capture_output=True, text=True, timeout=1200)
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-2000:]


@pytest.mark.slow
def test_killed_and_stopped():
    matrix("--kills", "12", "--cases", "C1", "C2", "C4", "C6", "C12", "C18")


@pytest.mark.slow
def test_damaged_and_changed():
    matrix("--kills", "4", "--cases", "C8", "C9", "C9b", "C8i", "D1", "D4", "M")
