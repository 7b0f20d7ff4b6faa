"""Check estimates and their intervals by hand and along independent routes.

`test_intervals.py` simulates how often the intervals contain the true value.
"""

import itertools
import math
import statistics
from dataclasses import replace

import numpy as np
import pytest

from data.records import Ranking
from stages.evaluation.statistics import (
    accuracy_by,
    agreements,
    calibration_interval,
    cluster_sums,
    difference_estimate,
    expected_calibration_error,
    labeler_agreement,
    mean_estimate,
    pair_accuracy,
    reliability,
    share_estimate,
    win_rate,
    wins,
)

T_15, T_2 = 2.1314, 4.3027
"""0.975 quantiles of Student's t with 15 and 2 degrees of freedom, from a printed table."""


def width(found):
    low, high = found["ci95"]
    return high - low


class TestMean:
    def test_one_observation_a_cluster_is_students_interval(self):
        """By hand: x̄ ± t · s/√n."""
        x = [3.1, 2.4, 5.0, 4.4, 2.9, 3.3, 4.1, 3.8, 2.2, 4.9, 3.0, 3.6, 4.2, 2.8, 3.9, 4.6]
        found, half = mean_estimate(x, range(16)), T_15 * statistics.stdev(x) / 4
        assert found["value"] == pytest.approx(statistics.mean(x))
        assert found["ci95"] == pytest.approx([found["value"] - half, found["value"] + half], abs=1e-4)
        assert (found["n"], found["clusters"]) == (16, 16)

    def test_equal_observations_of_a_cluster_are_worth_one(self):
        """Ten equal observations per cluster count as one each."""
        x = np.random.default_rng(2).normal(size=100)
        clustered = mean_estimate(np.repeat(x, 10), np.repeat(np.arange(100), 10))
        assert clustered["ci95"] == pytest.approx(mean_estimate(x, range(100))["ci95"])
        alone = mean_estimate(np.repeat(x, 10), range(1000))
        assert width(clustered) / width(alone) == pytest.approx(math.sqrt(10), rel=0.02)

    def test_clusters_of_uneven_sizes_by_hand(self):
        """The means without each cluster are 5, 16/5 and 11/4, and the whole mean is 3.5."""
        found = mean_estimate([5, 1, 2, 4, 3, 6], ["b", "a", "a", "c", "a", "c"])
        error = math.sqrt(2 / 3 * ((5 - 3.5) ** 2 + (3.2 - 3.5) ** 2 + (2.75 - 3.5) ** 2))
        assert found["value"] == 3.5 and (found["n"], found["clusters"]) == (6, 3)
        assert found["ci95"] == pytest.approx([3.5 - T_2 * error, 3.5 + T_2 * error], abs=1e-3)

    def test_its_width_for_many_is_that_of_the_normal_interval(self):
        x = np.random.default_rng(1).normal(5.0, 2.0, 2000)
        found = mean_estimate(x, range(2000))
        assert width(found) == pytest.approx(2 * 1.96 * x.std() / math.sqrt(2000), rel=0.01)

    def test_the_order_of_observations_does_not_matter(self):
        rng = np.random.default_rng(4)
        x, task = rng.random(40), rng.integers(0, 9, 40)
        order = rng.permutation(40)
        assert mean_estimate(x[order], task[order])["ci95"] == pytest.approx(mean_estimate(x, task)["ci95"])

    def test_one_cluster_has_no_interval(self):
        assert mean_estimate([0.2, 0.4], ["a", "a"]) == {
            "value": pytest.approx(0.3), "ci95": None, "se": None, "n": 2, "clusters": 1,
        }  # fmt: skip

    def test_clusters_of_another_number_are_refused(self):
        with pytest.raises(ValueError, match="3 values and 2 clusters"):
            mean_estimate([1.0, 2.0, 3.0], [0, 1])

    def test_sums_and_sizes_of_clusters(self):
        sums, counts = cluster_sums([1.0, 2.0, 3.0, 4.0], ["x", ("y", 1), "x", "z"])
        assert (sums.tolist(), counts.tolist()) == ([4.0, 2.0, 4.0], [2.0, 1.0, 1.0])


class TestShare:
    def test_all_won_does_not_mean_always(self):
        """By hand, 16 of 16 with four clusters added is 18 of 20.

        Its standard error is √(0.9 · 0.1/19), and its t has 19 degrees of freedom (2.093).
        """
        found = share_estimate([1.0] * 16, range(16))
        assert found["value"] == 1.0
        assert found["ci95"] == pytest.approx([0.9 - 2.093 * math.sqrt(0.09 / 19), 1.0], abs=1e-3)

    def test_all_lost_is_its_mirror_image(self):
        won, lost = share_estimate([1.0] * 16, range(16)), share_estimate([0.0] * 16, range(16))
        assert lost["value"] == 0.0 and lost["ci95"] == pytest.approx([0.0, 1 - won["ci95"][0]])

    def test_all_tied_does_not_mean_no_difference(self):
        low, high = share_estimate([0.5] * 16, range(16))["ci95"]
        assert low == pytest.approx(0.39, abs=0.01) and high == pytest.approx(0.61, abs=0.01)

    def test_more_of_the_same_makes_it_narrower_and_never_a_point(self):
        widths = [width(share_estimate([1.0] * n, range(n))) for n in (2, 4, 8, 16, 64, 256, 4096)]
        assert widths == sorted(widths, reverse=True) and widths[-1] > 0

    def test_one_cluster_says_next_to_nothing(self):
        found = share_estimate([1.0, 1.0, 0.0], ["a"] * 3)
        assert found["ci95"][0] < 0.15 and found["ci95"][1] > 0.95 and found["clusters"] == 1

    def test_the_value_is_inside_and_the_interval_within_0_and_1(self):
        rng = np.random.default_rng(5)
        for trial in range(300):
            clusters = rng.integers(0, rng.integers(1, 9), rng.integers(1, 30))
            values = rng.choice([0.0, 0.5, 1.0, rng.random()], len(clusters))
            found = share_estimate(values, clusters)
            low, high = found["ci95"]
            assert 0 <= low <= found["value"] <= high <= 1 and low < high, (trial, values, clusters)

    def test_far_from_the_edges_it_is_the_interval_of_the_mean(self):
        """400 flips at ½: the Wald interval ± 1.966 · √(¼/400)."""
        found = share_estimate([0.0, 1.0] * 200, range(400))
        assert found["ci95"] == pytest.approx([0.4508, 0.5492], abs=1e-3)

    def test_near_an_edge_it_reaches_further_towards_one_half(self):
        x = np.random.default_rng(6).beta(18, 2, 60)
        found, mean = share_estimate(x, range(60)), mean_estimate(x, range(60))
        below, above = found["value"] - found["ci95"][0], found["ci95"][1] - found["value"]
        assert below > 1.05 * above and width(found) == pytest.approx(width(mean), rel=0.1)

    def test_against_scipys_binomial_interval(self):
        """14 of 16 in clusters of one: about as wide as Wilson's for independent flips."""
        from scipy.stats import binomtest

        wilson = binomtest(14, 16).proportion_ci(method="wilson")
        found = share_estimate([1.0] * 14 + [0.0] * 2, range(16))
        assert found["ci95"] == pytest.approx([wilson.low, wilson.high], abs=0.05)


class TestDifference:
    def test_it_is_paired(self):
        """The difficulty of a prompt cancels: 0.02 more on each is 0.02."""
        theirs = np.random.default_rng(0).uniform(0.2, 0.6, 50)
        found = difference_estimate(theirs + 0.02, theirs, np.arange(50) // 2)
        assert found["value"] == pytest.approx(0.02) and found["ci95"] == pytest.approx([0.02, 0.02])
        assert (found["n"], found["clusters"]) == (50, 25)

    def test_turned_round_it_is_its_negative(self):
        rng = np.random.default_rng(3)
        ours, theirs, task = rng.random(30), rng.random(30), rng.integers(0, 7, 30)
        one, other = difference_estimate(ours, theirs, task), difference_estimate(theirs, ours, task)
        assert one["ci95"] == pytest.approx([-other["ci95"][1], -other["ci95"][0]])


class TestWinRate:
    def test_ties_count_half(self):
        found = win_rate([[3], [2], [1], [1]], [[1], [2], [1], [5]], "abcd")  # win, tie, tie, loss
        assert found["value"] == 0.5 and (found["n"], found["clusters"]) == (4, 4)
        assert found["ci95"][0] <= 0.5 <= found["ci95"][1]

    def test_every_sample_meets_every_other(self):
        """(3, 1) against (2, 1, 0): 3 beats all three; 1 beats 0, ties 1, loses to 2."""
        assert wins([[3.0, 1.0]], [[2.0, 1.0, 0.0]]).tolist() == [pytest.approx(4.5 / 6)]

    def test_against_itself_it_is_one_half_exactly(self):
        judged = np.arange(6.0).reshape(3, 2)
        found = win_rate(judged, judged, "abc")
        assert found["value"] == 0.5 and found["ci95"][0] < 0.5 < found["ci95"][1]

    def test_the_other_side_has_the_rest(self):
        rng = np.random.default_rng(3)
        ours, theirs, task = rng.integers(0, 4, (50, 2)), rng.integers(0, 4, (50, 3)), rng.integers(0, 20, 50)
        one, other = win_rate(ours, theirs, task), win_rate(theirs, ours, task)
        assert one["value"] + other["value"] == pytest.approx(1.0)
        assert one["ci95"] == pytest.approx([1 - other["ci95"][1], 1 - other["ci95"][0]])

    def test_other_prompts_are_refused(self):
        with pytest.raises(ValueError, match="ours has 1 prompts and theirs 3"):
            win_rate([[1.0]], [[1.0], [2.0], [3.0]], "abc")
        with pytest.raises(ValueError):
            difference_estimate([1.0], [1.0, 2.0, 3.0], "abc")

    def test_prompts_of_one_task_are_one_cluster(self):
        """12 prompts of 4 tasks, won or lost as a task: an interval as of 4, not of 12."""
        ours = np.repeat([[1.0], [1.0], [-1.0], [1.0]], 3, axis=0)
        tasks = win_rate(ours, np.zeros((12, 1)), np.repeat(np.arange(4), 3))
        assert tasks["ci95"] == pytest.approx(win_rate(ours[::3], np.zeros((4, 1)), range(4))["ci95"])
        assert width(tasks) > 1.3 * width(win_rate(ours, np.zeros((12, 1)), range(12)))


class TestPairAccuracy:
    def test_counts_pairs_and_ties_half(self):
        found = pair_accuracy([1.0, -1.0, 0.0, 2.0], [0, 0, 1, 1])
        assert found["accuracy"] == pytest.approx(2.5 / 4) and (found["n_pairs"], found["n_clusters"]) == (4, 2)

    def test_its_interval_is_over_prompts(self):
        """Nine right pairs of one prompt and a wrong one of another are two clusters."""
        found = pair_accuracy([1.0] * 9 + [-1.0], [7] * 9 + [3])
        assert found["accuracy"] == pytest.approx(0.9)
        assert found["accuracy_ci95"][0] < 0.2 and found["accuracy_ci95"][1] > 0.95

    def test_pairs_of_a_prompt_are_worth_one(self):
        right = np.random.default_rng(7).choice([1.0, -1.0], 40)
        of_ten = pair_accuracy(np.repeat(right, 10), np.repeat(np.arange(40), 10))
        assert of_ten["accuracy_ci95"] == pytest.approx(pair_accuracy(right, range(40))["accuracy_ci95"])


def margin(confidence):
    return math.log(confidence / (1 - confidence))


class TestCalibration:
    def test_perfectly_calibrated_is_zero(self):
        """Of ten pairs at confidence 0.8, eight right."""
        assert expected_calibration_error([margin(0.8)] * 8 + [-margin(0.8)] * 2) == pytest.approx(0.0, abs=1e-12)

    def test_sure_and_always_wrong_is_one(self):
        assert expected_calibration_error([-1000.0] * 4) == pytest.approx(1.0)

    def test_two_bins_by_hand(self):
        """Two pairs at 0.92 are off by 0.42, and four at 0.61 by 0.39; sizes are weights."""
        margins = [margin(0.92), -margin(0.92), *[margin(0.61)] * 4]
        assert expected_calibration_error(margins) == pytest.approx((2 * 0.42 + 4 * 0.39) / 6)

    def test_ten_bins_lie_between_one_half_and_one(self):
        """0.61 (right) and 0.68 (wrong) are in two bins, which are off by 0.39 and 0.68."""
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


def agreed(rankings) -> float | None:
    """Return how often labelers agree."""
    estimate = labeler_agreement(rankings)
    return None if estimate is None else estimate["value"]


class TestAgreement:
    def test_is_the_share_of_untied_pairs_ordered_alike(self):
        """(1,2,3) and (1,3,2): two of three pairs alike."""
        assert agreed([ranked((1, 2, 3)), ranked((1, 3, 2))]) == pytest.approx(2 / 3)

    def test_same_and_opposite(self):
        assert agreed([ranked((1, 2, 3)), ranked((1, 2, 3))]) == 1.0
        assert agreed([ranked((1, 2, 3)), ranked((3, 2, 1))]) == 0.0

    def test_ties_and_unjudged_responses_are_left_out(self):
        assert agreed([ranked((1, 1, 2)), ranked((1, 2, 3))]) == 1.0  # pair (a, b) is tied for one
        assert agreed([ranked((1, 2, None)), ranked((2, 1, 3))]) == 0.0

    def test_three_labelers_make_three_pairs_of_labelers(self):
        rankings = [
            ranked((1, 2), responses=("a", "b")),
            ranked((1, 2), responses=("a", "b")),
            ranked((2, 1), responses=("a", "b")),
        ]
        assert agreed(rankings) == pytest.approx(1 / 3)

    def test_only_the_same_prompt_and_responses_are_compared(self):
        assert agreed([ranked((1, 2, 3)), ranked((1, 2, 3), prompt="q")]) is None
        assert agreed([ranked((1, 2, 3)), ranked((1, 2, 3), responses=("a", "b", "d"))]) is None
        cut = replace(ranked((1, 2, 3)), finished=(True, True, False))  # another response, though of the same text
        assert agreed([ranked((1, 2, 3)), cut]) is None

    def test_message_prompts_are_compared_by_their_content(self):
        prompt = ({"role": "user", "content": "p"},)
        assert agreed([ranked((1, 2, 3), prompt), ranked((1, 2, 3), tuple(dict(m) for m in prompt))]) == 1.0


class TestParts:
    def test_accuracy_by_key_counts_ties_half_and_sorts_keys_as_numbers(self):
        margins, keys, clusters = [1.0, -1.0, 0.0, 2.0, -3.0], [10, 2, 2, 2, 10], list("aabcc")
        found = accuracy_by(margins, keys, clusters)
        shares = {key: (part["accuracy"], part["n_pairs"]) for key, part in found.items()}
        assert shares == {"2": (0.5, 3), "10": (0.5, 2)}
        assert list(found) == ["2", "10"]
        assert found["2"] == pair_accuracy([-1.0, 0.0, 2.0], list("abc"))  # its interval, too

    def test_the_reliability_curve_by_hand(self):
        """Margins ±ln 4: confidence 0.8, two of three right. Margin 0: ½, half right."""
        curve = reliability([math.log(4), math.log(4), -math.log(4), 0.0])
        assert [b["n_pairs"] for b in curve] == [1, 3]
        assert curve[0]["confidence"] == 0.5 and curve[0]["accuracy"] == 0.5
        assert curve[1]["confidence"] == pytest.approx(0.8) and curve[1]["accuracy"] == pytest.approx(2 / 3)

    def test_agreement_of_each_two_labelers(self):
        """ada and ben agree on 2 of 3 pairs; cleo left one response out and tied another."""
        ranks = {"ben": (1, 3, 2), "ada": (1, 2, 3), "cleo": (2, 1, None)}
        rows = [Ranking("x", "p", ("a", "b", "c"), r, who) for who, r in ranks.items()]
        found = agreements(rows)
        assert found == {("ada", "ben"): {"p": (2, 3)}, ("ada", "cleo"): {"p": (0, 1)}, ("ben", "cleo"): {"p": (0, 1)}}
        assert agreed(rows) == pytest.approx(2 / 5)

    def test_its_interval_is_over_prompts_whose_pairs_are_not_independent(self):
        """Ten pairs of each prompt agree or disagree together: twelve facts, not 120."""
        rows = []
        for i in range(12):
            orders = ((1, 2, 3, 4, 5), (1, 2, 3, 4, 5) if i % 3 else (5, 4, 3, 2, 1))
            rows += [ranked(ranks, prompt=f"p{i}", responses=tuple("abcde")) for ranks in orders]
        found = labeler_agreement(rows)
        assert found["value"] == pytest.approx(2 / 3) and (found["n"], found["clusters"]) == (120, 12)
        expected = share_estimate([float(bool(i % 3)) for i in range(12)], range(12))
        assert found["ci95"] == pytest.approx(expected["ci95"])
        same = labeler_agreement(rows[2:4] + rows[4:6])
        assert same["value"] == 1.0 and same["ci95"][0] < 0.9, "two prompts are no certainty"

    def test_the_calibration_error_has_an_interval(self):
        rng = np.random.default_rng(0)
        margins = rng.normal(0.5, 1.0, 300)
        low, high = calibration_interval(margins, np.repeat(np.arange(100), 3))
        assert 0.0 <= low < expected_calibration_error(margins) < high < 0.5
        assert calibration_interval([1.0, -1.0], ["a", "b"]) is None

    def test_the_standard_error_is_that_of_a_mean_of_cluster_means(self):
        x = np.random.default_rng(1).normal(size=30)
        assert mean_estimate(x, range(30))["se"] == pytest.approx(x.std(ddof=1) / np.sqrt(30))
        assert mean_estimate(np.repeat(x, 4), np.repeat(range(30), 4))["se"] == pytest.approx(
            x.std(ddof=1) / np.sqrt(30)
        )
        assert mean_estimate([1.0, 2.0], ["a", "a"])["se"] is None
