"""Test the benchmarks that compare policies: arithmetic, checked independently, and sharing."""

import importlib.util
import itertools
import json
import math
import os
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # benchmarks import sweeps from their own folder

from sweeps import estimates, runner
from sweeps.estimates import Series
from sweeps.page import page, plot_of, plots_of, table
from sweeps.points import Point, Variant, best_of_points, policy_point, save_rows, variants_of
from sweeps.text import markdown, with_interval

from pipeline.chain import assess
from pipeline.config.validation import load_experiment
from pipeline.stage import StopFlag
from pipeline.store.artifacts import ArtifactStore
from stages.page.drawing import picture
from tests.pipeline import fakes

HERE = Path(__file__).resolve().parent
MICRO = ["-c", str(HERE.parent / "resume" / "micro.yaml"), "ppo.kl_target=null"]


def load(name: str) -> ModuleType:
    """Load a benchmark as a module, without leaving a name like `ptx` in sys.modules."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


frontier, ptx, rankings = load("frontier"), load("ptx"), load("rankings")


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """Undo what a command sets for its process: environment and threads."""
    before, threads = dict(os.environ), torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    os.environ.clear()
    os.environ.update(before)
    torch.set_num_threads(threads)


def test_shares_of_sample_pairs_by_hand():
    """Compute the order by hand for three pairs of samples.

    One pair has equal gold; of the other two, the score orders one as gold does and ties one.
    """
    scores, gold = np.array([[1.0, 2.0, 2.0], [0.0, 1.0, 2.0]]), np.array([[0.1, 0.5, 0.1], [0.3, 0.3, 0.3]])
    assert estimates.gold_order(scores, gold)[0] == pytest.approx(1.5 / 2)
    assert np.isnan(estimates.gold_order(scores, gold)[1])


TASKS = tuple(f"task {i % 40}" for i in range(200))


def point(method, setting, kl, score, gold, perplexity=2.5, seed=0):
    """Make a point with the gold of each prompt, and a score that is constant up to noise."""
    gold = np.asarray(gold, float)
    scores = score + 0.01 * np.sin(np.arange(len(gold)))
    tasks = TASKS[: len(gold)]
    series = {"score": Series(scores, tasks), "gold": Series(gold, tasks)}
    series |= {"held_out": Series(gold[::2], tasks[::2])}
    return Point(method, setting, seed, **series, kl=kl, length=9.0, eos_rate=1.0, perplexity=perplexity)


def variant(*points):
    """Make a variant from its points, one for each seed."""
    return Variant(points)


class TestSeries:
    """Means and paired differences, over the tasks of one seed and over several seeds."""

    def test_tasks_are_the_clusters_of_one_seed(self):
        """Three equal prompts of each of four tasks count like one prompt of each."""
        values = np.repeat([0.2, 0.5, 0.9, 0.4], 3)
        repeated = estimates.estimate([Series(values, tuple("aaabbbcccddd"))])
        single = estimates.estimate([Series(values[::3], tuple("abcd"))])
        assert repeated["ci95"] == pytest.approx(single["ci95"]) and (repeated["n"], repeated["clusters"]) == (12, 4)

    def test_seeds_are_the_clusters_if_there_are_several(self):
        """Means 0.3, 0.5 and 0.4, t with 2 degrees of freedom: 0.4 ± 4.303 · 0.1/√3."""
        seeds = [Series(np.array([m - 0.2, m, m + 0.2]), tuple("abc")) for m in (0.3, 0.5, 0.4)]
        result = estimates.estimate(seeds)
        half = 4.3027 * 0.1 / math.sqrt(3)
        assert result["ci95"] == pytest.approx([0.4 - half, 0.4 + half], abs=1e-4) and result["clusters"] == 3
        assert estimates.unit_of(seeds) == "3 seeds" and estimates.unit_of(seeds[:1]) == "3 tasks of one seed"

    def test_differences_are_paired_by_seed(self):
        """Seeds differ by 0.2, gains are 0.05 to 0.07: far from 0, though intervals overlap."""
        levels, gains = (0.3, 0.5, 0.7), (0.05, 0.06, 0.07)
        theirs = [Series(np.full(4, x), tuple("abcd")) for x in levels]
        ours = [Series(np.full(4, x + g), tuple("abcd")) for x, g in zip(levels, gains, strict=True)]
        result = estimates.difference(ours, theirs)
        assert result["value"] == pytest.approx(0.06) and result["ci95"][0] > 0.03
        assert estimates.estimate(ours)["ci95"][0] < estimates.estimate(theirs)["value"]
        paired = estimates.differences_over_seeds([0.35, 0.56, 0.77], levels)
        assert paired["value"] == pytest.approx(0.06) and paired["ci95"] == pytest.approx(result["ci95"])
        assert paired["n"] == paired["clusters"] == 3

    def test_prompts_without_the_figure_are_left_out(self):
        """A difference leaves out the prompts that either side lacks."""
        ours = Series(np.array([1.0, np.nan, 0.0, 1.0]), tuple("abcd"))
        theirs = Series(np.array([0.0, 0.0, np.nan, 0.5]), tuple("abcd"))
        assert ours.mean() == pytest.approx(2 / 3)
        assert estimates.estimate([ours])["n"] == 3
        found = estimates.difference([ours], [theirs])
        assert found["value"] == pytest.approx(0.75) and found["n"] == found["clusters"] == 2
        assert found["ci95"] == pytest.approx([0.75 - 12.706 * 0.25, 0.75 + 12.706 * 0.25], abs=1e-3)

    def test_one_seed_gives_no_interval_over_seeds(self):
        assert estimates.over_seeds([0.4])["ci95"] is None
        assert estimates.differences_over_seeds([0.4], [0.3])["ci95"] is None

    def test_shares_over_seeds_stay_between_0_and_1(self):
        low, high = estimates.over_seeds([0.9, 0.99], share=True)["ci95"]
        assert 0 <= low < 0.945 < high <= 1 < estimates.over_seeds([0.9, 0.99])["ci95"][1]

    def test_formatting_as_text(self):
        assert with_interval({"value": 0.85, "ci95": [-0.842, 0.858]}) == "0.850 (−0.842 to 0.858)"
        assert with_interval({"value": 2.5, "ci95": None}, 1) == "2.5" and with_interval(None) == "–"
        assert markdown(["a", "b"], [["long name", "1"]]).splitlines() == [
            "| a         | b   |", "| --------- | --- |", "| long name | 1   |"
        ]  # fmt: skip


class TestBestOfN:
    @pytest.mark.parametrize("levels", [3, 1000])
    def test_it_is_the_mean_over_all_subsets(self, levels):
        """Compare with every subset of n of 7 samples; ties (3 levels: many) are shared."""
        rng = np.random.default_rng(levels)
        scores, values = rng.integers(0, levels, (4, 7)).astype(float), rng.normal(size=(4, 7))
        for n in range(1, 8):
            for row in range(4):
                chosen = []
                for subset in itertools.combinations(range(7), n):
                    top = max(scores[row, i] for i in subset)
                    chosen.append(np.mean([values[row, i] for i in subset if scores[row, i] == top]))
                assert estimates.best_of(scores, values, n)[row] == pytest.approx(np.mean(chosen), abs=1e-12)

    def test_the_best_of_n_ranks_in_closed_form(self):
        """E[max of n of 1 … N] = n (N + 1) / (n + 1), in whatever order the ranks are."""
        ranks = np.random.default_rng(0).permuted(np.tile(np.arange(1.0, 65.0), (3, 1)), axis=1)
        for n in (1, 2, 4, 8, 16, 32, 64):
            assert estimates.best_of(ranks, ranks, n) == pytest.approx(n * 65 / (n + 1))

    def test_one_is_the_mean_and_all_is_the_best(self):
        scores, values = np.random.default_rng(1).normal(size=(2, 5, 6))
        assert estimates.best_of(scores, values, 1) == pytest.approx(values.mean(1))
        assert estimates.best_of(scores, values, 6) == pytest.approx(values[np.arange(5), scores.argmax(1)])

    def test_n_above_the_number_of_samples_is_an_error(self):
        with pytest.raises(ValueError, match="from 1 to the 3 samples"):
            estimates.chosen_weights(np.zeros((1, 3)), 4)

    def test_its_kl_by_integration(self):
        """Integrate over the sampler's quantile u, where best of n has the density n u^(n − 1).

        KL = ∫ n u^(n−1) ln(n u^(n−1)) du.
        """
        u = (np.arange(2_000_000) + 0.5) / 2_000_000
        for n in (1, 2, 8, 64):
            log_density = math.log(n) + (n - 1) * np.log(u)
            assert estimates.best_of_kl(n) == pytest.approx((np.exp(log_density) * log_density).mean(), abs=1e-5)

    def test_points_of_a_set_of_samples(self):
        samples = {"scores": [[0.0, 1.0], [3.0, 2.0]], "gold": [[0.2, 0.4], [0.6, 1.0]]}
        samples |= {"lengths": [[5, 7], [9, 3]], "finished": [[True, False], [True, True]]}
        samples |= {"kl": [[0.0, 0.0], [0.0, 0.0]], "perplexity": 3.0, "clusters": ["x", "y"], "known": [True, False]}
        one, two = best_of_points(samples, [1, 2], 0)
        assert (one.gold.mean(), one.score.mean(), one.kl, one.length) == pytest.approx((0.55, 1.5, 0.0, 6.0))
        assert (two.gold.mean(), two.score.mean(), two.length, two.eos_rate) == pytest.approx((0.5, 2.0, 8.0, 0.5))
        assert two.gold.values.tolist() == pytest.approx([0.4, 0.6]) and two.gold.clusters == ("x", "y")
        assert two.held_out.values.tolist() == pytest.approx([0.6]) and two.held_out.clusters == ("y",)
        assert (one.perplexity, two.perplexity) == (3.0, None) and two.kl == pytest.approx(math.log(2) - 0.5)
        without_gold = best_of_points(samples | {"gold": None, "known": None}, [2], 0)[0]
        assert (
            without_gold.gold is None and without_gold.held_out is None and without_gold.figures()["gold_ci95"] is None
        )
        assert policy_point(samples | {"known": [True, True]}, "sft", {}, 0).held_out is None
        ppo = policy_point(samples | {"kl": [[1.0, 0.0], [2.0, 3.0]]}, "ppo", {"kl_coef": 0.1}, 4)
        assert (ppo.gold.mean(), ppo.score.mean(), ppo.kl, ppo.perplexity) == pytest.approx((0.55, 1.5, 1.5, 3.0))
        assert ppo.gold.values.tolist() == pytest.approx([0.3, 0.8])
        figures = ppo.figures()
        assert (figures["prompts"], figures["clusters"], figures["gold_held_out_tasks"]) == (2, 2, pytest.approx(0.8))
        both = variants_of([ppo, two, policy_point(samples, "ppo", {"kl_coef": 0.1}, 5)])
        assert [(v.method, [p.seed for p in v.points]) for v in both] == [("ppo", [4, 5]), ("best_of_n", [0])]


@pytest.mark.parametrize("packed", [False, True])
def test_log_ratios_equal_those_from_logits(packed):
    """Compare evaluate's KL on rows of several lengths with single responses, token by token."""
    from stages.evaluation.measuring import answer_logps, log_ratios
    from stages.models.loading import prepare
    from stages.models.packing import can_pack
    from stages.shared.runtime import make_accelerator
    from tests.builders import tiny_causal

    models = [prepare(tiny_causal("llama", seed)) for seed in (0, 1)]
    assert not packed or all([can_pack(model, 16) for model in models])
    prompts, responses = [[3, 4], [5], [6, 7, 8], [3, 4]], [[9, 2], [1, 1, 1, 2], [4], [2]]
    expected = []
    for prompt, response in zip(prompts, responses, strict=True):
        total = 0.0
        for at, token in enumerate(response):
            logits = [model(torch.tensor([prompt + response[:at]])).logits[0, -1] / 0.7 for model in models]
            total += (logits[0].log_softmax(-1)[token] - logits[1].log_softmax(-1)[token]).item()
        expected.append(total)
    tools = SimpleNamespace(
        tokenizer=SimpleNamespace(pad_token_id=0),
        accelerator=make_accelerator("cpu", "float32"),
        batch_size=3,  # the last response is in another pass
        packs=lambda model: packed,
    )
    own, other = (answer_logps(tools, model, prompts, responses, 0.7) for model in models)
    assert log_ratios([own], [other])[0] == pytest.approx(expected, abs=1e-5)


class TestOverOptimisation:
    BASE = np.random.default_rng(0).uniform(0.2, 0.6, 200)  # hard and easy prompts

    def curve(self, *rows, seeds=1):
        """Make variants of rows (kl_coef, kl, score, gold above BASE), from SFT outwards.

        Seeds differ by 0.01 in gold.
        """

        def one(coef, kl, score, gold, seed):
            return point("ppo", {"kl_coef": coef}, kl, score, self.BASE + gold + 0.01 * seed, seed=seed)

        return [variant(*(one(*row, seed) for seed in range(seeds))) for row in rows]

    @pytest.mark.parametrize("seeds", [1, 3])
    def test_gold_falls_while_the_score_rises(self, seeds):
        rows = (1.0, 0.2, 0.1, 0.0), (0.1, 2.0, 1.0, 0.2), (0.05, 4.0, 1.4, 0.1), (0.01, 12.0, 2.0, -0.1)
        (sentence,) = frontier.verdict(self.curve(*rows, seeds=seeds), 0.1)
        unit = "40 tasks of one seed" if seeds == 1 else "3 seeds"
        for part in (
            "highest at kl_coef 0.1",
            f"over {unit}",
            "kl_coef 0.1 to kl_coef 0.01 (2.0 to 12.0 nats)",
            "−0.300",
        ):
            assert part in sentence
        assert sentence.endswith("over-optimisation, the score rises and gold falls.")

    def test_the_comparison_starts_at_the_configs_own_setting(self):
        """It does not start at the highest point, which is chosen from the same data."""
        rows = (1.0, 0.2, 0.1, 0.0), (0.1, 2.0, 1.0, 0.2), (0.05, 4.0, 1.4, 0.1), (0.01, 12.0, 2.0, 0.1)
        (sentence,) = frontier.verdict(self.curve(*rows), 0.05)
        assert "highest at kl_coef 0.1" in sentence and "own kl_coef 0.05 to kl_coef 0.01" in sentence
        assert sentence.endswith("gold is flat (within ±0.03) while the score rises.")

    def test_best_of_n_starts_at_the_largest_n_up_to_the_configs(self):
        curve = [
            variant(point("best_of_n", {"n": n}, n / 10, float(n), self.BASE - 0.01 * n)) for n in (1, 2, 4, 8, 16, 32)
        ]
        assert "own best of 2 to best of 32" in frontier.verdict(curve, 3)[0]
        assert "own best of 16 to best of 32" in frontier.verdict(curve, 16)[0]

    def test_a_fall_of_both_is_not_over_optimisation(self):
        """The score falls with gold: the policy broke, the reward model was not exploited."""
        (sentence,) = frontier.verdict(self.curve((0.1, 2.0, 1.0, 0.2), (0.01, 9.0, 0.3, -0.2)), 0.1)
        assert "both fall" in sentence and "not over-optimisation" in sentence

    def test_a_flat_curve_is_called_flat(self):
        (sentence,) = frontier.verdict(self.curve((0.1, 2.0, 1.0, 0.2), (0.01, 9.0, 1.3, 0.19), seeds=3), 0.1)
        assert (
            sentence.endswith("gold is flat (within ±0.03) while the score rises.") and "optimisation" not in sentence
        )

    def test_chance_is_not_reported_as_a_fall(self):
        """Gold is lower by 0.01, with noise of 0.4 for each task."""
        noise = np.random.default_rng(5).normal(0, 0.4, 40)
        worse = (noise - noise.mean())[[int(task.split()[1]) for task in TASKS]] - 0.01
        curve = self.curve((0.1, 2.0, 1.0, 0.2))
        curve.append(variant(point("ppo", {"kl_coef": 0.05}, 3.0, 1.5, curve[0].points[0].gold.values + worse)))
        assert frontier.verdict(curve, 0.1)[0].endswith("whether gold falls cannot be told.")

    def test_nothing_is_compared_if_the_configs_own_setting_is_the_furthest(self):
        (sentence,) = frontier.verdict(self.curve((0.1, 2.0, 1.0, 0.1), (0.01, 9.0, 1.3, 0.2)), 0.01)
        assert "no fall can be seen" in sentence

    def test_no_sentence_without_gold(self):
        scores = Series(np.array([0.0, 0.2]), ("a", "b"))
        without_gold = Point(
            "ppo", {"kl_coef": 1.0}, 0, scores, None, None, kl=0.3, length=9.0, eos_rate=1.0, perplexity=2.0
        )
        assert frontier.verdict([variant(without_gold)], 1.0) == []


class TestPtx:
    def test_perplexity_at_a_gold(self):
        curve = [(0.9, 4.0), (0.8, 3.0), (0.6, 2.8)]
        assert estimates.perplexity_at(0.85, curve) == pytest.approx(3.5)
        assert estimates.perplexity_at(0.8, curve) == 3.0
        assert estimates.perplexity_at(0.95, curve) is None
        there_and_back = [(0.7, 5.0), (0.9, 4.0), (0.7, 3.0)]
        assert estimates.perplexity_at(0.8, there_and_back) == pytest.approx(3.5)

    def test_equality_in_words(self):
        assert estimates.equality([-0.01, 0.029]) == "equal within ±0.03"
        assert estimates.equality([-0.01, 0.05]).startswith("cannot be told apart")
        assert (estimates.equality([-0.09, -0.01]), estimates.equality([0.01, 0.05])) == ("lower", "higher")
        assert "one observation" in estimates.equality(None)

    def test_conditions(self):
        conditions = ptx.conditions(1.0, 0.1, [1, 3, 10])
        trained = [list(one.setting.values()) for one in conditions.values() if one.policy == "ppo"]
        assert trained == [[1.0, 0.1], [0.0, 0.1], [0.0, 0.3], [0.0, 1.0]]
        names = [one.experiment for one in conditions.values()]
        assert conditions[ptx.PTX].overrides == ("ppo.ptx_coef=1.0", "ppo.kl_coef=0.1")
        assert names[2] == "ptx_coef-0.0_kl_coef-0.3" and names[-2:] == ["sft", "base"] and len(set(names)) == 6

    def variants(self, rows, seeds=2):
        """Make variants of rows: name → (gold above 0.8, perplexity).

        Seeds differ by 0.02 in gold and 0.1 in perplexity.
        """
        return {
            name: variant(
                *(point("ppo", {}, 1.0, 1.0, np.full(50, 0.8 + gold + 0.02 * s), p + 0.1 * s, s) for s in range(seeds))
            )
            for name, (gold, p) in rows.items()
        }

    def test_verdict(self):
        rows = {"PPO-ptx": (0.0, 2.4), "plain PPO, kl_coef × 1": (0.01, 3.4), "plain PPO, kl_coef × 10": (-0.2, 3.0)}
        rows |= {"base": (-0.3, 2.3), "sft": (-0.3, 3.1)}
        variants = self.variants(rows)
        unit, first, second, third = ptx.verdict(variants)
        assert "over 2 seeds" in unit
        assert "kl_coef × 1 less PPO-ptx: gold 0.010 (0.010 to 0.010), equal within" in first
        assert "perplexity 1.00 (1.00 to 1.00)" in first  # paired: seeds differ by 0.1
        assert "perplexity is 3.43" in second  # a twenty-first of the way from 3.45 to 3.05, means over seeds
        assert "kl_coef × 10: perplexity 3.05 against 2.45" in third and "as InstructGPT found" in third
        headings, table = ptx.table(variants)
        assert len(table) == 5 and all(len(row) == len(headings) for row in table)
        rows["plain PPO, kl_coef × 10"] = (-0.2, 2.2)
        assert "does not show here" in ptx.verdict(self.variants(rows))[-1]
        assert "cannot be told from one seed" in ptx.verdict(self.variants(rows, seeds=1))[-1]


class TestSharing:
    """Share stages between a main experiment and a variant of the fake stages text → fit → page."""

    @pytest.fixture
    def setting(self, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "fsync", lambda handle: None)
        (tmp_path / "small.yaml").write_text(fakes.CONFIG)
        experiments = runner.ExperimentRunner(str(tmp_path / "small.yaml"), [], StopFlag(), stages=fakes.stages())
        main, other = ArtifactStore(tmp_path, "small"), ArtifactStore(tmp_path / "small.sweep", "other")

        def load_variant(*overrides):
            return load_experiment(tmp_path / "small.yaml", overrides, fakes.experiment_class(experiments.stages))

        experiments.update(load_variant(), main, "page")
        return experiments, main, other, load_variant

    def test_only_what_differs_runs(self, setting, capsys):
        experiments, main, other, load_variant = setting
        capsys.readouterr()
        experiments.update_variant(load_variant("name=other", "fit.steps=5"), other, "page", main)
        output = capsys.readouterr().out
        assert "fit: running" in output and "page: running" in output and "text" not in output
        for stage, same in (("text", True), ("fit", False), ("page", False)):
            assert (main.verify(stage)["digest"] == other.verify(stage)["digest"]) is same
        assert (main.folder("text") / "words/all.json").samefile(other.folder("text") / "words/all.json")
        experiments.update_variant(load_variant("name=other", "fit.steps=5"), other, "page", main)
        assert capsys.readouterr().out.strip().startswith("page: up to date")

    def test_everything_is_shared_if_nothing_differs(self, setting, capsys):
        experiments, main, other, load_variant = setting
        capsys.readouterr()
        experiments.update_variant(load_variant("name=other"), other, "page", main)
        assert "running" not in capsys.readouterr().out
        states = assess(load_variant("name=other"), other, experiments.stages)
        assert {state.kind for state in states.values()} == {"done"}

    def test_running_one_again_leaves_the_other_unchanged(self, setting):
        experiments, main, other, load_variant = setting
        experiments.update_variant(load_variant("name=other"), other, "page", main)
        before = main.verify("text")
        experiments.update(load_variant("name=other", "text.words=4"), other, "text")
        assert main.verify("text") == before
        assert other.verify("text")["metrics"] == {"words": 4}

    def test_a_change_in_the_main_experiment_is_shared_again(self, setting):
        experiments, main, other, load_variant = setting
        experiments.update_variant(load_variant("name=other", "fit.steps=5"), other, "page", main)
        experiments.update(load_variant("text.words=4"), main, "fit")
        experiments.update_variant(load_variant("name=other", "text.words=4", "fit.steps=5"), other, "page", main)
        assert other.verify("text")["digest"] == main.verify("text")["digest"]
        assert other.verify("fit")["config"]["fit"]["steps"] == 5

    def test_files_are_copied_without_hard_links(self, setting, monkeypatch):
        _, main, other, _ = setting
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links")))
        runner.link("text", main, other)
        copied = other.folder("text") / "words/all.json"
        assert copied.stat().st_nlink == 1 and other.verify("text")["digest"] == main.verify("text")["digest"]

    def test_a_damaged_artifact_is_named(self, setting):
        experiments, main, other, load_variant = setting
        experiments.update_variant(load_variant("name=other", "fit.steps=5"), other, "page", main)
        (other.folder("fit") / "model.safetensors").write_bytes(b"")
        with pytest.raises(ValueError, match=r"model\.safetensors.*remove .*other and run again"):
            experiments.update_variant(load_variant("name=other", "fit.steps=5"), other, "page", main)


def test_results_have_one_line_for_each_key(tmp_path):
    file, key = tmp_path / "results" / "x.jsonl", lambda row: (row["seed"], row["value"])
    save_rows(file, [{"seed": 1, "value": 0.5, "gold": 1}, {"seed": 0, "value": 0.5, "gold": 2}], key)
    save_rows(file, [{"seed": 1, "value": 0.5, "gold": 3}], key)
    assert [json.loads(line)["gold"] for line in file.read_text().splitlines()] == [2, 3]


class TestPage:
    variants = (
        *(variant(point("best_of_n", {"n": n}, estimates.best_of_kl(n), 0.1 * n, [0.2, 0.4, 0.9])) for n in (1, 2, 64)),
        *(variant(point("ppo", {"kl_coef": c}, 0.1 / c, 1.0, [0.3, 0.5])) for c in (0.01, 0.1)),
    )

    def test_tags_are_closed_and_nothing_is_loaded(self):
        class Check(HTMLParser):
            def __init__(self):
                super().__init__()
                self.open = []

            def handle_starttag(self, tag, attrs):
                if tag not in ("meta", "br"):
                    self.open.append(tag)
                assert all(value.startswith("#") for name, value in attrs if name in ("src", "href"))

            def handle_startendtag(self, tag, attrs):
                pass

            def handle_endtag(self, tag):
                assert self.open.pop() == tag

        text = page("a < b", "meta", ["It <is> so."], plots_of(self.variants), [table(self.variants)])
        check = Check()
        check.feed(text)
        assert not check.open and "a &lt; b" in text and "It &lt;is&gt; so." in text
        assert text.count("<svg") == 4, "each plot appears in two sizes"

    def test_every_point_is_drawn_and_named(self):
        svg = picture(plot_of(self.variants, "gold")).svg
        assert svg.count("<title>PPO") + svg.count("<title>best") == 2 * len(self.variants)  # in two sizes
        for name in ("best of 64", "PPO, kl_coef 0.01", ">1<", ">0.1<"):
            assert name in svg

    def test_the_table_is_ordered_from_sft_outwards(self):
        assert [row[0] for row in table(self.variants)[1]] == [
            "PPO, kl_coef 0.1", "PPO, kl_coef 0.01", "best of 1", "best of 2", "best of 64",
        ]  # fmt: skip


class TestCommandLine:
    @pytest.mark.parametrize("module", [frontier, ptx])
    def test_mistakes_are_lines_and_exit_2(self, module, tmp_path, capsys):
        for argv in (["--nonsense"], ["stray"], ["-c", "none.yaml"], [*MICRO, "ppo.kl_coeff=1"]):
            assert runner.run_command(module.run, [*argv, "--artifacts", str(tmp_path)]) == 2
            error = capsys.readouterr().err
            assert error.startswith("error: ") and "Traceback" not in error

    def test_a_bad_value_is_refused_before_anything_runs(self, tmp_path, capsys):
        argv = [*MICRO, "--artifacts", str(tmp_path), "--kl-coefs", "0.1", "-1"]
        assert runner.run_command(frontier.run, argv) == 2
        assert "ppo.kl_coef" in capsys.readouterr().err and not list(tmp_path.iterdir())

    def test_ptx_coef_of_zero_is_refused(self, tmp_path, capsys):
        argv = [*MICRO, "--artifacts", str(tmp_path), "ppo.ptx_coef=0"]
        assert runner.run_command(ptx.run, argv) == 2
        assert "ppo.ptx_coef: is 0" in capsys.readouterr().err

    @pytest.mark.parametrize("module", [frontier, ptx])
    def test_an_adaptive_kl_coef_is_refused(self, module, tmp_path, capsys):
        argv = [*MICRO, "--artifacts", str(tmp_path), "ppo.kl_target=6"]
        assert runner.run_command(module.run, argv) == 2
        assert "error: ppo.kl_target: is 6.0, which adapts the kl_coef" in capsys.readouterr().err

    @pytest.mark.parametrize("module", [frontier, ptx, rankings])
    def test_the_default_seeds_are_not_those_that_settings_were_chosen_on(self, module):
        assert not {0, 1, 2} & set(module.parse([]).seeds) and len(module.parse([]).seeds) >= 3

    def test_the_configs_own_value_is_always_included(self):
        assert frontier.with_own([0.1, 0.02], 0.05) == [0.1, 0.05, 0.02]
        assert frontier.with_own([0.1], 0.1) == [0.1]


class TestRankings:
    """Two seeds of three prompts, checked against sentences and tables computed by hand."""

    @pytest.fixture(autouse=True)
    def two_samples(self, monkeypatch):
        monkeypatch.setattr(rankings, "SAMPLES", 2)

    @staticmethod
    def samples(scores=((0.0, 1.0),) * 3, gold=((0.2, 0.4),) * 3, kl=((0.0, 0.0),) * 3):
        """Return samples of three prompts of one task each; by default those of SFT."""
        return {"clusters": ["a", "b", "c"], "scores": scores, "gold": gold, "kl": kl}

    def wrong(self):
        """Return samples of SFT with scores that order every two of them wrongly."""
        return self.samples(scores=((1.0, 0.0),) * 3)

    def outcomes(self):
        """Return outcomes on seeds 3 and 4: one pair a prompt orders wrongly, K = 9 rightly."""

        def model(name, samples, seed):
            trained = {"prompts": 72, "pairs": 72, "pairs_a_step": 36, "passes": 2 if name == rankings.ONE_PAIR else 8}
            trained |= {"steps": 4 if name == rankings.ONE_PAIR else 16}
            trained |= {"pairs": 720} if name == rankings.EQUAL_COMPUTE else {}
            return rankings.Outcome(name, seed, rankings.model_figures(samples), {}, trained)

        variants = {
            name: [model(name, self.wrong() if name == rankings.ONE_PAIR else self.samples(), seed) for seed in (3, 4)]
            for name in rankings.MODELS
        }
        better = self.samples(gold=[[0.5, 0.6], [0.5, 0.3], [0.1, 0.1]], kl=[[1.0, 2.0]] * 3)
        figures = rankings.policy_figures(better, self.samples())
        return variants | {
            name: [rankings.Outcome(name, seed, figures, {}, {}) for seed in (3, 4)] for name in rankings.POLICIES
        }

    def test_differences_are_paired_by_prompt_and_seed(self):
        sentences = rankings.verdicts(self.outcomes())
        assert "K = 9, equal labels orders 1.000 more often as gold does than one pair a prompt" in sentences[0]
        assert sentences[0].endswith("(95 % interval of the difference 1.000 to 1.000).")
        assert "no clear difference" in sentences[-1]
        assert len(sentences) == 2 + 3

    def test_conditions_say_what_is_equal_and_what_is_not(self):
        args = SimpleNamespace(passes=[1, 2, 8], tune_seed=2)
        unit, labels, compute, edge = rankings.conditions(self.outcomes(), args)
        assert "over 2 seeds" in unit
        assert "seed 2, which is not reported" in labels and "steps (16 and 4)" in labels
        assert "10.0 times the labels (720)" in compute
        assert "K = 9, equal labels and K = 9, equal compute" in edge and "most passes" in edge
        assert len(rankings.conditions(self.outcomes(), SimpleNamespace(passes=[2], tune_seed=2))) == 3

    def test_passes_are_those_that_order_best(self):
        """On the trial seed; of equally good numbers, the smallest."""
        tried = [
            rankings.Outcome("x", 2, rankings.model_figures(samples), {}, {"passes": passes})
            for samples, passes in ((self.wrong(), 1), (self.samples(), 2), (self.samples(), 4))
        ]
        assert rankings.best_passes(tried) == {"x": 2}

    def test_the_page_and_the_tables_show_every_variant(self):
        plots = rankings.plots_of(self.outcomes())
        assert len(plots) == 2 and all(len(plot.drawing.rows) == 3 for plot in plots)
        wins = (1 + 0.75 + 0) / 3  # 4 of 4, 3 of 4 (0.3 against 0.2 and 0.4; 0.5 twice), none
        assert f">{wins:.3f}<" in picture(plots[1]).svg
        for headings, rows in (rankings.model_table(self.outcomes()), rankings.policy_table(self.outcomes())):
            assert len(rows) == 3 and all(len(row) == len(headings) for row in rows)
        assert rankings.model_table(self.outcomes())[1][2][1:5] == ["72", "720", "36", "8 (16)"]

    def test_settings_of_a_reward_model(self):
        """A step has 36 pairs either way: 36 prompts with one pair, or one with 36."""
        pairs = rankings.reward_model_overrides(rankings.ONE_PAIR, (2880, 36), 2.0)
        whole = rankings.reward_model_overrides(rankings.EQUAL_LABELS, (80, 1), 8.0)
        assert "rankings.samples_per_prompt=2" in pairs and "rm.per_device_train_batch_size=36" in pairs
        assert "rankings.samples_per_prompt=9" in whole and "rm.per_device_train_batch_size=1" in whole
        assert {"rm.num_train_epochs=2.0", "rm.gradient_accumulation_steps=1"} <= set(pairs)

    @pytest.mark.parametrize(
        "words",
        [
            ["--pairs", "7"],
            ["--pairs", "36"],
            ["--pairs", "36000"],
            ["data.prompts=none.jsonl"],
            ["--pairs", "72", "world.prompts=80", "--tune-seed", "3", "--seeds", "3", "4"],
        ],
    )
    def test_unsuitable_settings_are_refused(self, words, tmp_path, capsys):
        assert runner.run_command(rankings.run, [*MICRO, "--artifacts", str(tmp_path), *words]) == 2
        assert capsys.readouterr().err.startswith("error: ") and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_frontier_on_a_micro_chain(tmp_path, capsys):
    """Run it twice; the second time nothing is trained and the chain is unchanged.

    Evaluate's sample of a prompt is the first of the sweep's samples.
    """
    from pipeline.cli import main as rlhf

    argv = [*MICRO, "--artifacts", str(tmp_path), "--kl-coefs", "0.5", "--betas", "--best-of", "8", "--seeds"]
    argv += ["--results", str(tmp_path / "results")]
    assert runner.run_command(frontier.run, argv) == 0
    assert "PPO, kl_coef 0.5" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "results/frontier.jsonl").read_text().splitlines()]
    trained = [("dpo", 0.1), ("ppo", 0.02), ("ppo", 0.5)]
    drawn = [("best_of_n", n) for n in (1, 2, 4, 8)]
    assert [(r["method"], *r["setting"].values()) for r in rows] == [*drawn, *trained]
    assert all(math.isfinite(r["gold"]) and r["date"] and r["versions"]["torch"] for r in rows)
    assert runner.run_command(frontier.run, argv) == 0
    assert "running" not in capsys.readouterr().out

    assert rlhf(["run", "evaluate", *MICRO, "--artifacts", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert output.count("running") == 1 and "evaluate: running" in output
    results = json.loads((tmp_path / "micro/evaluate/results.json").read_text())
    policies, responses = results["policies"], (tmp_path / "micro/evaluate/responses.jsonl").read_text().splitlines()
    samples = json.loads((tmp_path / "micro.frontier/best_of_n/samples/samples.json").read_text())
    own = [row for row in map(json.loads, responses) if row["policy"] == "sft"]
    assert [first for first, *_ in samples["scores"]] == pytest.approx([row["score"] for row in own])
    assert [first for first, *_ in samples["gold"]] == pytest.approx([row["gold"]["overall"] for row in own])
    assert samples["clusters"] == [row["cluster"] for row in own]
    assert samples["known"] == [row["known_task"] for row in own] and sum(samples["known"]) == results["leaked"]
    for method, setting in (("ppo", {"kl_coef": 0.02}), ("dpo", {"beta": 0.1})):
        row = next(r for r in rows if r["method"] == method and r["setting"] == setting)
        assert row["pretrain_perplexity"] == policies[method]["pretrain_perplexity"]
