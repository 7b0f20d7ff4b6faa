"""The arithmetic of `make frontier` and `make bench BENCH=ptx` along independent routes; stages that are shared."""

import importlib.util
import itertools
import json
import math
import os
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

HERE = Path(__file__).resolve().parent
MICRO = ["-c", str(HERE.parent / "resume" / "micro.yaml"), "ppo.kl_target=null"]
sys.path.insert(0, str(HERE))  # where the benchmarks are started from

from sweeps import beside, estimates  # noqa: E402
from sweeps.page import page, picture, pictures, table  # noqa: E402
from sweeps.points import Point, best_of_points, keep, policy_point  # noqa: E402

from pipeline.artifacts import ArtifactStore  # noqa: E402
from pipeline.config import experiment_type, load_experiment  # noqa: E402
from pipeline.plan import assess  # noqa: E402
from pipeline.stage import StopFlag  # noqa: E402
from tests.pipeline import fakes  # noqa: E402


def load(name):
    """A benchmark as a module; not by a plain import: `ptx` and the like are no names to leave in sys.modules."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


frontier, ptx, rankings = load("frontier"), load("ptx"), load("rankings")


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """What a command sets for its process: environment and threads."""
    before, threads = dict(os.environ), torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    os.environ.clear()
    os.environ.update(before)
    torch.set_num_threads(threads)


def test_shares_of_sample_pairs_by_hand():
    """gold_order: of three pairs of samples one has equal gold; the score orders one of the other two as gold does and
    ties the other. wins: 4 pairs of samples, one won, one lost, two even."""
    scores, gold = np.array([[1.0, 2.0, 2.0], [0.0, 1.0, 2.0]]), np.array([[0.1, 0.5, 0.1], [0.3, 0.3, 0.3]])
    assert estimates.gold_order(scores, gold)[0] == pytest.approx(1.5 / 2)
    assert np.isnan(estimates.gold_order(scores, gold)[1])
    assert estimates.wins(np.array([[1.0, 2.0]]), np.array([[2.0, 1.0]])).tolist() == [0.5]
    assert estimates.wins(np.array([[3.0, 2.0]]), np.array([[2.0, 1.0]])).tolist() == [3.5 / 4]


def point(method, setting, kl, score, each, perplexity=2.5):
    each = np.asarray(each, float)
    figures = {"score": score, "score_ci95": [score - 0.1, score + 0.1], "gold": float(each.mean())}
    ci95 = estimates.mean_ci(each, 0)
    return Point(method, setting, **figures, gold_ci95=ci95, kl=kl, length=9.0, eos_rate=1.0,
                 perplexity=perplexity, prompts=len(each), each=each)  # fmt: skip


class TestBestOfN:
    @pytest.mark.parametrize("levels", [3, 1000])
    def test_it_is_the_mean_over_all_subsets(self, levels):
        """Every subset of n of 7 samples by hand, ties (3 levels: many) broken by lot among the subset's best."""
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
        """E[max of n of 1 … N] = n (N + 1) / (n + 1), in whatever order the ranks stand."""
        ranks = np.random.default_rng(0).permuted(np.tile(np.arange(1.0, 65.0), (3, 1)), axis=1)
        for n in (1, 2, 4, 8, 16, 32, 64):
            assert estimates.best_of(ranks, ranks, n) == pytest.approx(n * 65 / (n + 1))

    def test_one_is_the_mean_and_all_is_the_best(self):
        scores, values = np.random.default_rng(1).normal(size=(2, 5, 6))
        assert estimates.best_of(scores, values, 1) == pytest.approx(values.mean(1))
        assert estimates.best_of(scores, values, 6) == pytest.approx(values[np.arange(5), scores.argmax(1)])

    def test_more_than_there_are_is_refused(self):
        with pytest.raises(ValueError, match="from 1 to the 3 samples"):
            estimates.chosen_weights(np.zeros((1, 3)), 4)

    def test_its_kl_by_integration(self):
        """The best of n has density n u^(n − 1) over the sampler's quantile u: KL = ∫ n u^(n−1) ln(n u^(n−1)) du."""
        u = (np.arange(2_000_000) + 0.5) / 2_000_000
        for n in (1, 2, 8, 64):
            log_density = math.log(n) + (n - 1) * np.log(u)
            assert estimates.best_of_kl(n) == pytest.approx((np.exp(log_density) * log_density).mean(), abs=1e-5)

    def test_points_of_a_set_of_samples(self):
        samples = {"scores": [[0.0, 1.0], [3.0, 2.0]], "gold": [[0.2, 0.4], [0.6, 1.0]]}
        samples |= {"lengths": [[5, 7], [9, 3]], "finished": [[True, False], [True, True]]}
        samples |= {"kl": None, "perplexity": 3.0}
        one, two = best_of_points(samples, [1, 2], 0)
        assert (one.gold, one.score, one.kl, one.length) == pytest.approx((0.55, 1.5, 0.0, 6.0))
        assert (two.gold, two.score, two.length, two.eos_rate) == pytest.approx((0.5, 2.0, 8.0, 0.5))
        assert two.each.tolist() == pytest.approx([0.4, 0.6]) and (one.perplexity, two.perplexity) == (3.0, None)
        assert two.kl == pytest.approx(math.log(2) - 0.5)
        assert best_of_points(samples | {"gold": None}, [2], 0)[0].gold is None
        ppo = policy_point(samples | {"kl": [[1.0, 0.0], [2.0, 3.0]]}, "ppo", {"kl_coef": 0.1}, 0)
        assert (ppo.gold, ppo.score, ppo.kl, ppo.perplexity) == pytest.approx((0.55, 1.5, 1.5, 3.0))
        assert ppo.each.tolist() == pytest.approx([0.3, 0.8])


@pytest.mark.parametrize("packed", [False, True])
def test_log_ratios_as_one_reads_them_off_the_logits(packed):
    """Each response alone, token by token, against rows of several lengths in batches of three."""
    from sweeps.samples import log_ratios
    from transformers import LlamaConfig, LlamaForCausalLM

    from stages.engine import make_accelerator
    from stages.models.loading import prepare
    from stages.models.packing import can_pack

    torch.manual_seed(0)
    shape = LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    models = [prepare(LlamaForCausalLM(shape)) for _ in range(2)]
    assert not packed or all([can_pack(model, 16) for model in models])
    prompts, responses = [[3, 4], [5], [6, 7, 8], [3, 4]], [[9, 2], [1, 1, 1, 2], [4], [2]]
    expected = []
    for prompt, response in zip(prompts, responses, strict=True):
        total = 0.0
        for at, token in enumerate(response):
            logits = [model(torch.tensor([prompt + response[:at]])).logits[0, -1] / 0.7 for model in models]
            total += (logits[0].log_softmax(-1)[token] - logits[1].log_softmax(-1)[token]).item()
        expected.append(total)
    settings, tokenizer = SimpleNamespace(batch_size=3, temperature=0.7), SimpleNamespace(pad_token_id=0)
    accelerator = make_accelerator("cpu", "float32")
    found = log_ratios(settings, models, prompts, responses, tokenizer, accelerator, packed)
    assert found == pytest.approx(expected, abs=1e-5)


class TestOverOptimisation:
    BASE = np.random.default_rng(0).uniform(0.2, 0.6, 200)  # hard and easy prompts

    def points(self, *rows):
        return [point("ppo", {"kl_coef": c}, kl, score, self.BASE + gold) for c, kl, score, gold in rows]

    def test_gold_falls_while_the_score_rises(self):
        rows = (1.0, 0.2, 0.1, 0.0), (0.1, 2.0, 1.0, 0.2), (0.05, 4.0, 1.4, 0.1), (0.01, 12.0, 2.0, -0.1)
        points = self.points(*rows)
        peak, level, over = estimates.overoptimisation(points[::-1], 0)
        assert peak is points[1] and not level
        assert [p.setting["kl_coef"] for p, _ in over] == [0.05, 0.01]
        assert over[-1][1]["value"] == pytest.approx(-0.3)
        (says,) = frontier.verdict(points, "ppo", 0)
        for part in ("Gold of PPO peaks at kl_coef 0.1", "from kl_coef 0.05", "0.300 below the peak"):
            assert part in says

    def test_a_fall_of_both_is_none(self):
        """The score falls with gold: the policy broke, the reward model was not outwitted."""
        *_, over = estimates.overoptimisation(self.points((0.1, 2.0, 1.0, 0.2), (0.01, 9.0, 0.3, -0.2)), 0)
        assert over == []

    def test_chance_is_none(self):
        """Gold lower by 0.005 with noise of 0.2 a prompt."""
        peak, worse = self.points((0.1, 2.0, 1.0, 0.2)), np.random.default_rng(5).normal(-0.005, 0.2, 200)
        near = point("ppo", {"kl_coef": 0.05}, 3.0, 1.5, peak[0].each + worse - worse.mean() - 0.005)
        first, level, over = estimates.overoptimisation([*peak, near], 0)
        assert first is peak[0] and level == [near] and not over
        assert "No over-optimisation" in frontier.verdict([*peak, near], "ppo", 0)[-1]

    def test_without_gold_there_is_none(self):
        blind = Point("ppo", {"kl_coef": 1.0}, 0.1, [0, 0.2], None, None, 0.3, 9.0, 1.0, 2.0, 200, None)
        assert frontier.verdict([blind], "ppo", 0) == []

    def test_the_same_prompts_make_the_interval_narrow(self):
        gap = estimates.difference(self.BASE + 0.02, self.BASE, 0)
        assert gap["ci95"] == pytest.approx([0.02, 0.02]) and gap["n"] == 200


class TestPtx:
    def test_perplexity_at_a_gold(self):
        curve = [(0.9, 4.0), (0.8, 3.0), (0.6, 2.8)]
        assert estimates.perplexity_at(0.85, curve) == pytest.approx(3.5)
        assert estimates.perplexity_at(0.8, curve) == 3.0
        assert estimates.perplexity_at(0.95, curve) is None
        there_and_back = [(0.7, 5.0), (0.9, 4.0), (0.7, 3.0)]
        assert estimates.perplexity_at(0.8, there_and_back) == pytest.approx(3.5)

    def test_what_equal_means(self):
        assert ptx.equality([-0.01, 0.029]) == "equal within ±0.03"
        assert ptx.equality([-0.01, 0.05]).startswith("not clearly different")
        assert (ptx.equality([-0.09, -0.01]), ptx.equality([0.01, 0.05])) == ("lower", "higher")

    def test_conditions(self):
        found = ptx.conditions(1.0, 0.1, [1, 3, 10])
        trained = [list(s.values()) for policy, s in found.values() if policy == "ppo"]
        assert trained == [[1.0, 0.1], [0.0, 0.1], [0.0, 0.3], [0.0, 1.0]]
        names = [ptx.name_of(*condition) for condition in found.values()]
        assert names[2] == "ptx_coef-0.0_kl_coef-0.3" and names[-2:] == ["sft", "base"] and len(set(names)) == 6

    def test_its_verdict(self):
        each = np.full(50, 0.8)
        rows = {"PPO-ptx": (0.0, 2.4), "plain PPO, kl_coef × 1": (0.01, 3.4), "plain PPO, kl_coef × 10": (-0.2, 3.0)}
        points = {name: [point("ppo", {}, 1.0, 1.0, each + d, p)] * 2 for name, (d, p) in rows.items()}
        points |= {n: [point(n, {}, 0.0, 0.0, each - 0.3, p)] * 2 for n, p in (("base", 2.3), ("sft", 3.1))}
        first, second, third = ptx.verdict(points)
        assert "0.010 (0.010 to 0.010), equal within" in first and "3.40 against 2.40; SFT 3.10" in first
        assert "perplexity 3.38" in second  # a twenty-first of the way from 3.4 to 3.0
        assert "kl_coef × 10: perplexity 3.00" in third and "as InstructGPT found" in third
        assert len(ptx.table(points)[1]) == 5
        points["plain PPO, kl_coef × 10"] = [point("ppo", {}, 1.0, 1.0, each - 0.2, 2.2)]
        assert "does not show here" in ptx.verdict(points)[-1]


class TestSharing:
    """A main experiment and one beside it, of the pipeline's fake stages text → fit → page."""

    @pytest.fixture
    def place(self, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "fsync", lambda handle: None)
        (tmp_path / "small.yaml").write_text(fakes.CONFIG)
        shop = beside.Workshop(str(tmp_path / "small.yaml"), [], StopFlag(), stages=fakes.stages())
        main, other = ArtifactStore(tmp_path, "small"), ArtifactStore(tmp_path / "small.sweep", "other")

        def read(*overrides):
            sections = {name: stage.Config for name, stage in shop.stages.items()}
            return load_experiment(tmp_path / "small.yaml", overrides, experiment_type(sections))

        shop.bring(read(), main, "page")
        return shop, main, other, read

    def test_only_what_differs_runs(self, place, capsys):
        shop, main, other, read = place
        capsys.readouterr()
        shop.bring_beside(read("name=other", "fit.steps=5"), other, "page", main)
        said = capsys.readouterr().out
        assert "fit: running" in said and "page: running" in said and "text" not in said
        for stage, same in (("text", True), ("fit", False), ("page", False)):
            assert (main.verify(stage)["digest"] == other.verify(stage)["digest"]) is same
        assert (main.folder("text") / "words/all.json").samefile(other.folder("text") / "words/all.json")
        shop.bring_beside(read("name=other", "fit.steps=5"), other, "page", main)
        assert capsys.readouterr().out.strip().startswith("page: up to date")

    def test_everything_is_shared_where_nothing_differs(self, place, capsys):
        shop, main, other, read = place
        capsys.readouterr()
        shop.bring_beside(read("name=other"), other, "page", main)
        assert "running" not in capsys.readouterr().out
        assert {state.kind for state in assess(read("name=other"), other, shop.stages).values()} == {"done"}

    def test_a_redo_of_either_leaves_the_other_alone(self, place):
        shop, main, other, read = place
        shop.bring_beside(read("name=other"), other, "page", main)
        before = main.verify("text")
        shop.bring(read("name=other", "text.words=4"), other, "text")
        assert main.verify("text") == before
        assert other.verify("text")["metrics"] == {"words": 4}

    def test_what_changed_in_the_main_one_is_shared_anew(self, place):
        shop, main, other, read = place
        shop.bring_beside(read("name=other", "fit.steps=5"), other, "page", main)
        shop.bring(read("text.words=4"), main, "fit")
        shop.bring_beside(read("name=other", "text.words=4", "fit.steps=5"), other, "page", main)
        assert other.verify("text")["digest"] == main.verify("text")["digest"]
        assert other.verify("fit")["config"]["fit"]["steps"] == 5

    def test_without_links_it_copies(self, place, monkeypatch):
        shop, main, other, read = place
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links")))
        beside.link("text", main, other)
        copied = other.folder("text") / "words/all.json"
        assert copied.stat().st_nlink == 1 and other.verify("text")["digest"] == main.verify("text")["digest"]

    def test_a_damaged_point_is_named(self, place):
        shop, main, other, read = place
        shop.bring_beside(read("name=other", "fit.steps=5"), other, "page", main)
        (other.folder("fit") / "model.safetensors").write_bytes(b"")
        with pytest.raises(ValueError, match="model.safetensors.*remove .*other and run again"):
            shop.bring_beside(read("name=other", "fit.steps=5"), other, "page", main)


def test_one_line_a_key(tmp_path):
    file, key = tmp_path / "results" / "x.jsonl", lambda row: (row["seed"], row["value"])
    keep(file, [{"seed": 1, "value": 0.5, "gold": 1}, {"seed": 0, "value": 0.5, "gold": 2}], key)
    keep(file, [{"seed": 1, "value": 0.5, "gold": 3}], key)
    assert [json.loads(line)["gold"] for line in file.read_text().splitlines()] == [2, 3]


class TestPage:
    points = [
        *(point("best_of_n", {"n": n}, estimates.best_of_kl(n), 0.1 * n, [0.2, 0.4, 0.9]) for n in (1, 2, 64)),
        *(point("ppo", {"kl_coef": c}, 0.1 / c, 1.0, [0.3, 0.5]) for c in (0.01, 0.1)),
    ]

    def test_it_is_whole_and_loads_nothing(self):
        class Check(HTMLParser):
            open = []

            def handle_starttag(self, tag, attrs):
                self.open += [tag] * (tag not in ("meta", "br"))
                assert not {"src", "href"} & {name for name, _ in attrs}

            def handle_startendtag(self, tag, attrs):
                pass

            def handle_endtag(self, tag):
                assert self.open.pop() == tag

        text = page("a < b", "meta", ["It <is> so."], pictures(self.points), [table(self.points)])
        check = Check()
        check.feed(text)
        assert not check.open and "a &lt; b" in text and "It &lt;is&gt; so." in text
        assert text.count("<svg") == 2

    def test_every_point_is_drawn_and_named(self):
        svg = picture(self.points, "gold").svg
        assert svg.count("<circle") == len(self.points)
        for name in ("best of 64", "PPO, kl_coef 0.01", ">1<", ">0.1<"):
            assert name in svg

    def test_the_table_goes_from_sft_outwards(self):
        assert [row[0] for row in table(self.points)[1]] == [
            "PPO, kl_coef 0.1", "PPO, kl_coef 0.01", "best of 1", "best of 2", "best of 64",
        ]  # fmt: skip


class TestCommandLine:
    @pytest.mark.parametrize("module", [frontier, ptx])
    def test_mistakes_are_lines_and_exit_2(self, module, tmp_path, capsys):
        for words in (["--nonsense"], ["stray"], ["-c", "none.yaml"], [*MICRO, "ppo.kl_coeff=1"]):
            assert beside.command(module.run, [*words, "--artifacts", str(tmp_path)]) == 2
            error = capsys.readouterr().err
            assert error.startswith("error: ") and "Traceback" not in error

    def test_a_bad_value_is_refused_before_anything_runs(self, tmp_path, capsys):
        words = [*MICRO, "--artifacts", str(tmp_path), "--kl-coefs", "0.1", "-1"]
        assert beside.command(frontier.run, words) == 2
        assert "ppo.kl_coef" in capsys.readouterr().err and not list(tmp_path.iterdir())

    def test_nothing_to_compare(self, tmp_path, capsys):
        words = [*MICRO, "--artifacts", str(tmp_path), "ppo.ptx_coef=0"]
        assert beside.command(ptx.run, words) == 2
        assert "ppo.ptx_coef: is 0" in capsys.readouterr().err

    @pytest.mark.parametrize("module", [frontier, ptx])
    def test_an_adaptive_kl_coef_is_refused(self, module, tmp_path, capsys):
        words = [*MICRO, "--artifacts", str(tmp_path), "ppo.kl_target=6"]
        assert beside.command(module.run, words) == 2
        assert "error: ppo.kl_target: is 6.0 and moves kl_coef" in capsys.readouterr().err

    def test_the_configs_own_value_is_always_in(self):
        assert frontier.with_own([0.1, 0.02], 0.05) == [0.1, 0.05, 0.02]
        assert frontier.with_own([0.1], 0.1) == [0.1]


class TestRankings:
    """Two seeds of three prompts: what the page says of them, by hand."""

    @pytest.fixture(autouse=True)
    def two_samples(self, monkeypatch):
        monkeypatch.setattr(rankings, "SAMPLES", 2)

    sft = {"scores": [[0.0, 1.0]] * 3, "gold": [[0.2, 0.4]] * 3, "kl": None}
    better = {"scores": [[0.0, 1.0]] * 3, "gold": [[0.5, 0.6], [0.5, 0.3], [0.1, 0.1]], "kl": [[1.0, 2.0]] * 3}
    wrong = {"scores": [[1.0, 0.0]] * 3, "gold": [[0.2, 0.4]] * 3, "kl": None}

    def found(self):
        models = dict.fromkeys(rankings.MODELS, [(self.sft, self.sft, {})] * 2)
        models[rankings.MODELS[0]] = [(self.wrong, self.sft, {})] * 2
        return models | dict.fromkeys(rankings.POLICIES, [(self.better, self.sft, {})] * 2)

    def test_differences_are_on_the_same_prompts(self):
        sentences = rankings.verdicts(self.found())
        assert "K = 9, equal labels orders 1.000 more often as gold does than one pair a prompt" in sentences[0]
        assert sentences[0].endswith("(95 % interval 1.000 to 1.000).")
        assert "no clear difference" in sentences[-1]
        assert len(sentences) == 2 + 2 + 1

    def test_the_page_shows_every_variant(self):
        figures = rankings.pictures(self.found())
        assert len(figures) == 2 and all(figure.svg.count("<circle") == 3 for figure in figures)
        wins = (1 + 0.75 + 0) / 3  # 4 of 4, 3 of 4 (0.3 against 0.2 and 0.4; 0.5 twice), none
        assert f">{wins:.3f}<" in figures[1].svg

    @pytest.mark.parametrize("words", [["--pairs", "7"], ["--pairs", "36000"], ["data.prompts=none.jsonl"]])
    def test_what_cannot_be_compared_is_refused(self, words, tmp_path, capsys):
        assert beside.command(rankings.run, [*MICRO, "--artifacts", str(tmp_path), *words]) == 2
        assert capsys.readouterr().err.startswith("error: ") and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_whole_of_it_on_a_micro_chain(tmp_path, capsys):
    """Twice: the second run trains nothing. The main chain is untouched by it, and its own best of 3 is the best of the
    first three samples."""
    from pipeline.cli import main as rlhf

    words = [*MICRO, "--artifacts", str(tmp_path), "--kl-coefs", "0.5", "--betas", "--best-of", "8"]
    words += ["--results", str(tmp_path / "results")]
    assert beside.command(frontier.run, words) == 0
    assert "PPO, kl_coef 0.5" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "results/frontier.jsonl").read_text().splitlines()]
    trained = [("dpo", 0.1), ("ppo", 0.02), ("ppo", 0.5)]
    drawn = [("best_of_n", n) for n in (1, 2, 4, 8)]
    assert [(r["method"], *r["setting"].values()) for r in rows] == [*drawn, *trained]
    assert all(math.isfinite(r["gold"]) and r["date"] and r["versions"]["torch"] for r in rows)
    assert beside.command(frontier.run, words) == 0
    assert "running" not in capsys.readouterr().out

    assert rlhf(["run", "evaluate", *MICRO, "--artifacts", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said.count("running") == 1 and "evaluate: running" in said
    theirs = json.loads((tmp_path / "micro/evaluate/results.json").read_text())["policies"]
    samples = json.loads((tmp_path / "micro.frontier/best_of_n/samples/samples.json").read_text())
    assert theirs["best_of_n"]["score"] == pytest.approx(np.max(np.array(samples["scores"])[:, :3], axis=1).mean())
    for method, setting in (("ppo", {"kl_coef": 0.02}), ("dpo", {"beta": 0.1})):
        row = next(r for r in rows if r["method"] == method and r["setting"] == setting)
        assert row["pretrain_perplexity"] == theirs[method]["pretrain_perplexity"]
