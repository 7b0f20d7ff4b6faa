"""Test what is said of judges, against closed forms and simulated truth."""

import math

import numpy as np
import pytest

from stages.evaluation import judging
from stages.evaluation.statistics import share_estimate

CHOICES = ("first", "second", "tie")


@pytest.mark.parametrize(
    ("forward", "backward", "expected"),
    [
        ("first", "second", 1.0),
        ("second", "first", 0.0),
        ("first", "first", 0.5),
        ("second", "second", 0.5),
        ("tie", "tie", 0.5),
        ("first", "tie", 0.5),
        (None, "second", 0.5),
        ("second", None, 0.5),
        (None, None, 0.5),
    ],
)
def test_a_pair_is_won_only_in_both_orders(forward, backward, expected):
    assert judging.preference_of(forward, backward) == expected


def test_a_judge_of_the_first_response_is_shown_for_what_it_is():
    found = judging.position_bias([("first", "first")] * 40, range(40))
    assert found["first"]["value"] == 1 and found["first"]["ci95"][0] > 0.85
    assert found["consistent"]["value"] == 0


def test_an_honest_judge_has_no_position_bias():
    orders = [("first", "second"), ("second", "first")] * 20
    found = judging.position_bias(orders, range(40))
    assert found["first"]["value"] == 0.5 and found["first"]["ci95"][0] < 0.5 < found["first"]["ci95"][1]
    assert found["consistent"]["value"] == 1


def test_ties_and_invalid_verdicts_are_not_first_or_second():
    found = judging.position_bias([("tie", "tie"), (None, "first"), ("tie", "second")], range(3))
    assert found["first"]["n"] == 2 and found["first"]["value"] == 0.5
    assert found["consistent"]["n"] == 2 and found["consistent"]["value"] == 0.5
    assert judging.position_bias([(None, None)], [0]) == {"first": None, "consistent": None}


def test_the_longer_response_is_preferred():
    preferences, gaps = [1.0, 0.0, 0.5, 1.0], [3, -2, 5, 0]
    found = judging.longer_preferred(preferences, gaps, range(4))
    assert found["n"] == 3 and found["value"] == pytest.approx(2.5 / 3)
    assert judging.longer_preferred([1.0], [0], [0]) is None


def test_length_beside_people():
    # people prefer the longer one in 1 of 4 pairs, the judge in all of them
    found = judging.longer_than_people([1.0, 0.0, 0.0, 0.0, 1.0], [3, -3, -1, -2, 0], range(5))
    assert found["value"] == pytest.approx(0.75) and found["n"] == 4
    same = judging.longer_than_people([1.0] * 30, [1, -1] * 15, range(30))
    assert same["value"] == 0 and same["ci95"][0] < 0 < same["ci95"][1]


def test_agreement_leaves_ties_out():
    found = judging.agreement([1, 1, 0, 0.5, 1], [1, 0, 0, 1, 0.5], range(5))
    assert found["n"] == 3 and found["value"] == pytest.approx(2 / 3)
    assert judging.agreement([0.5], [1], [0]) is None


def test_repeatability():
    assert judging.repeatability([], [], []) is None
    assert judging.repeatability([7.0, 3.0], [7.0, 4.0], [0, 1])["value"] == 0.5


# -- length control --------------------------------------------------------------------------------


def simulate(rng, count, quality, length_effect, shift):
    """Return preferences of a judge that is known, and differences of length."""
    gaps = rng.normal(shift, 1.0, count)
    logits = quality + length_effect * np.tanh(gaps / gaps.std())
    return (rng.random(count) < 1 / (1 + np.exp(-logits))).astype(float), gaps


@pytest.mark.parametrize("quality", [-0.7, 0.0, 0.7])
def test_length_control_finds_the_win_rate_at_equal_length(quality):
    rng = np.random.default_rng(1)
    preferences, gaps = simulate(rng, 6_000, quality, 2.0, shift=0.8)
    found = judging.length_controlled(preferences.tolist(), gaps.tolist(), [i % 150 for i in range(6_000)])
    truth = 1 / (1 + math.exp(-quality))
    assert found["value"] == pytest.approx(truth, abs=0.04)
    assert found["length_effect"] == pytest.approx(2.0, abs=0.25)
    assert preferences.mean() > truth + 0.1  # what the judge's liking for length adds


def test_intervals_of_length_control_contain_the_truth():
    rng = np.random.default_rng(2)
    inside = 0
    for _ in range(120):
        preferences, gaps = simulate(rng, 60, 0.4, 1.5, shift=0.5)
        low, high = judging.length_controlled(preferences.tolist(), gaps.tolist(), range(60))["ci95"]
        inside += low <= 1 / (1 + math.exp(-0.4)) <= high
    assert 0.9 <= inside / 120 <= 0.99


def test_length_control_of_equal_lengths_is_the_win_rate():
    preferences = [1.0] * 30 + [0.0] * 10
    found = judging.length_controlled(preferences, [7] * 40, range(40))
    assert found["value"] == pytest.approx(0.75, abs=0.01) and found["length_effect"] == 0
    expected = share_estimate(preferences, range(40))["ci95"]
    assert found["ci95"] == pytest.approx(expected, abs=0.04)


def test_length_control_stays_finite_where_all_pairs_are_won():
    found = judging.length_controlled([1.0] * 16, range(16), range(16))
    assert 0.9 < found["value"] < 1
    assert found["ci95"][0] < 0.85 and found["ci95"][1] < 1


def test_a_fit_has_no_gradient_left():
    rng = np.random.default_rng(3)
    y, x = rng.random(50), np.tanh(rng.normal(size=50))
    a, b = judging.fit_logistic(y, x)
    step = 1e-5

    def loss(a, b):
        p = 1 / (1 + np.exp(-a - b * x))
        likelihood = (y * np.log(p) + (1 - y) * np.log(1 - p)).sum()
        return -likelihood + (a * a + b * b) / (2 * judging.PRIOR_DEVIATION**2)

    for da, db in ((step, 0), (0, step)):
        assert (loss(a + da, b + db) - loss(a - da, b - db)) / (2 * step) == pytest.approx(0, abs=1e-5)


def test_a_judge_of_length_alone_leaves_nothing():
    rng = np.random.default_rng(4)
    gaps = rng.normal(1.5, 1.0, 200)
    found = judging.length_controlled((gaps > 0).astype(float).tolist(), gaps.tolist(), range(200))
    assert (gaps > 0).mean() > 0.9 and found["value"] < 0.75
