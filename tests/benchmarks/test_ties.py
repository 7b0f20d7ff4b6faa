"""Test the benchmark of ties: coarse ranks, fits and figures by hand, and that it runs."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))  # benchmarks import sweeps from their own folder

import ties

ROOT = Path(__file__).resolve().parents[2]


def test_responses_of_one_grade_share_a_rank():
    assert ties.ranks_of([0.1, 2.9, 3.1, -0.1, 8.9], 3.0) == [3, 3, 2, 4, 1]


def test_pairs_and_their_verdicts():
    """Equal responses make no pair, unless one of them was cut off."""
    rows = [{"responses": ["a", "b", "a", "a"], "finished": [True, True, True, False], "ranks": [1, 1, 1, 2]}]
    gaps, verdicts = ties.pairs_of(rows, [[1.0, 3.0, 1.0, 0.5]])
    assert gaps.tolist() == [-2.0, 0.5, 2.0, 2.5, 0.5] and verdicts.tolist() == [0, 1, 0, 1, 1]


def test_davidsons_model_is_found_again():
    """From verdicts drawn with ν = 1.5 on scores of three times the size."""
    rng = np.random.default_rng(0)
    gaps = rng.normal(size=40_000)
    half = 3 * gaps / 2
    total = np.exp(half) + np.exp(-half) + 1.5
    drawn = rng.random(len(gaps))
    verdicts = np.where(drawn < np.exp(half) / total, 1, np.where(drawn < (np.exp(half) + 1.5) / total, 0, -1))
    factor, strength = ties.fit_davidson(gaps, verdicts)
    assert factor == pytest.approx(3, rel=0.03) and strength == pytest.approx(1.5, rel=0.03)
    log_loss, error = ties.calibration(ties.outcomes(factor * gaps, strength), verdicts)
    assert error < 0.01 and log_loss < ties.calibration(ties.outcomes(gaps, strength), verdicts)[0]
    assert ties.calibration(ties.outcomes(factor * gaps, 5 * strength), verdicts)[1] > 0.1


def test_log_loss_by_hand():
    log_loss, error = ties.calibration(ties.outcomes(np.zeros(4), 1.0), np.array([1, 0, 0, -1]))
    assert log_loss == pytest.approx(math.log(3))
    assert error == pytest.approx((2 * (1 / 3) + 2 * (2 / 3)) / 4)  # each pair is a part of its own


def test_each_half_is_fitted_on_the_other():
    """Pairs of one half are all tied, those of the other never: each is taken for the other."""
    rows = [{"prompt": str(i), "responses": ["a", "b"], "finished": [True, True], "ranks": [1, 1 + i % 2]}
            for i in range(40)]  # fmt: skip
    found, verdicts = ties.fitted_on_the_other_half(rows, [[0.0, 1.0]] * 20 + [[1.0, 0.0]] * 20)
    assert verdicts.tolist() == [0] * 20 + [1] * 20
    assert found[:20, 1].max() < 0.01 and found[20:, 1].min() > 0.99


@pytest.mark.slow
@pytest.mark.exhaustive
def test_it_runs(tmp_path):
    words = [sys.executable, ROOT / "tests/benchmarks/ties.py", "--quick", "--artifacts", tmp_path / "artifacts"]
    result = subprocess.run([*words, "--results", tmp_path], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    rows = [json.loads(row) for row in (tmp_path / "ties.jsonl").read_text().splitlines()]
    assert {(row["responses"], row["loss"]) for row in rows} == {(k, x) for k, xs in ties.LOSSES.items() for x in xs}
    assert all((row["own_strengths"] is None) == (row["loss"] not in ties.WITHOUT) for row in rows)
    assert "davidson_luce − plackett_luce" in result.stdout
