"""Test the page of claims: verdicts and fits along a second route, what is kept, and the page."""

import json
import math
import shutil
import sys
from argparse import Namespace
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from scipy.optimize import curve_fit

sys.path.insert(0, str(Path(__file__).resolve().parent))  # benchmarks import each other from their own folder

import claims
from claims_rows import (
    by_judge,
    catalogue,
    climbed,
    demo,
    early,
    fits,
    killed,
    overoptimisation,
    pictures,
    preferences,
    proxies,
    reward_models,
    rule,
    sentiment,
    tax,
    whole_rankings,
)
from claims_rows.page import Entry, page, seeds_text
from claims_rows.row import Figure, Measurement, Row, derived, finding_of, minus, reader
from claims_rows.verdicts import (
    FAILS,
    HOLDS,
    NOT_RUN,
    UNTOLD,
    WEAKER,
    Rule,
    claims_difference,
    combined,
    in_words,
    verdict_of,
)
from sweeps.estimates import Series, over_seeds
from sweeps.runner import run_command

from pipeline.errors import Interrupted, UserError
from stages.page.drawing import picture
from tests.shipped import settings_for


class TestVerdicts:
    @pytest.mark.parametrize(
        "value, ci95, rule, verdict",
        [
            (0.10, (0.05, 0.15), Rule(nothing=0.03, enough=0.06), HOLDS),
            (0.05, (0.01, 0.09), Rule(nothing=0.03, enough=0.06), WEAKER),
            (0.05, (-0.01, 0.11), Rule(nothing=0.03), UNTOLD),
            (0.00, (-0.02, 0.02), Rule(nothing=0.03), FAILS),  # at most a difference that counts as none
            (-0.2, (-0.3, -0.1), Rule(nothing=0.03), FAILS),
            (0.01, (0.005, 0.015), Rule(nothing=0.03), FAILS),  # surely there, and too little to count
            (0.02, (0.005, 0.035), Rule(nothing=0.03), WEAKER),
            (-0.2, (-0.3, -0.1), Rule("below", nothing=0.03), HOLDS),
            (0.2, (0.1, 0.3), Rule("below", nothing=0.03), FAILS),
            (-0.01, (-0.02, 0.0), Rule(than=-0.03), HOLDS),  # not lower by more than 0.03
            (-0.04, (-0.05, -0.03), Rule(than=-0.03), FAILS),
            (0.95, (0.92, 0.98), Rule(than=0.9), HOLDS),
            (0.01, (-0.02, 0.03), Rule("equal", nothing=0.03), HOLDS),
            (0.01, (-0.04, 0.06), Rule("equal", nothing=0.03), UNTOLD),
            (-0.1, (-0.16, -0.04), Rule("equal", nothing=0.03), FAILS),
            (1.0, None, Rule("exactly", than=1), HOLDS),
            (0.8, None, Rule("exactly", than=1), FAILS),
            (0.1, None, Rule(), UNTOLD),  # one seed
            (0.1, (0.1, 0.1), Rule(), UNTOLD),  # an interval without width says nothing of other seeds
            (None, None, Rule(), UNTOLD),
        ],
    )
    def test_by_hand(self, value, ci95, rule, verdict):
        assert verdict_of(value, ci95, rule) == verdict

    def test_below_mirrors_above(self):
        rng = np.random.default_rng(0)
        for _ in range(300):
            low, value, high = sorted(rng.normal(0, 0.1, 3))
            sizes = dict(zip(("nothing", "enough"), rng.uniform(0, 0.1, 2), strict=True))
            above = verdict_of(value, (low, high), Rule("above", 0.2, **sizes))
            mirrored = verdict_of(0.4 - value, (0.4 - high, 0.4 - low), Rule("below", 0.2, **sizes))
            assert above == mirrored

    def test_no_effect_is_called_one_at_most_as_often_as_the_interval_says(self):
        """Of true differences of 0, at most 2.5 % hold, by simulation of five seeds."""
        rng = np.random.default_rng(1)
        rule, drawn = Rule(), rng.normal(size=(4000, 5))
        figure = Figure("x", reader("x"), rule)
        row = Row("r", "p", "c", "s", "w", MEASUREMENT, (figure,), lambda observed: [])
        found = [finding_of(row, {seed: {"x": x} for seed, x in enumerate(values)})["verdict"] for values in drawn]
        assert 0.015 < found.count(HOLDS) / len(found) < 0.035

    def test_other_figures_weaken(self):
        assert combined(HOLDS) == combined(HOLDS, [HOLDS, HOLDS]) == HOLDS
        assert combined(HOLDS, [HOLDS, UNTOLD]) == combined(HOLDS, [FAILS]) == combined(HOLDS, [WEAKER]) == WEAKER
        assert [combined(main, [HOLDS]) for main in (WEAKER, FAILS, UNTOLD, NOT_RUN)] == [
            WEAKER, FAILS, UNTOLD, NOT_RUN,
        ]  # fmt: skip

    def test_rules_that_no_difference_refutes(self):
        assert claims_difference(Rule(nothing=0.03)) and claims_difference(Rule("below"))
        assert not any(map(claims_difference, (Rule(than=-0.03), Rule("equal", nothing=0.03), Rule("exactly"))))

    def test_a_rule_in_words(self):
        text = in_words(Rule("below", than=0.1, nothing=0.03, enough=0.06))
        assert "below 0.10" in text and "at least 0.06 away" in text and "above 0.07" in text
        assert "±0.03 of 0.00" in in_words(Rule("equal", nothing=0.03))

    @pytest.mark.parametrize("wrong", [{"nothing": -1}, {"direction": "equal"}, {"direction": "exactly", "nothing": 1}])
    def test_a_rule_that_contradicts_itself_is_refused(self, wrong):
        with pytest.raises(ValueError, match=r"Rule\("):
            Rule(**wrong)


class TestFits:
    D = np.array([0.3, 0.6, 0.9, 1.2, 1.6, 2.0, 2.4, 3.0])

    @pytest.mark.parametrize(
        "form, equation",
        [("best_of_n", lambda d, a, b: d * (a - b * d)), ("rl", lambda d, a, b: d * (a - b * np.log(d)))],
    )
    def test_known_coefficients_are_found_again(self, form, equation):
        """Fit noisy points; scipy's iterative least squares finds the same values."""
        noise = np.random.default_rng(2).normal(0, 0.005, len(self.D))
        reward = equation(self.D, 0.4, 0.15) + noise
        found = fits.fit(form, self.D, reward)
        (alpha, beta), _ = curve_fit(equation, self.D, reward, p0=(1.0, 1.0))
        assert (found.alpha, found.beta) == pytest.approx((alpha, beta), rel=1e-5)
        assert (found.alpha, found.beta) == pytest.approx((0.4, 0.15), abs=0.01)
        assert found.residuals == pytest.approx(reward - equation(self.D, alpha, beta), abs=1e-6)
        assert found.r_squared == pytest.approx(1 - np.square(found.residuals).sum() / np.square(reward).sum())
        grid = np.linspace(0.01, 20, 200_000)
        assert fits.peak(found) == pytest.approx(grid[equation(grid, alpha, beta).argmax()], abs=1e-3)

    def test_a_straight_line_has_no_peak(self):
        found = fits.fit("best_of_n", self.D, 0.3 * self.D)
        assert found.alpha == pytest.approx(0.3) and found.beta == pytest.approx(0, abs=1e-12)
        assert fits.peak(replace(found, beta=-0.1)) is None

    def test_sft_itself_changes_no_fit(self):
        """A point at d = 0 with R = 0 is on every curve."""
        reward = 0.4 * self.D - 0.1 * self.D**2 + 0.01 * np.cos(9 * self.D)
        for form in ("best_of_n", "rl"):
            with_zero = fits.fit(form, [0.0, *self.D], [0.0, *reward])
            without = fits.fit(form, self.D, reward)
            assert (with_zero.alpha, with_zero.beta) == pytest.approx((without.alpha, without.beta))

    def test_extrapolation_on_points_left_out(self):
        """Points of the very curve are foretold; a straight line is far off, by a closed form."""
        reward = 0.4 * self.D - 0.15 * self.D**2
        order = np.random.default_rng(3).permutation(len(self.D))
        tried = fits.extrapolate("best_of_n", self.D[order], reward[order], 2)
        assert sorted(self.D[order][list(tried.left_out)]) == [2.4, 3.0] and tried.rms < 1e-12
        kept = self.D[:6]
        slope = 0.4 - 0.15 * (kept**3).sum() / (kept**2).sum()
        expected = [0.4 * d - 0.15 * d**2 - slope * d for d in (2.4, 3.0)]
        assert tried.line_rms == pytest.approx(math.sqrt(np.mean(np.square(expected))))

    def test_too_few_points_are_refused(self):
        with pytest.raises(ValueError, match="at least two different values"):
            fits.fit("rl", [0.0, 0.5, 0.5], [0.0, 0.1, 0.1])

    def test_share_that_a_line_explains(self):
        assert fits.line_share([1, 2, 3], [0.2, 0.4, 0.6]) == pytest.approx(1)
        assert fits.line_share([1, 1], [1.0, -1.0]) == pytest.approx(0)
        assert fits.line_share([1, 2], [0.0, 0.0]) is None and fits.line_share([0, 0], [0.1, 0.2]) is None
        assert fits.fit("rl", [1, 2], [0.0, 0.0]).r_squared is None

    def test_gap_at_equal_kl(self):
        """Compare lines of slopes 0.3 and 0.1 in √KL, from 0 to 1: the mean gap is 0.1."""
        ours, theirs = [(0, 0), (1, 0.3)], [(0, 0), (0.25, 0.05), (4, 0.2)]
        assert fits.gap_at_equal_kl(ours, theirs) == pytest.approx(0.1)
        assert fits.gap_at_equal_kl(theirs, ours) == pytest.approx(-0.1)
        assert fits.gap_at_equal_kl([(1, 0.1), (2, 0.1)], [(3, 0.1), (4, 0.1)]) is None

    def test_a_power_law_is_found_again(self):
        sizes = np.array([50, 100, 200, 400])
        noise = np.exp(np.random.default_rng(4).normal(0, 0.01, 4))
        found = fits.power_law(sizes, 2 * sizes**-0.3 * noise)
        (scale, exponent), _ = curve_fit(
            lambda n, c, s: np.log(c) - s * np.log(n), sizes, np.log(2 * sizes**-0.3 * noise), p0=(1, 0.5)
        )
        assert (found.scale, found.exponent) == pytest.approx((scale, exponent), rel=1e-4)
        assert found.exponent == pytest.approx(0.3, abs=0.02) and found.r_squared > 0.99
        with pytest.raises(ValueError, match="positive"):
            fits.power_law([10, 20], [0.1, 0.0])


def frontier(seed: int) -> dict:
    """Return invented points: gold bends down over KL for PPO and best of n, and not for DPO."""
    points = [{"method": "best_of_n", "value": n, "kl": math.log(n) - (n - 1) / n} for n in (1, 2, 4, 8, 16, 32, 64)]
    points += [{"method": "ppo", "value": c, "kl": 0.2 / (c + 0.02)} for c in (0.0, 0.02, 0.1, 0.5, 1.0)]
    points += [{"method": "dpo", "value": b, "kl": 0.4 / b} for b in (0.1, 0.5, 1.0)]
    for point in points:
        d = math.sqrt(point["kl"])
        bend = {"best_of_n": 0.15 * d, "ppo": 0.15 * math.log(d) if d else 0, "dpo": 0}[point["method"]]
        point["gold"] = 0.5 + 0.1 * seed + d * (0.3 + 0.01 * seed - bend)
        point["score"] = 2 * d
    return {"points": points, "own": {"ppo": 0.1, "dpo": 0.5}}


OBSERVED = {seed: frontier(seed) for seed in (3, 4, 5)}


class TestOverOptimisation:
    @staticmethod
    def finding(key: str) -> dict:
        """Return what was found for a row."""
        (row,) = [row for row in overoptimisation.ROWS if row.key == key]
        return finding_of(row, OBSERVED)

    def test_coefficients_of_each_seed(self):
        """Gains are less SFT's own gold, which differs by seed."""
        for method, form in (("best_of_n", "best_of_n"), ("ppo", "rl")):
            figures = overoptimisation.gao(method, form)
            row = replace(overoptimisation.ROWS[0], figures=figures)
            finding = finding_of(row, OBSERVED)
            explained, beta, foretold = finding["figures"]
            assert list(beta["by_seed"].values()) == pytest.approx([0.15] * 3)
            assert list(explained["by_seed"].values()) == pytest.approx([1.0] * 3)
            assert all(error < -0.1 for error in foretold["by_seed"].values())

    def test_shares_of_what_is_explained_stay_between_0_and_1(self):
        """Their intervals do, too, where Student's t reaches beyond; every row names its shares."""
        row = replace(overoptimisation.ROWS[0], figures=overoptimisation.gao("best_of_n", "best_of_n")[:1])
        d, bent = np.array([0.5, 1.0, 1.5, 2.0]), np.array([1.0, -1.0, 1.0, -1.0])
        found = {seed: self.of_best_of_n(d, d * (0.3 - 0.1 * d) + 0.01 * seed * bent) for seed in range(3)}
        (figure,) = finding_of(row, found)["figures"]
        values = list(figure["by_seed"].values())
        assert over_seeds(values)["ci95"][1] > 1, "the case tells both apart"
        assert 0 <= figure["ci95"][0] < figure["value"] < figure["ci95"][1] <= 1
        for row in catalogue.ROWS:
            for one in row.figures:
                is_share = one.name.startswith(("share of", "accuracy")) and "−" not in one.name
                assert one.share or not is_share or one.rule.direction == "exactly", f"{row.key}: {one.name}"

    def test_rounding_leads_out_of_no_share(self):
        assert fits.share_explained(1.0 + 1e-12, 1.0) == 0 and fits.share_explained(-1e-12, 1.0) == 1
        assert fits.share_explained(0.25, 1.0) == 0.75

    def test_the_curve_against_a_straight_line(self):
        """Compute the share explained of what a line leaves from sums of squares."""
        d = np.array([0.5, 1.0, 1.5, 2.0])
        noise = np.array([0.01, -0.02, 0.02, -0.01])
        found = self.of_best_of_n(d, d * (0.3 - 0.1 * d) + noise)
        gold = np.array([point["gold"] for point in found["points"][1:]]) - 0.5
        (slope,), (line,) = np.linalg.lstsq(d[:, None], gold, rcond=None)[:2]
        bent = np.square(fits.fit("best_of_n", d, gold).residuals).sum()
        read = overoptimisation.beyond_line("best_of_n", "best_of_n")
        assert read(found) == pytest.approx(1 - bent / line) and slope > 0
        assert read(self.of_best_of_n(d, 0.2 * d)) is None

    @staticmethod
    def of_best_of_n(d: np.ndarray, gains: np.ndarray) -> dict:
        """Return what is found on a seed with these gains over SFT at these √KL."""
        points = [{"method": "best_of_n", "value": 1, "kl": 0.0, "gold": 0.5, "score": 0.0}]
        for i, (root, gain) in enumerate(zip(d, gains, strict=True)):
            points.append({"method": "best_of_n", "value": 2 + i, "kl": root**2, "gold": 0.5 + gain, "score": gain})
        return {"points": points}

    def test_methods_are_compared_between_measured_points(self):
        """A line from SFT to a far first point would call the bent curve of the same gold lower."""
        found = self.of_best_of_n(np.array([0.5, 1.0, 2.0]), np.array([0.1, 0.2, 0.3]))
        for kl, gain in ((1.0, 0.2), (4.0, 0.3)):
            found["points"].append({"method": "ppo", "value": 1 / kl, "kl": kl, "gold": 0.5 + gain})
        assert overoptimisation.gap("best_of_n", "ppo")(found) == pytest.approx(0.0)
        found["points"][-1]["gold"] -= 0.04
        assert overoptimisation.gap("best_of_n", "ppo")(found) == pytest.approx(0.02)
        found["points"] = [point for point in found["points"] if point["kl"] in (0.0, 0.25, 4.0)]
        assert overoptimisation.gap("best_of_n", "ppo")(found) is None

    def test_training_on_against_the_own_penalty(self):
        points = [{"method": "early", "value": n, "gold": 0.8 - n / 100, "score": n} for n in (1, 4, 9)]
        points += [{"method": "ppo", "value": c, "gold": 0.7 + c, "score": 2.0} for c in (0.02, 0.1)]
        found = {"points": points, "own": {"ppo": 0.1}}
        assert early.trained_on("gold")(found) == pytest.approx(0.71 - 0.8)
        assert early.trained_on("score")(found) == pytest.approx(7.0)

    def test_a_line_in_root_kl_against_one_in_kl(self):
        def read(d: list[float], gains: list[float]) -> list[float | None]:
            found = self.of_best_of_n(np.array(d), np.array(gains))
            found["points"] += [{**point, "method": "early"} for point in found["points"][1:]]
            return [figure.read(found) for figure in row.figures]

        (row,) = [row for row in early.ROWS if row.key == "linear-in-root-kl"]
        share, more = read([0.4, 0.8, 1.2, 3.0], [0.4, 0.8, 1.2, 0.0])  # the last lies beyond 2 nats
        assert share == pytest.approx(1.0)
        assert more == pytest.approx(1.0 - fits.line_share([0.16, 0.64, 1.44], [0.4, 0.8, 1.2]))
        assert read([0.4, 0.8], [0.4, 0.8]) == [None, None], "a line explains two points"

    def test_the_furthest_setting_against_the_own(self):
        gold, score = self.finding("overoptimisation-ppo")["figures"]
        start, end = math.sqrt(0.2 / 0.12), math.sqrt(0.2 / 0.02)
        expected = end * (0.33 - 0.15 * math.log(end)) - start * (0.33 - 0.15 * math.log(start))
        assert gold["by_seed"][3] == pytest.approx(expected)
        assert score["by_seed"][3] == pytest.approx(2 * (end - start))
        assert overoptimisation.near_line("ppo", "score")(OBSERVED[3]) == pytest.approx(1.0)

    def test_curves_with_fit_and_residuals_are_drawn(self):
        drawn = overoptimisation.plot_of(("ppo",), "gold", "rl"), overoptimisation.residuals_plot("ppo", "rl")
        curve, residuals = overoptimisation.both(*drawn)(OBSERVED)
        assert "PPO:" in picture(curve).svg and ">5<" in picture(residuals).svg


class TestReadings:
    """Check what rows compute from what was found on one seed."""

    @staticmethod
    def conditions(**perplexities: float) -> dict:
        """Return the conditions of the tax with these perplexities."""
        names = {"plain1": "plain PPO, kl_coef × 1", "plain9": "plain PPO, kl_coef × 9", "ptx": "PPO-ptx", "sft": "sft"}
        settings = {"plain1": {"kl_coef": 0.1}, "plain9": {"kl_coef": 0.9}, "ptx": {"kl_coef": 0.1}, "sft": {}}
        return {
            "conditions": {
                names[key]: {
                    "perplexity": value,
                    "held_out": 0.5,
                    "facts": 0.6,
                    "setting": {"ptx_coef": 1.0, **settings[key]},
                }
                for key, value in perplexities.items()
            }
        }

    def test_the_best_penalty_is_taken_for_the_tax(self):
        found = self.conditions(plain1=3.0, plain9=2.4, ptx=2.5, sft=2.6)
        assert tax.least_over_kl(tax.PTX)(found) == pytest.approx(-0.1)
        by_key = {row.key: row for row in tax.ROWS}
        values = {key: [figure.read(found) for figure in row.figures] for key, row in by_key.items()}
        assert values["tax-exists"] == pytest.approx([0.4]) and values["tax-gamma"] == pytest.approx([-0.5, -0.1, 0.0])
        assert values["tax-kl"] == pytest.approx([-0.2, -0.1, 0.0])
        for row in tax.ROWS:
            assert all(picture(plot).svg for plot in row.plots({3: found, 4: found}))

    def test_every_size_counts(self):
        def policies(base: float, sft: float, ppo: float) -> dict:
            return {name: {"held_out": gold} for name, gold in (("base", base), ("sft", sft), ("ppo", ppo))}

        found = {"sizes": {"own": policies(0.4, 0.6, 0.7), "small": policies(0.3, 0.5, 0.5)}}
        assert demo.least_gain("ppo", "sft")(found) == pytest.approx(0.0)
        assert demo.least_gain("sft", "base")(found) == pytest.approx(0.2)
        assert minus(demo.smallest("ppo"), demo.largest("base"))(found) == pytest.approx(0.1)
        found["sizes"]["own"]["ppo"]["held_out"] = None
        assert demo.least_gain("ppo", "sft")(found) is None

    def test_pairs_of_rankings_hold_every_decided_pair_once(self):
        """Check that a pair has ranks of its own: 2 and 3 of a ranking are 1 and 2."""
        row = {"id": "7", "prompt": "p", "responses": ["a", "b", "c", "d"], "ranks": [3, 1, 2, 2]}
        pairs = reward_models.pairs_of_rankings([row | {"finished": [True] * 4}], seed=0)
        ranks = {tuple(pair["responses"]): pair["ranks"] for pair in pairs}
        assert ranks == {
            ("a", "b"): [2, 1],
            ("a", "c"): [2, 1],
            ("a", "d"): [2, 1],
            ("b", "c"): [1, 2],
            ("b", "d"): [1, 2],
        }
        assert all(len(pair["finished"]) == 2 for pair in pairs) and len({pair["id"] for pair in pairs}) == 5

    def test_coefficients_of_reward_models(self):
        """Gold bends by 0.1 d with the smallest reward model, and by 0.04 d with the largest."""
        bends = {("own", 1): 0.07, ("size", 0.3): 0.1, ("size", 3.0): 0.04}
        points = [
            {"method": method, "value": value, "n": n, "kl": kl, "gold": 0.6 + kl**0.5 * (0.2 - bend * kl**0.5)}
            for (method, value), bend in bends.items()
            for n, kl in ((1, 0.0), (2, 0.2), (4, 0.6), (8, 1.2))
        ]
        found = {"points": points}
        assert proxies.bend_apart(found) == pytest.approx(0.06 / 0.2)
        assert proxies.sizes_apart(found) == pytest.approx(0.06 * 1.2)
        (plot,) = proxies.coefficients_plot({3: found, 4: found})
        assert [name.split("\n")[0] for name in plot.drawing.x_names if name] == ["α"] * 3 + ["β"] * 3
        assert plot.drawing.x_names[:3] == ["α\n0.3M", "α\nas policy", "α\n3M"]
        without = {"points": [point for point in points if point["method"] == "own"]}
        assert proxies.bend_apart(without) is None and proxies.sizes_apart(without) is None

    def test_rankings_are_judged_on_new_tasks(self):
        """Prompts of known tasks, and those without the figure, do not count."""
        series = Series(np.array([0.2, 0.4, 0.8, np.nan]), ("a", "b", "c", "d"))
        assert whole_rankings.on_new_tasks(series, [True, False, False, False]) == pytest.approx(0.6)
        assert whole_rankings.on_new_tasks(series, None) == pytest.approx(1.4 / 3)
        assert whole_rankings.on_new_tasks(series, [True, True, True, False]) is None

    def test_labelers_take_turns(self):
        rows = [{"prompt": prompt, "labeler": name} for prompt in "xyz" for name in ("ada", "ben")]
        assert [row["labeler"] for row in reward_models.one_labeler_a_prompt(rows)] == ["ada", "ben", "ada"]

    def test_a_rule_is_learnt_in_each_way(self):
        """Check the gain and the gap of five seeds, and their verdicts."""

        def ways(seed: int, rloo: float, gae: float) -> dict:
            before = {"score": 0.2 + 0.01 * seed, "kl": 0.0, "length": 28.0}
            after = {"rloo": rloo + 0.02 * seed, "gae": gae + 0.01 * seed}
            return {
                "ways": {
                    way: {"before": before, "after": {"score": score, "kl": 5.0, "length": 20.0}}
                    for way, score in after.items()
                }
            }

        taught, without = rule.ROWS
        observed = {seed: ways(seed, rloo=0.6, gae=0.5) for seed in range(5)}
        for row, by_seed in (
            (taught, [0.4 + 0.01 * i for i in range(5)]),
            (without, [0.1 + 0.01 * i for i in range(5)]),
        ):
            finding = finding_of(row, observed)
            assert list(finding["figures"][0]["by_seed"].values()) == pytest.approx(by_seed)
            assert finding["verdict"] == HOLDS
            assert len(row.plots(observed)) == 3 and all(picture(plot).svg for plot in row.plots(observed))
        worse = finding_of(without, {seed: ways(seed, rloo=0.3, gae=0.6) for seed in range(5)})
        assert worse["verdict"] == FAILS

    @staticmethod
    def preferences(pairs: list[float], rankings: list[float]) -> dict:
        """Return accuracies on both kinds over 50, 100, … prompts; length has 0.45 and 0.7."""
        return {
            "prompts": {
                str(50 * 2**i): {
                    "pairs": {"accuracy": a, "low": a - 0.05, "longer": 0.45, "pairs": 370},
                    "rankings": {"accuracy": b, "low": b - 0.05, "longer": 0.7, "pairs": 1100},
                }
                for i, (a, b) in enumerate(zip(pairs, rankings, strict=True))
            }
        }

    def test_preferences_after_the_most_prompts(self):
        """Pairs are above chance and length, rankings above chance only; the last size counts."""
        observed = {
            seed: self.preferences([0.5, 0.52, 0.58, 0.6 + 0.01 * seed], [0.5, 0.5, 0.5, 0.62 + 0.01 * seed])
            for seed in range(5)
        }
        findings = {row.key: finding_of(row, observed) for row in preferences.ROWS}
        verdicts = {key: finding["verdict"] for key, finding in findings.items()}
        assert verdicts.pop("preferences-over-prompts") in (HOLDS, WEAKER)
        assert verdicts == {
            "people-over-chance": HOLDS,
            "people-over-length": HOLDS,
            "ai-over-chance": HOLDS,
            "ai-over-length": FAILS,
        }
        by_seed = findings["people-over-length"]["figures"][0]["by_seed"]
        assert list(by_seed.values()) == pytest.approx([0.15 + 0.01 * i for i in range(5)])
        low = findings["ai-over-chance"]["figures"][1]["by_seed"]
        assert list(low.values()) == pytest.approx([0.57 + 0.01 * i for i in range(5)])
        for row in preferences.ROWS:
            assert all(picture(plot).svg for plot in row.plots(observed))

    def test_few_held_out_prompts_weaken_what_seeds_agree_on(self):
        observed = {seed: self.preferences([0.53 + 0.001 * seed] * 4, [0.6] * 4) for seed in range(5)}
        (row,) = [row for row in preferences.ROWS if row.key == "people-over-chance"]
        finding = finding_of(row, observed)
        assert [figure["verdict"] for figure in finding["figures"]] == [HOLDS, FAILS] and finding["verdict"] == WEAKER

    def test_the_power_law_is_that_of_the_error(self):
        """Compute it from 0.5 · (n / 50)^−0.2, and from errors that do not fall."""
        found = self.preferences([1 - 0.5 * 2 ** (-0.2 * i) for i in range(4)], [0.6] * 4)
        assert preferences.of_law("pairs", "exponent")(found) == pytest.approx(0.2)
        assert preferences.of_law("pairs", "r_squared")(found) == pytest.approx(1.0)
        assert preferences.of_law("rankings", "exponent")(found) == pytest.approx(0.0, abs=1e-9)
        perfect = self.preferences([0.5, 0.9, 1.0, 1.0], [0.6] * 4)
        assert preferences.of_law("pairs", "exponent")(perfect) is None

    def test_prompts_of_a_smaller_number_are_among_those_of_a_larger_one(self):
        """All rankings of a prompt come with it, messages and texts alike; seeds draw others."""
        asked = [f"question {i}" for i in range(8)]
        rows = [{"prompt": text, "n": n} for text in asked for n in range(2)]
        rows += [{"prompt": [{"role": "user", "content": f"chat {i}"}], "n": 0} for i in range(4)]
        small, large = preferences.of_prompts(rows, 3, seed=1), preferences.of_prompts(rows, 6, seed=1)
        assert [row for row in large if row in small] == small and len(small) < len(large)
        assert sorted(map(str, preferences.of_prompts(rows, 12, seed=1))) == sorted(map(str, rows))
        assert preferences.of_prompts(rows, 6, seed=2) != large
        with pytest.raises(UserError, match="12 prompts are left to train on; give 13 or more"):
            preferences.of_prompts(rows, 13, seed=1)

    def test_accuracy_of_a_kind_stands_in_the_manifest(self):
        own = {"accuracy": 0.6, "accuracy_ci95": [0.52, 0.67], "n_pairs": 90}
        metrics = {"accuracy_by_source": {"pairs": own}, "longer_wins_by_source": {"pairs": {"accuracy": 0.4}}}
        store = SimpleNamespace(manifest=lambda stage: {"metrics": metrics})
        found = preferences.held_out_figures(store, "pairs")
        assert found == {"accuracy": 0.6, "low": 0.52, "longer": 0.4, "pairs": 90}
        with pytest.raises(UserError, match="give both"):
            preferences.held_out_figures(store, "rankings")
        kinds = [preferences.by_kind({"responses": ["a"] * n, "source": "x"})["source"] for n in (2, 3)]
        assert kinds == ["pairs", "rankings"]

    def test_a_missing_part_is_none(self):
        assert reader("a", "b")({"a": None}) is None and reader("a", "b")({}) is None
        assert minus(reader("a"), reader("b"))({"a": 1.0}) is None


class TestByJudge:
    @staticmethod
    def found(seed: int, by_judge_wins: float = 0.6) -> dict:
        """Return what is found where PPO wins by the judge, and by the climbed model more."""

        def policy(wins: float, climbed: float, equal: float | None) -> dict:
            says = {"wins": {"judge": wins, "climbed": climbed}, "gain": {"judge": 0.1, "climbed": 0.4}}
            return says | {"low": wins - 0.05, "at_equal_length": equal, "length": 90, "eos_rate": 0.9, "kl": 2.0}

        return {
            "judge": {"accuracy": 0.65, "low": 0.6 + 0.001 * seed},
            "climbed": {"accuracy": 0.65, "low": 0.6},
            "policies": {
                "sft": {"length": 100, "eos_rate": 0.7, "kl": 0.0},
                "ppo": policy(by_judge_wins + 0.01 * seed, 0.75, 0.55 + 0.01 * seed),
                "dpo": policy(0.5, 0.5 + 0.01 * seed, None),
            },
        }

    @staticmethod
    def rows_of(policy: str, prompt: str, *answers: tuple[int, float, bool]) -> list[dict]:
        """Return rows of responses.jsonl from (length, the judge's score, finished) of each."""
        return [
            {"policy": policy, "prompt": prompt, "length": length, "judges": {"kept": score}, "finished": finished}
            for length, score, finished in answers
        ]

    def test_verdicts(self):
        observed = {seed: self.found(seed) for seed in range(3)}
        findings = {row.key: finding_of(row, observed) for row in by_judge.ROWS}
        assert {key: finding["verdict"] for key, finding in findings.items()} == {
            "preferences-ppo-by-judge": HOLDS,
            "preferences-dpo-by-judge": UNTOLD,
            "preferences-climbed-overrates": HOLDS,
        }
        gaps = findings["preferences-climbed-overrates"]["figures"][0]["by_seed"]
        assert list(gaps.values()) == pytest.approx([0.15, 0.14, 0.13])
        lower = {seed: self.found(seed, by_judge_wins=0.4) for seed in range(3)}
        assert finding_of(by_judge.ROWS[0], lower)["verdict"] == FAILS
        for row in by_judge.ROWS:
            drawn = row.plots(observed)
            assert len(drawn) == 5 and all(picture(plot).svg for plot in drawn)

    def test_a_judge_that_may_know_nothing_weakens_what_it_says(self):
        observed = {seed: self.found(seed) for seed in range(3)}
        for seed, found in observed.items():
            found["judge"]["low"] = 0.45 + 0.001 * seed
        assert finding_of(by_judge.ROWS[0], observed)["verdict"] == WEAKER

    def test_figures_of_a_policy(self):
        def verdict(wins: float, gain: float) -> dict:
            return {
                "win_rate_vs_sft": {"value": wins, "ci95": [wins - 0.1, wins + 0.1]},
                "difference_to_sft": {"value": gain},
            }

        entry = {"length": 90.0, "eos_rate": 0.9, "kl_to_sft": 2.0, "win_rate_vs_sft": {"value": 0.1}}
        entry["judges"] = {"gold": verdict(0.9, 0.9), "kept": verdict(0.6, 0.2), "reward_model": verdict(0.8, 0.7)}
        found = by_judge.figures("ppo", entry, [])
        assert found["wins"] == {"judge": 0.6, "climbed": 0.8} and found["gain"] == {"judge": 0.2, "climbed": 0.7}
        assert found["low"] == pytest.approx(0.5) and found["at_equal_length"] is None and found["kl"] == 2.0
        assert set(by_judge.figures("sft", entry, [])) == {"length", "eos_rate", "kl"}

    def test_longer_answers_alone_win_nothing_at_equal_length(self):
        """The judge scores by length alone; cut answers would turn it round if they counted."""
        rows = []
        for i in range(40):
            length = 50 + (-60, -30, -5, 5, 10, 20, 30, 40, 50, 60)[i % 10]
            rows += self.rows_of("sft", f"prompt {i}", (50, 50.0, True), (500, 9999.0, False))
            rows += self.rows_of("ppo", f"prompt {i}", *[(length, float(length), True)] * 2)
        wins = sum(row["judges"]["kept"] > 50 for row in rows if row["policy"] == "ppo") / 80
        assert wins == 0.7
        assert by_judge.at_equal_length(rows, "ppo") == pytest.approx(0.5, abs=0.1)
        better = [row | {"judges": {"kept": 60.0}} if row["policy"] == "ppo" else row for row in rows]
        assert by_judge.at_equal_length(better, "ppo") > 0.9
        assert by_judge.at_equal_length([row for row in rows if row["policy"] == "sft"], "ppo") is None

    @pytest.mark.parametrize("size", ["whole", "quick"])
    def test_its_settings_are_valid_in_the_config(self, size, tmp_path):
        """The judge gets as large a share of prompts as the reward model and DPO."""
        args = claims.parse(["--size", size, "--artifacts", str(tmp_path)])
        place = claims.place_of(args, None, by_judge.MEASUREMENT)
        own = by_judge.MEASUREMENT.settings[size]["overrides"]
        from pipeline import api

        experiment = api.load_experiment(derived(place, "halves", [*by_judge.HALVES, *own]).config)
        rankings = experiment.rankings
        assert 1 - rankings.validation_fraction - rankings.judge_fraction == pytest.approx(rankings.judge_fraction)
        assert experiment.rm.ensemble == 1 and not experiment.rm.held_out


class TestSentiment:
    @staticmethod
    def found():
        """Return points of all methods: SFT and best of 2, and each other one at two settings."""
        points = [
            {"method": "best_of_n", "value": n, "kl": kl, "gold": gold, "score": 0.0, "perplexity": perplexity}
            for n, kl, gold, perplexity in ((1, 0.0, 0.5, 20.0), (2, 0.19, 0.55, None))
        ]
        for method, shift in (("ppo", 0.0), ("ppo_gold", 0.02), ("dpo", 0.05)):
            for value, kl in ((0.05, 4.0), (0.5, 1.0)):
                gold = 0.5 + 0.1 * kl**0.5 + shift
                points.append(
                    {"method": method, "value": value, "kl": kl, "gold": gold, "score": gold, "perplexity": 21.0}
                )
        own = {"method": "preferred", "value": 1, "kl": 0.5, "gold": 0.56, "score": 0.0, "perplexity": 20.0}
        return {"points": [*points, own], "own": {"ppo": 0.5, "dpo": 0.05}}

    def test_figures(self):
        """Read each main figure of made-up points whose answer is plain."""
        figures = {row.key: [figure.read(self.found()) for figure in row.figures] for row in sentiment.ROWS}
        assert figures["sentiment-gold"] == pytest.approx([0.1, 0.05])
        assert figures["sentiment-dpo-frontier"] == pytest.approx([0.05])
        assert figures["sentiment-dpo-over-ppo-on-gold"] == pytest.approx([0.03])
        assert figures["sentiment-dpo-over-preferred"] == pytest.approx([0.75 - 0.56])

    def test_without_text_its_perplexity_is_unknown(self):
        found = self.found()
        for point in found["points"]:
            point["perplexity"] = None
        assert sentiment.perplexity_ratio("ppo")(found) is None

    def test_every_method_has_a_range_of_kl_at_every_size(self):
        """One point spans none, so that no gap at equal KL could be read."""
        for settings in sentiment.MEASUREMENT.settings.values():
            assert set(settings["kl_coefs"]) - {0.05} and set(settings["betas"]) - {0.1}

    def test_pictures_have_every_method(self):
        drawn = [plot for row in sentiment.ROWS for plot in row.plots({3: self.found(), 4: self.found()})]
        assert len(drawn) == 8 and all(picture(plot).svg for plot in drawn)


class TestClimbed:
    FOUND: ClassVar[dict] = {
        "points": [
            {"method": method, "value": value, "gold": gold}
            for method, value, gold in (
                ("sft", 0, 0.6), ("one", 1, 0.7), ("mean", 3, 0.72), ("min", 3, 0.75), ("size", 3.0, 0.8),
                ("size", 0.3, 0.65),
            )
        ]
    }  # fmt: skip

    def test_figures(self):
        figures = {row.key: row.figures[0].read(self.FOUND) for row in climbed.ROWS}
        assert figures == pytest.approx({"ppo-over-proxy-size": 0.15, "ppo-by-ensemble-minimum": 0.05})
        assert list(climbed.by_size(self.FOUND)) == [0.3, 1.0, 3.0]

    def test_a_size_that_was_not_run_leaves_the_others(self):
        few = {"points": [point for point in self.FOUND["points"] if point["value"] != 3.0]}
        assert climbed.sizes_apart(few) == pytest.approx(0.7 - 0.65)
        assert all(picture(plot).svg for row in climbed.ROWS for plot in row.plots({3: self.FOUND, 4: self.FOUND}))


class Count:
    """Stand in for a measurement: count its runs, and be interrupted on a seed if asked."""

    def __init__(self):
        self.runs: list[int] = []
        self.stops_at: int | None = None
        self.fails_at: int | None = None
        self.breaks_at: int | None = None

    def __call__(self, place, seed: int, settings: dict) -> dict:
        self.runs.append(seed)
        if seed == self.stops_at:
            raise Interrupted()
        if seed == self.fails_at:
            raise UserError("rm: no rankings; add some")
        if seed == self.breaks_at:
            raise AssertionError("a bug")
        return {"x": 0.1 + 0.01 * seed, "settings": settings}


MEASUREMENT = Measurement("fake", "nothing", Count(), {"whole": {"n": 1}, "quick": {"n": 2}, "micro": {"n": 3}})


def draw(observed: dict) -> list:
    """Draw one figure of each seed."""
    return [pictures.steps("x", "X < y", "x", [("one", "sft", reader("x")), ("two", "ppo", reader("x"))], observed)]


@pytest.fixture
def count(monkeypatch):
    """Put two rows of one counted measurement in place of all others."""
    counted = Count()
    measurement = replace(MEASUREMENT, run=counted)
    first = Row(
        "first", "Part", "One <is> more.", "Paper & co", "It is.", measurement,
        (Figure("x", reader("x"), Rule(nothing=0.03)),), draw, "A note.",
    )  # fmt: skip
    second = replace(first, key="second", claim="So it is.", figures=(Figure("x", reader("x"), Rule("below")),))
    monkeypatch.setattr(claims, "ROWS", (first, second))
    monkeypatch.setitem(claims.SIZES, "whole", replace(claims.SIZES["whole"], seeds=(3, 4, 5, 6, 7)))
    return counted


@pytest.fixture
def command(tmp_path):
    """Return run(words…) → the exit code and the rows of claims.json."""

    def run(*words: str) -> tuple[int, list[dict]]:
        places = ["--artifacts", str(tmp_path / "artifacts"), "--out", str(tmp_path / "claims")]
        code = run_command(claims.run, [*places, "--results", str(tmp_path / "results"), "--workers", "1", *words])
        quick = "quick" if "--quick" in words else ""
        file = tmp_path / "claims" / quick / "claims.json"
        return code, json.loads(file.read_text("utf-8")) if file.is_file() else []

    return run


class TestCommand:
    def test_a_second_run_measures_nothing(self, count, command, tmp_path):
        code, rows = command()
        assert code == 0 and count.runs == [3, 4, 5, 6, 7], "two rows share a measurement"
        page_text = (tmp_path / "claims" / "index.html").read_text("utf-8")
        assert command() == (0, rows) and count.runs == [3, 4, 5, 6, 7]
        assert (tmp_path / "claims" / "index.html").read_text("utf-8") == page_text
        first, second = rows
        assert first["verdict"] == HOLDS and second["verdict"] == FAILS and not first["quick"]
        half = 2.7764 * 0.01 * math.sqrt(2.5) / math.sqrt(5)  # t with 4 degrees of freedom
        assert first["ours"] == pytest.approx(0.15) and first["ci95"] == pytest.approx([0.15 - half, 0.15 + half], 1e-4)
        assert first["seeds"] == [3, 4, 5, 6, 7] and first["command"] == "make claims ONLY=first"
        assert {"claim", "source", "paper", "ours", "ci95", "seeds", "verdict", "command", "minutes", "commit"} <= set(
            first
        )

    def test_changed_settings_are_measured_again(self, count, command):
        command("--seeds", "3", "4")
        command("--seeds", "3", "4", "5")
        assert count.runs == [3, 4, 5]
        command("--seeds", "3", "ppo.kl_coef=0.3")
        assert count.runs == [3, 4, 5, 3]

    def test_settings_are_for_the_rows_that_were_asked_for(self, count, command, monkeypatch):
        other = replace(claims.ROWS[0], key="third", measurement=replace(MEASUREMENT, key="other", run=Count()))
        monkeypatch.setattr(claims, "ROWS", (*claims.ROWS, other))
        command()
        _, rows = command("--only", "third", "ppo.kl_coef=0.3")
        assert [row["seeds"] for row in rows] == [[3, 4, 5, 6, 7]] * 3
        assert [row["command"].endswith(" ppo.kl_coef=0.3") for row in rows] == [False, False, True]

    def test_a_real_model_takes_part_where_it_is_named_and_on_as_many_seeds_as_are_enough(
        self, count, command, monkeypatch
    ):
        real = replace(MEASUREMENT, key="other", run=Count(), micro=(), seeds=3)
        other = replace(claims.ROWS[0], key="third", measurement=real)
        monkeypatch.setattr(claims, "ROWS", (*claims.ROWS, other))
        _, rows = command("--keep")
        assert rows[2]["verdict"] == NOT_RUN and real.run.runs == []
        assert claims.chosen(None, "micro") == [*claims.ROWS]
        _, rows = command("--only", "third")
        assert real.run.runs == [3, 4, 5] == rows[2]["seeds"] and not rows[2]["quick"] and not rows[0]["quick"]
        _, rows = command("--only", "third", "--seeds", "6", "8")
        assert real.run.runs == [3, 4, 5, 6, 8] and rows[2]["seeds"] == [6, 8], "seeds that are asked for all count"

    def test_an_interrupted_run_goes_on(self, count, command):
        count.stops_at = 5
        code, rows = command()
        assert code == 75 and rows[0]["seeds"] == [3, 4] and rows[0]["quick"], "what is there is shown"
        count.stops_at = None
        assert command()[1][0]["seeds"] == [3, 4, 5, 6, 7] and count.runs == [3, 4, 5, 5, 6, 7]

    def test_a_failing_row_is_told_and_the_others_go_on(self, count, command, monkeypatch, tmp_path, capsys):
        other = replace(claims.ROWS[0], key="third", measurement=replace(MEASUREMENT, key="other", run=Count()))
        monkeypatch.setattr(claims, "ROWS", (*claims.ROWS, other))
        count.fails_at, count.breaks_at = 3, 5
        code, rows = command()
        assert code == 2 and [row["seeds"] for row in rows] == [[4, 6, 7], [4, 6, 7], [3, 4, 5, 6, 7]]
        told = "error: fake, seed 3: rm: no rankings; add some; seed 5: AssertionError: a bug"
        assert told in capsys.readouterr().err
        assert "Could not be measured" in (tmp_path / "claims" / "index.html").read_text("utf-8")

    def test_quick_verdicts_are_marked_and_lie_apart(self, count, command, tmp_path):
        _, rows = command("--quick", "--only", "first")
        assert [row["row"] for row in rows] == ["first", "second"], "the page has all rows, whatever has run"
        assert rows[0]["quick"] and rows[0]["seeds"] == [3, 4]
        assert rows[0]["command"] == "make claims ONLY=first QUICK=1"
        assert "<small>quick</small>" in (tmp_path / "claims/quick/index.html").read_text("utf-8")
        assert not (tmp_path / "claims/index.html").exists()

    def test_processes_share_the_seeds(self, count, command, monkeypatch, tmp_path):
        """Each has its seeds, one worker, no page of its own; a failing one is named."""
        started, codes = [], [0, 3]

        def start(words: list[str], **options: object) -> SimpleNamespace:
            started.append(words[2:])
            code = codes[len(started) - 1]
            return SimpleNamespace(poll=lambda: code, returncode=code)

        monkeypatch.setattr("subprocess.Popen", start)
        code, rows = command("--workers", "2", "--keep")
        assert code == 2 and len(started) == 2 and not count.runs and rows[0]["verdict"] == NOT_RUN
        for words, seeds in zip(started, (["3", "5", "7"], ["4", "6"]), strict=True):
            args = claims.parse(words)
            assert list(map(str, args.seeds)) == seeds and args.workers == 1 and args.measure_only and not args.keep
        codes[1] = 0
        started.clear()
        assert command("--workers", "2")[0] == 0

    def test_keep_publishes_rows_at_their_whole_size_only(self, count, command, tmp_path, capsys):
        for words in (["--quick"], ["--seeds", "3", "4"], ["ppo.kl_coef=1"], ["-c", "configs/tiny.yaml"]):
            assert command("--keep", *words)[0] == 2
            assert capsys.readouterr().err.startswith("error: command line: --keep")
        (tmp_path / "results").mkdir()
        count.fails_at = 7
        assert command("--keep")[0] == 2 and not list((tmp_path / "results").iterdir())
        assert "nothing kept: 0 of 2 rows are finished" in capsys.readouterr().out
        count.fails_at = None
        _, rows = command("--keep")
        assert json.loads((tmp_path / "results/claims.json").read_text("utf-8")) == rows

    def test_keep_publishes_what_is_finished_beside_rows_that_are_not(self, count, command, monkeypatch, tmp_path):
        other = replace(claims.ROWS[0], key="third", measurement=replace(MEASUREMENT, key="other", run=Count()))
        other.measurement.run.stops_at = 5
        monkeypatch.setattr(claims, "ROWS", (*claims.ROWS, other))
        (tmp_path / "results").mkdir()
        command("--only", "third")
        code, rows = command("--only", "first", "--keep")
        assert code == 0 and [row["seeds"] for row in rows] == [[3, 4, 5, 6, 7]] * 2 + [[3, 4]]
        kept = json.loads((tmp_path / "results/claims.json").read_text("utf-8"))
        assert kept[:2] == rows[:2]
        assert kept[2]["verdict"] == NOT_RUN and not kept[2]["seeds"] and kept[2]["ours"] is kept[2]["commit"] is None

    def test_keep_leaves_what_was_published_with_the_settings_and_rules_of_today(
        self, count, command, monkeypatch, tmp_path, capsys
    ):
        """Another machine has the first rows only in the published file, and measures the third."""
        file = tmp_path / "results" / "claims.json"
        file.parent.mkdir()
        command("--keep")
        before = json.loads(file.read_text("utf-8"))
        shutil.rmtree(tmp_path / "claims")
        other = replace(claims.ROWS[0], key="third", measurement=replace(MEASUREMENT, key="other", run=Count()))
        rows = (replace(claims.ROWS[0], source="Paper & co, page 2"), claims.ROWS[1], other)
        monkeypatch.setattr(claims, "ROWS", rows)
        capsys.readouterr()
        for words in ([], ["--seeds", "8", "9", "10", "11", "12"]):
            _, shown = command("--only", "third", "--keep", *words)
            assert "(1 of 3 rows are finished, 2 stay from earlier runs)" in capsys.readouterr().out
            kept = json.loads(file.read_text("utf-8"))
            assert kept == [before[0] | {"source": "Paper & co, page 2"}, before[1], shown[2]]
            assert shown[0]["verdict"] == NOT_RUN, "the page has what was measured here"
        other.measurement.run.fails_at = 13  # a failed attempt leaves what was published, too
        assert command("--only", "third", "--keep", "--seeds", "8", "9", "10", "11", "13")[0] == 2
        assert "nothing kept" in capsys.readouterr().out and json.loads(file.read_text("utf-8")) == kept

    @pytest.mark.parametrize("change", ["settings", "rule", "gone"])
    def test_keep_takes_out_and_names_what_is_no_result_of_today(
        self, count, command, monkeypatch, tmp_path, capsys, change
    ):
        file = tmp_path / "results" / "claims.json"
        file.parent.mkdir()
        command("--keep")
        shutil.rmtree(tmp_path / "claims")
        first, second = claims.ROWS
        if change == "settings":
            first = replace(first, measurement=replace(first.measurement, version=first.measurement.version + 1))
        elif change == "rule":
            first = replace(first, figures=(replace(first.figures[0], rule=Rule(nothing=0.5)),))
        other = replace(second, key="third", measurement=replace(MEASUREMENT, key="other", run=Count()))
        monkeypatch.setattr(claims, "ROWS", (second, other) if change == "gone" else (first, second, other))
        capsys.readouterr()
        command("--only", "third", "--keep")
        printed = capsys.readouterr().out
        assert "taken out, as their settings or rules are no longer today's: first\n" in printed
        kept = {row["row"]: row["verdict"] for row in json.loads(file.read_text("utf-8"))}
        assert kept == ({} if change == "gone" else {"first": NOT_RUN}) | {"second": FAILS, "third": FAILS}

    def test_published_rows_are_a_table(self, count, command, tmp_path, capsys):
        assert command("--published")[0] == 2 and "claims.py --keep` writes it" in capsys.readouterr().err
        (tmp_path / "results").mkdir()
        command("--keep")
        capsys.readouterr()
        assert command("--published")[0] == 0
        table = capsys.readouterr().out.splitlines()
        assert len(table) == 4 and table[2].startswith("| One <is> more. (`first`) | Paper & co | x: 0.15")
        assert [line.rsplit("| ", 1)[1] for line in table[2:]] == ["**holds** |", "**does not hold** |"]

    def test_an_unknown_row_is_one_line_and_exit_2(self, command, capsys):
        assert command("--only", "nonsense") == (2, [])
        error = capsys.readouterr().err
        assert error.startswith("error: command line: --only nonsense: no such row") and error.count("\n") == 1

    def test_list_names_every_row_and_runs_nothing(self, command, capsys):
        assert command("--list") == (0, [])
        printed = capsys.readouterr().out
        assert all(f"| {row.key} " in printed for row in catalogue.ROWS)


class TestCatalogue:
    def test_rows_have_names_of_their_own_and_settings_for_every_size(self):
        keys = [row.key for row in catalogue.ROWS]
        assert len(set(keys)) == len(keys)
        by_key: dict[str, set[int]] = {}
        for row in catalogue.ROWS:
            assert set(row.measurement.settings) == set(catalogue.SIZES) and row.figures
            assert row.claim.endswith(".") and row.paper.endswith(".") and (not row.note or row.note.endswith("."))
            by_key.setdefault(row.measurement.key, set()).add(id(row.measurement))
        assert all(len(ids) == 1 for ids in by_key.values())

    def test_reported_seeds_are_not_those_that_settings_were_chosen_on(self):
        assert all(not {0, 1, 2} & set(size.seeds) for size in catalogue.SIZES.values())
        assert not {*range(8), 10, 30} & set(catalogue.SIZES["whole"].seeds), "seen, or chosen on, before the rules"
        assert len(catalogue.SIZES["whole"].seeds) >= 5

    @pytest.mark.parametrize("row", catalogue.ROWS, ids=lambda row: row.key)
    def test_a_row_that_has_not_run_says_so(self, row):
        finding = finding_of(row, {})
        assert finding["verdict"] == NOT_RUN and {figure["verdict"] for figure in finding["figures"]} == {NOT_RUN}

    @pytest.mark.parametrize("size", catalogue.SIZES)
    def test_every_size_is_a_valid_config(self, size, tmp_path):
        args = claims.parse(["--size", size, "--artifacts", str(tmp_path)])
        for measurement in catalogue.measurements(catalogue.ROWS):
            own = [] if size == "micro" else settings_for(Path(measurement.config or ""), tmp_path)
            place = claims.place_of(Namespace(**vars(args) | {"overrides": own}), None, measurement)
            from pipeline import api

            assert api.load_experiment(place.config).name == place.name

    def test_the_smallest_size_needs_no_real_model_and_no_data(self, tmp_path):
        args = claims.parse(["--size", "micro", "--artifacts", str(tmp_path), "seed=9"])
        from pipeline import api

        for measurement in catalogue.measurements(catalogue.ROWS):
            experiment = api.load_experiment(claims.place_of(args, None, measurement).config)
            assert experiment.model.name_or_path is None and experiment.data.prompts == "world"
            assert experiment.seed == 9, "settings of the command line come last"


class Check(HTMLParser):
    """Check that tags are closed and that nothing is loaded."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_startendtag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(count):
    observed = {seed: {"x": 0.1 + 0.01 * seed} for seed in (3, 4, 5, 6, 7)}
    done, fresh = claims.ROWS
    entries = [
        Entry(done, finding_of(done, observed), draw(observed), False, "make claims ONLY=first", 2.5, "abc", "d"),
        Entry(fresh, finding_of(fresh, {}), [], True, "make claims ONLY=second", None, "", ""),
    ]
    text = page("meta", entries)
    check = Check()
    check.feed(text)
    assert not check.open and all(link.startswith("#") for link in check.links)
    assert {link[1:] for link in check.links} <= set(check.ids) and len(set(check.ids)) == len(check.ids)
    assert "One &lt;is&gt; more." in text and "Paper &amp; co" in text and "X &lt; y" in text
    assert "default-src 'none'" in text and text.count("<svg") == 2
    assert "2 claims: holds 1 and not run 1." in text and "1 figures in 1 rows" in text


class TestKills:
    """Kill a stand-in for the stage, which writes a row of its journal every 50 ms."""

    SCRIPT = """
import pathlib, sys, time
journal = pathlib.Path(sys.argv[1])
for _ in range(len(journal.read_text().splitlines()) if journal.exists() else 0, 8):
    time.sleep(0.05)
    with journal.open("a") as file:
        file.write("{}\\n")
"""

    def test_each_kill_lands_after_a_row_of_its_own(self, monkeypatch, tmp_path):
        start, before = killed.subprocess.Popen, []
        store = SimpleNamespace(folder=lambda stage: tmp_path, base=tmp_path / "name")
        journal = tmp_path / "metrics.jsonl"

        def stand_in(command: list[str], **options: object) -> object:
            before.append(killed.rows_of(journal))
            return start([sys.executable, "-c", self.SCRIPT, str(journal)])

        monkeypatch.setattr("subprocess.Popen", stand_in)
        place = SimpleNamespace(config="c", stop=SimpleNamespace(requested=False))
        _, kills = killed.until_done(place, store, [], [2, 2, 4])
        assert kills == 3 and killed.rows_of(journal) == 8 and len(before) == 4
        assert all(later > earlier for earlier, later in pairwise(before)), "none before a row"


def test_seeds_as_text():
    assert seeds_text([3, 4, 5, 6, 7]) == "3 to 7" and seeds_text([3, 5]) == "3, 5" and seeds_text([]) == "–"


def test_each_seed_is_a_thin_line():
    """Three seeds, two positions: three lines, two means with bars; two seeds have no bars."""
    observed = {seed: {"x": 0.1 * seed} for seed in (3, 4, 5)}
    (plot,) = draw(observed)
    assert ">one<" in picture(plot).svg and ">two<" in picture(plot).svg
    kinds = [type(mark).__name__ for mark in plot.drawing.marks]
    assert kinds.count("Line") == 3 and kinds.count("Spans") == kinds.count("Dots") == 2
    (plot,) = draw({3: {"x": 1.0}, 4: {"x": 2.0}})
    assert "Spans" not in [type(mark).__name__ for mark in plot.drawing.marks]


@pytest.mark.slow
def test_two_rows_with_a_tiny_model(command, tmp_path, capsys):
    """Rows of the tax are measured, on one seed; a second run trains nothing."""
    words = ["--size", "micro", "--only", "tax-exists", "tax-gamma", "--seeds", "3"]
    assert command(*words)[0] == 0
    assert "ppo: running" in capsys.readouterr().out
    everything = json.loads((tmp_path / "claims/micro/claims.json").read_text("utf-8"))
    rows = [row for row in everything if row["seeds"]]
    assert [row["row"] for row in rows] == ["tax-exists", "tax-gamma", "tax-kl"], "they share what was measured"
    assert [row["verdict"] for row in rows] == [UNTOLD] * 3 and all(math.isfinite(row["ours"]) for row in rows)
    assert all(row["ci95"] is None and row["quick"] and row["minutes"] > 0 for row in rows)
    (tmp_path / "claims/micro/measured/tax-seed3.json").unlink()
    assert command(*words)[0] == 0
    again = json.loads((tmp_path / "claims/micro/claims.json").read_text("utf-8"))
    assert "running" not in capsys.readouterr().out and again == [
        row | {"minutes": new["minutes"]} for row, new in zip(everything, again, strict=True)
    ]


@pytest.mark.slow
def test_rows_of_a_real_model_with_a_tiny_one(command, tmp_path):
    """They run on one seed; the same prompts are held out whatever is trained on; the judge's train
    nothing else."""
    only = ["rule-taught", "people-over-chance", "preferences-ppo-by-judge"]
    assert command("--size", "micro", "--only", *only, "--seeds", "3")[0] == 0
    everything = json.loads((tmp_path / "claims/micro/claims.json").read_text("utf-8"))
    rows = [row for row in everything if row["seeds"]]
    assert [row["row"] for row in rows] == [row.key for row in (*rule.ROWS, *preferences.ROWS, *by_judge.ROWS)]
    assert all(math.isfinite(row["ours"]) for row in rows)
    found = json.loads((tmp_path / "claims/micro/measured/preferences-seed3.json").read_text("utf-8"))["found"]
    assert list(found["prompts"]) == ["10", "20", "40"]
    held_out = {
        count: next((tmp_path / "artifacts").glob(f"*-seed3-{count}/rankings/validation.jsonl")).read_bytes()
        for count in found["prompts"]
    }
    assert len(set(held_out.values())) == 1
    (folder,) = (tmp_path / "artifacts").glob("*-by-judge-halves-files3-seed3/rankings")
    sides = {
        part: {json.loads(line)["prompt"] for line in (folder / f"{part}.jsonl").read_text("utf-8").splitlines()}
        for part in ("train", "validation", "judge")
    }
    assert all(sides.values()) and sum(map(len, sides.values())) == len(set().union(*sides.values()))
    judged = json.loads((tmp_path / "claims/micro/measured/by-judge-seed3.json").read_text("utf-8"))["found"]
    wins = judged["policies"]["ppo"]["wins"]
    assert wins["judge"] != wins["climbed"], "two models"
