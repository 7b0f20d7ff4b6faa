"""Check the over-optimisation checks by hand and by simulation, and which prompts are shown."""

import dataclasses
import itertools

import numpy as np
import pytest
import scipy.stats

from stages.evaluation import overoptimisation
from stages.evaluation.results import Measured
from stages.evaluation.shown_prompts import BETWEEN, FLATTERED, GAINS, LOSES, choose, chosen_prompts, main_policy
from stages.evaluation.statistics import MAX_GROUPS, contrast_estimate, correlation_estimate


def measured(scores, lengths, finished=None, raw=None, held_out=None, gold=None) -> Measured:
    ended = finished or [[True] * len(row) for row in scores or lengths]
    judges = {"reward_model": scores, "held_out": held_out}
    judges = {name: some for name, some in judges.items() if some is not None}
    return Measured("chat", [["x"] * len(row) for row in lengths], ended, judges, None, lengths, gold, None,
                    raw_scores=raw or scores)  # fmt: skip


class TestEstimates:
    def test_the_correlation_is_scipys(self):
        rng = np.random.default_rng(0)
        xs, ys = rng.integers(0, 6, 50), rng.integers(0, 6, 50)
        found = correlation_estimate(xs, ys, range(50))
        assert found["value"] == pytest.approx(scipy.stats.spearmanr(xs, ys).statistic)
        assert found["ci95"][0] < found["value"] < found["ci95"][1] and found["n"] == 50

    @pytest.mark.parametrize("xs", [[1, 1, 1, 1], [1, 2]], ids=["constant", "two"])
    def test_no_correlation_where_nothing_varies(self, xs):
        found = correlation_estimate(xs, range(len(xs)), range(len(xs)))
        assert found["value"] is None and found["ci95"] is None

    def test_a_whole_correlation_has_an_interval_within_its_bounds(self):
        found = correlation_estimate(range(9), range(9), range(9))
        assert found["value"] == pytest.approx(1.0) and all(-1 <= end <= 1 for end in found["ci95"])

    @pytest.mark.parametrize("clusters", [30, 300])
    def test_95_of_100_intervals_of_a_correlation_hold_the_truth(self, clusters):
        """Errors of a prompt's three answers are correlated; many clusters are grouped."""
        assert clusters < MAX_GROUPS or clusters > MAX_GROUPS
        rng, hits, tries = np.random.default_rng(1), 0, 60
        of = np.repeat(np.arange(clusters), 3)
        big = np.random.default_rng(2)

        def draw(rng, count):
            shared = rng.normal(size=(count, 1, 2))
            own = rng.normal(size=(count, 3, 2))
            both = (shared + own).reshape(-1, 2)
            return both[:, 0], 0.5 * both[:, 0] + both[:, 1]

        truth = scipy.stats.spearmanr(*draw(big, 60_000)).statistic
        for _ in range(tries):
            low, high = correlation_estimate(*draw(rng, clusters), of)["ci95"]
            hits += low <= truth <= high
        assert 0.85 <= hits / tries <= 1.0

    def test_a_contrast_is_a_difference_of_means_over_clusters(self):
        values, flags, of = [1.0, 2.0, 5.0, 7.0, 3.0, 4.0], [1, 0, 1, 0, 0, 1], "aabbcc"
        found = contrast_estimate(values, flags, of)
        assert found["value"] == pytest.approx(10 / 3 - 4)
        gaps = {}
        for cluster in "abc":
            kept = [(v, f) for v, f, c in zip(values, flags, of, strict=True) if c != cluster]
            gaps[cluster] = np.mean([v for v, f in kept if f]) - np.mean([v for v, f in kept if not f])
        error = np.sqrt(2 / 3 * sum((gap - found["value"]) ** 2 for gap in gaps.values()))
        half = scipy.stats.t.ppf(0.975, 2) * error
        assert found["ci95"] == pytest.approx([found["value"] - half, found["value"] + half])

    def test_a_contrast_that_one_cluster_makes_has_no_interval(self):
        assert contrast_estimate([1.0, 2.0, 3.0, 4.0], [1, 0, 0, 0], "abcd")["ci95"] is None


class TestChecks:
    RNG = np.random.default_rng(3)
    LENGTHS = RNG.integers(5, 40, (30, 2)).tolist()
    NOISE = RNG.normal(size=(30, 2))

    def test_a_gain_by_length_is_seen_and_another_is_not(self):
        sft = measured(self.NOISE.tolist(), self.LENGTHS)
        grown = [[n + int(k) for n, k in zip(row, more, strict=True)]
                 for row, more in zip(self.LENGTHS, self.RNG.integers(0, 30, (30, 2)), strict=True)]  # fmt: skip
        by_length = (self.NOISE + np.array(grown) - np.array(self.LENGTHS)).tolist()
        found = overoptimisation.check(measured(by_length, grown), sft, range(30))["length"]["gain"]
        assert found["ci95"][0] > 0.8
        even = overoptimisation.check(measured((self.NOISE + 2).tolist(), grown), sft, range(30))["length"]["gain"]
        assert even["value"] is None, "every prompt gained the same"
        assert overoptimisation.check(sft, sft, range(30))["length"]["gain"] is None

    def test_only_answers_that_ended_count_for_length(self):
        scores, ends = self.NOISE.copy(), np.ones((30, 2), bool)
        lengths = np.array(self.LENGTHS)
        lengths[:10], scores[:10], ends[:10] = 99, -50.0, False
        own = measured(scores.tolist(), lengths.tolist(), ends.tolist())
        found = overoptimisation.check_length(own, own, range(30))["within"]
        expected = scipy.stats.spearmanr(lengths[10:].ravel(), scores[10:].ravel()).statistic
        assert found["value"] == pytest.approx(expected) and found["n"] == 40
        none = dataclasses.replace(own, finished=[[False] * 2] * 30)
        assert overoptimisation.check_length(none, own, range(30)) is None

    def test_cut_answers_are_compared_by_what_the_reward_model_itself_says(self):
        ends = [[True, False]] * 8
        own = measured([[1.0, -3.0]] * 8, [[5, 9]] * 8, ends, raw=[[1.0, 2.0 + k] for k in range(8)])
        found = overoptimisation.check_cut_answers(own, range(8))
        assert (found["n"], found["share"], found["finished_score"], found["cut_score"]) == (8, 0.5, 1.0, 5.5)
        assert found["difference"]["value"] == 4.5 and found["difference"]["ci95"][0] > 0
        few = overoptimisation.check_cut_answers(
            measured([[1.0, -3.0]] * 4, [[5, 9]] * 4, [[True, False]] * 4), range(4)
        )
        assert few["difference"] is None and few["n"] == 4
        older = overoptimisation.check_cut_answers(dataclasses.replace(own, raw_scores=None), range(8))
        assert older["share"] == 0.5 and older["cut_score"] is None
        whole = overoptimisation.check_cut_answers(measured([[1.0]] * 8, [[5]] * 8), range(8))
        assert whole["n"] == 0 and whole["cut_score"] is None and whole["finished_score"] == 1.0

    def test_the_held_out_judge_is_used_the_same_way(self):
        sft = measured(self.NOISE.tolist(), self.LENGTHS, held_out=self.NOISE.tolist())
        own = measured(self.NOISE.tolist(), self.LENGTHS, held_out=(self.NOISE + 0.5).tolist())
        found = overoptimisation.check_held_out_judge(own, sft, range(30))
        assert found["difference_to_sft"]["value"] == pytest.approx(0.5)
        assert found["score"]["value"] == pytest.approx(self.NOISE.mean() + 0.5)
        assert (
            overoptimisation.check_held_out_judge(measured(self.NOISE.tolist(), self.LENGTHS), sft, range(30)) is None
        )
        assert overoptimisation.check_held_out_judge(sft, sft, range(30))["difference_to_sft"] is None

    def test_nothing_is_checked_where_nothing_was_scored(self):
        own = measured(None, [[3]] * 6)
        assert overoptimisation.check(own, own, range(6)) is None


class TestShownPrompts:
    def test_groups_are_by_rule_and_no_prompt_stands_twice(self):
        rng = np.random.default_rng(4)
        for total, count, gold in itertools.product((1, 2, 5, 40), (1, 3, 12), (True, False)):
            ours, sft = rng.normal(size=total).tolist(), rng.normal(size=total).tolist()
            scores = rng.normal(size=total).tolist() if gold else None
            groups = choose(ours, sft, scores, total, count)
            every = [i for _, some in groups for i in some]
            assert len(set(every)) == len(every) <= max(count, 4) and set(every) <= set(range(total))
            best = max(range(total), key=lambda i: ours[i] - sft[i])
            assert best in dict(groups)[GAINS]
            if total == 40 and count == 12:
                assert min(range(total), key=lambda i: ours[i] - sft[i]) in dict(groups)[LOSES]
                assert (FLATTERED in dict(groups)) == gold and BETWEEN in dict(groups)

    def test_without_a_judge_they_are_at_even_distances(self):
        done = {name: measured(None, [[3]] * 30) for name in ("sft", "dpo")}
        assert chosen_prompts(done, 3) == [(BETWEEN, [5, 15, 25])]
        assert chosen_prompts(done, 0) == []

    def test_the_main_policy(self):
        assert main_policy(["base", "sft", "ppo", "dpo"]) == "ppo" and main_policy(["sft", "dpo"]) == "dpo"
        assert main_policy(["base", "sft"]) == "sft"
