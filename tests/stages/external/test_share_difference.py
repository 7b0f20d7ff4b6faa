"""Test the interval of a difference of two shares over the same prompts."""

import numpy as np
import pytest

from stages.external.share_difference import share_difference


def test_nothing_refused_by_either_is_no_point():
    found = share_difference([0.0] * 20, [0.0] * 20, range(20))
    low, high = found["ci95"]
    assert found["value"] == 0 and low < -0.05 and high > 0.05 and low == pytest.approx(-high)


def test_pairing_makes_the_interval_narrower():
    rng = np.random.default_rng(1)
    theirs = rng.integers(0, 2, 200).astype(float)
    alike = np.where(rng.random(200) < 0.1, 1 - theirs, theirs)
    other = rng.permutation(alike)
    paired, apart = (share_difference(ours, theirs, range(200)) for ours in (alike, other))
    width = lambda found: found["ci95"][1] - found["ci95"][0]  # noqa: E731
    assert paired["value"] == pytest.approx(apart["value"])
    assert width(paired) < 0.7 * width(apart)


def test_the_interval_contains_the_truth_about_as_often_as_it_says():
    rng, hits, truth = np.random.default_rng(2), 0, 0.1
    for _ in range(400):
        common = rng.random(60)
        ours, theirs = (common < 0.15 + truth).astype(float), (common < 0.15).astype(float)
        low, high = share_difference(ours, theirs, range(60))["ci95"]
        hits += low <= truth <= high
    assert hits / 400 > 0.92
