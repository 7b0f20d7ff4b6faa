"""Figures with uncertainty: coverage of the intervals, ties, calibration by hand, agreement of labelers."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from data.records import Ranking
from stages.statistics import (
    accuracy_by,
    agreements,
    bootstrap_ci,
    expected_calibration_error,
    labeler_agreement,
    pair_accuracy,
    reliability,
    win_rate,
)


class TestBootstrap:
    def test_about_95_of_100_intervals_hold_the_truth(self):
        """200 samples of 60 coin flips at 0.3: coverage of a percentile bootstrap lies between 0.88 and
        0.99."""
        rng = np.random.default_rng(0)
        hits = 0
        for trial in range(200):
            flips = rng.random(60) < 0.3
            low, high = bootstrap_ci(flips, np.ones(60), seed=trial, draws=400)
            hits += low <= 0.3 <= high
        assert 0.88 <= hits / 200 <= 0.99

    def test_its_width_is_that_of_the_normal_interval(self):
        """For a mean of many numbers: 2 · 1.96 · s/√n."""
        x = np.random.default_rng(1).normal(5.0, 2.0, 2000)
        low, high = bootstrap_ci(x, np.ones(2000), seed=0)
        assert high - low == pytest.approx(2 * 1.96 * x.std() / math.sqrt(2000), rel=0.1)
        assert low < x.mean() < high

    def test_it_draws_prompts_and_not_pairs(self):
        """Ten equal pairs a prompt are worth one: √10 wider than pairs drawn alone would be."""
        rng = np.random.default_rng(2)
        right = rng.random(100) < 0.7
        clustered = bootstrap_ci(right * 10, np.full(100, 10), seed=0)
        alone = bootstrap_ci(np.repeat(right, 10), np.ones(1000), seed=0)
        ratio = (clustered[1] - clustered[0]) / (alone[1] - alone[0])
        assert ratio == pytest.approx(math.sqrt(10), rel=0.15)

    def test_the_seed_fixes_it(self):
        x = [0.0, 1.0, 1.0, 0.0, 1.0]
        assert bootstrap_ci(x, [1] * 5, seed=3) == bootstrap_ci(x, [1] * 5, seed=3)

    def test_without_spread_the_interval_is_a_point(self):
        assert bootstrap_ci([1.0] * 9, [1] * 9, seed=0) == [1.0, 1.0]


class TestWinRate:
    def test_ties_count_half(self):
        found = win_rate([3, 2, 1, 1], [1, 2, 1, 5], seed=0)  # win, tie, tie, loss
        assert found["value"] == 0.5 and found["n"] == 4
        assert found["ci95"][0] <= 0.5 <= found["ci95"][1]

    def test_against_itself_it_is_one_half_exactly(self):
        found = win_rate([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], seed=0)
        assert found["value"] == 0.5 and found["ci95"] == [0.5, 0.5]

    def test_the_other_side_has_the_rest(self):
        rng = np.random.default_rng(3)
        ours, theirs = rng.integers(0, 4, 50), rng.integers(0, 4, 50)
        assert win_rate(ours, theirs, 0)["value"] + win_rate(theirs, ours, 0)["value"] == pytest.approx(1.0)

    def test_lists_of_different_lengths_are_refused(self):
        with pytest.raises(ValueError):
            win_rate([1.0], [1.0, 2.0], seed=0)


class TestPairAccuracy:
    def test_counts_pairs_and_ties_half(self):
        found = pair_accuracy([1.0, -1.0, 0.0, 2.0], [0, 0, 1, 1], seed=0)
        assert found["accuracy"] == pytest.approx(2.5 / 4) and found["n_pairs"] == 4

    def test_its_interval_is_over_prompts(self):
        """One prompt of nine right pairs, one of one wrong pair: draws give 1, 0.9 or 0, never a share
        between."""
        found = pair_accuracy([1.0] * 9 + [-1.0], [7] * 9 + [3], seed=0)
        assert found["accuracy"] == pytest.approx(0.9) and found["accuracy_ci95"] == [0.0, 1.0]


def margin(confidence):
    return math.log(confidence / (1 - confidence))


class TestCalibration:
    def test_perfectly_calibrated_is_zero(self):
        """Of ten pairs at confidence 0.8, eight right."""
        assert expected_calibration_error([margin(0.8)] * 8 + [-margin(0.8)] * 2) == pytest.approx(
            0.0, abs=1e-12
        )

    def test_sure_and_always_wrong_is_one(self):
        assert expected_calibration_error([-1000.0] * 4) == pytest.approx(1.0)

    def test_two_bins_by_hand(self):
        """0.92 twice, half right: off by 0.42. 0.61 four times, all right: off by 0.39. Weighted by their
        sizes."""
        margins = [margin(0.92), -margin(0.92), *[margin(0.61)] * 4]
        assert expected_calibration_error(margins) == pytest.approx((2 * 0.42 + 4 * 0.39) / 6)

    def test_ten_bins_lie_between_one_half_and_one(self):
        """0.61 (right) and 0.68 (wrong) are in bins of their own: off by 0.39 and 0.68, not by their mean."""
        assert expected_calibration_error([margin(0.61), -margin(0.68)]) == pytest.approx((0.39 + 0.68) / 2)

    def test_indifference_is_calibrated(self):
        """Margin 0 says one half, and a tie is half right."""
        assert expected_calibration_error([0.0] * 5) == 0.0

    def test_it_does_not_matter_which_response_is_listed_first(self):
        """Read from the side that the model prefers, so confidences lie in [½, 1] and bins are not
        symmetric copies."""
        right, wrong = [margin(0.75)] * 3, [-margin(0.75)]
        assert expected_calibration_error(right + wrong) == pytest.approx(0.0, abs=1e-12)
        assert expected_calibration_error(wrong * 4) == pytest.approx(0.75)


LABELER = itertools.count()


def ranked(ranks, prompt="p", responses=("a", "b", "c")):
    return Ranking("id", prompt, responses, ranks, labeler=f"labeler-{next(LABELER)}")


class TestAgreement:
    def test_is_the_share_of_untied_pairs_ordered_alike(self):
        """(1,2,3) and (1,3,2): two of three pairs alike."""
        assert labeler_agreement([ranked((1, 2, 3)), ranked((1, 3, 2))]) == pytest.approx(2 / 3)

    def test_same_and_opposite(self):
        assert labeler_agreement([ranked((1, 2, 3)), ranked((1, 2, 3))]) == 1.0
        assert labeler_agreement([ranked((1, 2, 3)), ranked((3, 2, 1))]) == 0.0

    def test_ties_and_unjudged_responses_are_left_out(self):
        assert labeler_agreement([ranked((1, 1, 2)), ranked((1, 2, 3))]) == 1.0  # pair (a, b) is tied for one
        assert labeler_agreement([ranked((1, 2, None)), ranked((2, 1, 3))]) == 0.0

    def test_three_labelers_make_three_pairs_of_labelers(self):
        rankings = [
            ranked((1, 2), responses=("a", "b")),
            ranked((1, 2), responses=("a", "b")),
            ranked((2, 1), responses=("a", "b")),
        ]
        assert labeler_agreement(rankings) == pytest.approx(1 / 3)

    def test_only_the_same_prompt_and_responses_are_compared(self):
        assert labeler_agreement([ranked((1, 2, 3)), ranked((1, 2, 3), prompt="q")]) is None
        assert labeler_agreement([ranked((1, 2, 3)), ranked((1, 2, 3), responses=("a", "b", "d"))]) is None
        cut = replace(ranked((1, 2, 3)), finished=(True, True, False))  # another response, though of the same text
        assert labeler_agreement([ranked((1, 2, 3)), cut]) is None

    def test_message_prompts_are_compared_by_their_content(self):
        prompt = ({"role": "user", "content": "p"},)
        assert (
            labeler_agreement([ranked((1, 2, 3), prompt), ranked((1, 2, 3), tuple(dict(m) for m in prompt))])
            == 1.0
        )


class TestParts:
    def test_accuracy_by_key_counts_ties_half_and_sorts_keys_as_numbers(self):
        found = accuracy_by([1.0, -1.0, 0.0, 2.0, -3.0], [10, 2, 2, 2, 10])
        assert found == {"2": {"accuracy": 0.5, "n_pairs": 3}, "10": {"accuracy": 0.5, "n_pairs": 2}}
        assert list(found) == ["2", "10"]

    def test_the_reliability_curve_by_hand(self):
        """Margins ±ln 4: confidence 0.8; two of three right. A margin of 0: confidence ½, half right."""
        curve = reliability([math.log(4), math.log(4), -math.log(4), 0.0])
        assert [b["n_pairs"] for b in curve] == [1, 3]
        assert curve[0]["confidence"] == 0.5 and curve[0]["accuracy"] == 0.5
        assert curve[1]["confidence"] == pytest.approx(0.8) and curve[1]["accuracy"] == pytest.approx(2 / 3)

    def test_agreement_of_each_two_labelers(self):
        """ada and ben agree on 2 of 3 pairs; cleo left one response out and tied another."""
        ranks = {"ben": (1, 3, 2), "ada": (1, 2, 3), "cleo": (2, 1, None)}
        rows = [Ranking("x", "p", ("a", "b", "c"), r, who) for who, r in ranks.items()]
        found = agreements(rows)
        assert found == {("ada", "ben"): (2, 3), ("ada", "cleo"): (0, 1), ("ben", "cleo"): (0, 1)}
        assert labeler_agreement(rows) == pytest.approx(2 / 5)
