"""The load run works: everybody is answered, and what was confirmed is in the database."""

import argparse
import sqlite3
from pathlib import Path

import pytest


@pytest.fixture
def rank_load(monkeypatch):
    """The benchmark, with its folder on the path as when it is run."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import rank_load

    return rank_load


def test_a_few_people_for_a_moment(rank_load, tmp_path):
    wanted = {"labelers": 3, "seconds": 3.0, "pause": 0.05, "answers": 4, "tasks": 60, "lead": 1.0}
    row = rank_load.measure(argparse.Namespace(**wanted), tmp_path)
    assert row["failures"] == 0, row["first_failures"]
    assert row["exit_code"] == 0 and row["submitted"] > 0 and row["move"]["n"] >= 4 * row["submitted"]
    assert row["figures"]["n"] >= 1 and row["server"]["rss_mib"] > 10
    connection = sqlite3.connect(tmp_path / "artifacts/people/people/people.sqlite")
    done = connection.execute("SELECT COUNT(*) FROM verdicts WHERE skipped IS NULL").fetchone()[0]
    connection.close()
    assert done == row["submitted"]


def test_percentiles(rank_load):
    assert rank_load.summary([5.0])["p99_ms"] == 5.0
    found = rank_load.summary([float(number) for number in range(1, 102)])
    assert (found["n"], found["p50_ms"], found["p95_ms"], found["max_ms"]) == (101, 51.0, 96.0, 101.0)
