"""The page: complete, self-contained, the same bytes for the same artifacts, whole when parts are missing."""

import io
import json
import math
import random
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from pipeline.errors import UserError
from stages import report
from stages import report_plots as plots
from stages import report_svg as svg
from stages.results import Measured, order_by_gold, summarise

MADE_OF = {
    "world": "",
    "base": "world",
    "sft": "world base",
    "rankings": "world sft",
    "rm": "world sft rankings",
    "ppo": "world sft rm",
    "dpo": "sft rankings",
    "evaluate": "world base sft rm ppo dpo",
}
HOSTILE = '</div><script>alert("x")</script><img src=x onerror=alert(1)> & ünïcode 😀 \u202e'


def write_rows(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


TRUST = {  # of the reward model
    "reliability": [
        {"confidence": 0.55, "accuracy": 0.53, "n_pairs": 900},
        {"confidence": 0.75, "accuracy": 0.72, "n_pairs": 1212},
    ],
    "accuracy_by_k": {"4": {"accuracy": 0.7, "accuracy_ci95": [0.67, 0.73], "n_pairs": 2112}},
    "accuracy_by_rank_distance": {"1": {"accuracy": 0.61, "n_pairs": 1100}, "2": {"accuracy": 0.8, "n_pairs": 1012}},
    "accuracy_by_labeler": {"ada<b>": {"accuracy": 0.7, "n_pairs": 2112}},
    "agreement_by_labelers": {"ada<b> / ben": {"agreement": 0.72, "n_pairs": 812}},
}


def fake_run(
    tmp_path: Path, policies=("base", "sft", "ppo", "dpo", "best_of_n"), gold=True, world=True, prompts=40
):
    """A StageRun over an invented tree of artifacts: plausible curves, and hostile text among the samples."""
    rng = random.Random(0)
    stages = [
        s
        for s in report.STAGES
        if s in {"base", "sft", "rankings", "rm", "evaluate"} | set(policies) or (s == "world" and world)
    ]
    inputs, manifests = {}, {}
    for i, stage in enumerate(stages):
        inputs[stage] = tmp_path / "artifacts" / "fake" / stage
        inputs[stage].mkdir(parents=True)
        manifests[stage] = {
            "stage": stage,
            "digest": f"{i:064x}"[::-1],
            "inputs": {s: manifests[s]["digest"] for s in MADE_OF[stage].split() if s in manifests},
            "started_at": f"2026-11-23T10:{i:02d}:00+00:00",
            "finished_at": f"2026-11-23T10:{i:02d}:41+00:00",
            "seed": 0,
            "versions": {"python": "3.11.7", "torch": "2.13.0"},
            "git": {"commit": "abcdef012345", "dirty": i == 2},
            "resumes": 0,
            "outputs": {"model/model.safetensors": {"sha256": "0" * 64, "bytes": 4_400_000}},
            "metrics": TRUST if stage == "rm" else {},
            "config": {"overridden": {"ppo.kl_coef": [0.05, 0.1]}} if stage == "ppo" else {},
        }
    noise = lambda s: rng.gauss(0, s)  # noqa: E731
    for stage in (s for s in ("base", "sft", "rm", "dpo") if s in stages):
        keys = {"rm": ("accuracy", "margin"), "dpo": ("rewards/chosen", "rewards/rejected")}.get(
            stage, ("lr",)
        )
        row = lambda s, keys=keys: {  # noqa: E731
            "step": s,
            "loss": 0.6 + 5 * math.exp(-s / 20) + abs(noise(0.05)),
            **{k: 0.5 + s / 400 + noise(0.02) for k in keys},
        }
        write_rows(inputs[stage] / "metrics.jsonl", [row(s) for s in range(1, 121)])
        write_rows(inputs[stage] / "evaluations.jsonl", [row(s) for s in range(0, 121, 30)])
    if "ppo" in stages:
        names = {m for _, _, _, lines, _ in plots.PPO for m, *_ in lines}
        write_rows(
            inputs["ppo"] / "metrics.jsonl",
            [
                {
                    "step": s,
                    "episode": 64 * s,
                    **{k: 0.02 + s / 80 + abs(noise(0.1)) for k in names},
                    "val/explained_variance": "NaN",
                }
                for s in range(1, 81)
            ],
        )
        write_rows(
            inputs["ppo"] / "evaluations.jsonl",
            [{"step": s, "score": s / 40, "kl": s / 10, "entropy": 1.0} for s in range(0, 81, 20)],
        )
        write_rows(
            inputs["ppo"] / "samples.jsonl",
            [
                {"step": s, "prompt": "name a fox .", "response": HOSTILE, "score": 0.5, "kl": 1.0}
                for s in range(0, 81, 20)
                for _ in range(4)
            ],
        )
    strength = {"base": -2.0, "sft": 0.0, "ppo": 1.2, "dpo": 0.8, "best_of_n": 1.6}
    lines, all_measured = [], {}
    known = [i % 2 == 0 for i in range(prompts)]
    for name in policies:
        rows = []
        for i in range(prompts):
            for k in range(1 if name == "best_of_n" else 2):
                score = strength[name] + noise(1.0)
                good = min(1.0, max(0.0, 0.62 + 0.15 * score + noise(0.15)))
                prompt = (
                    [{"role": "system", "content": "be kind"}, {"role": "user", "content": HOSTILE}]
                    if i == 0
                    else f"prompt {i}"
                )
                rows.append(
                    {
                        "policy": name,
                        "prompt": prompt,
                        "sample": k,
                        "response": HOSTILE if i % 7 == 0 else f"answer {i} of {name}",
                        "finished": k == 0,
                        "score": score,
                    }
                    | ({"gold": dict.fromkeys(plots.PARTS, good), "cluster": str(i // 3)} if gold else {})
                )
        lines += rows
        each = len(rows) // prompts
        column = lambda key, rows=rows, each=each: [  # noqa: E731
            [row[key] for row in rows[i * each : (i + 1) * each]] for i in range(prompts)
        ]
        all_measured[name] = Measured(
            asked="plain" if name == "base" else "chat",
            responses=column("response"),
            finished=column("finished"),
            scores=column("score"),
            kl=None if name == "best_of_n" else [[abs(strength[name]) * 4] * each] * prompts,
            lengths=[[14] * each] * prompts,
            gold=column("gold") if gold else None,
            text_losses=None if name == "best_of_n" else [0.8, 0.9, 0.95],
        )
    climbed = set() if gold else {"ppo", "best_of_n"}
    results = {
        name: summarise(
            own,
            all_measured["sft"],
            [i // 3 for i in range(prompts)],
            known if gold else None,
            judge_climbed=name in climbed,
            selected=not gold and name == "best_of_n",
        )
        for name, own in all_measured.items()
    }
    write_rows(inputs["evaluate"] / "responses.jsonl", lines)
    reward_model = {
        "accuracy": 0.704,
        "accuracy_ci95": [0.68, 0.73],
        "accuracy_ceiling": 0.733 if world else None,
        "n_pairs": 2112,
        "labeler_agreement": 0.726 if world else None,
        "ece": 0.021,
        "orders_as_gold": order_by_gold(all_measured["sft"], [str(i // 3) for i in range(prompts)], known)
        if gold
        else None,
    }
    (inputs["evaluate"] / "results.json").write_text(
        json.dumps(
            {
                "judge": "gold" if gold else "reward_model",
                "leaked": sum(known) if gold else 0,
                "leaked_by": "task" if gold else "near copy",
                "prompts": prompts,
                "samples_per_prompt": 2,
                "clusters": -(-prompts // 3),
                "policies": results,
                "reward_model": reward_model,
            }
        )
    )
    publish = tmp_path / "artifacts" / "fake" / "report"
    publish.mkdir()
    experiment = SimpleNamespace(name="fake", evaluate=SimpleNamespace(best_of=16, policies=list(policies)))
    return SimpleNamespace(
        experiment=experiment,
        config=report.Config(),
        seed=0,
        inputs=inputs,
        manifests=manifests,
        publish=publish,
    )


def page_of(ctx) -> str:
    report.run(ctx)
    return (ctx.publish / "index.html").read_text(encoding="utf-8")


class Tags(HTMLParser):
    """Every tag and attribute of a page, and whether tags close in order."""

    def __init__(self, page: str):
        super().__init__()
        self.found, self.open = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "i", "img", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag != "i":
            assert self.open.pop() == tag


PARTS_MISSING = [
    {},
    {"gold": False},
    {"policies": ("base", "sft", "ppo")},
    {"policies": ("base", "sft", "dpo", "best_of_n")},
    {"policies": ("sft",), "gold": False, "world": False},
    {"policies": ("sft", "ppo"), "gold": False, "world": False, "prompts": 3},
]


@pytest.mark.parametrize("parts", PARTS_MISSING, ids=str)
def test_page_stands_with_what_there_is_and_loads_nothing(tmp_path, parts):
    page = page_of(fake_run(tmp_path, **parts))
    tags = Tags(page)
    assert not tags.open
    assert not {tag for tag, _ in tags.found} & {"script", "link", "img", "iframe", "object", "base", "form"}
    for _, attributes in tags.found:
        assert not [k for k in attributes if k.startswith("on")]
        assert all(attributes.get(k, "#").startswith("#") for k in ("href", "src", "xlink:href"))
    assert (
        "url(" not in page
        and "@import" not in page
        and "nan" not in page.split("</style>")[1].split('<h2 id="samples"')[0]
    )
    for drawing in re.findall(r"<svg.*?</svg>", page, re.S):
        ElementTree.fromstring(drawing)


def test_samples_are_text_and_never_markup(tmp_path):
    page = page_of(fake_run(tmp_path))
    assert "<script>alert" not in page and "<img" not in page
    assert "&lt;script&gt;alert" in page


def test_same_artifacts_same_bytes(tmp_path):
    one, other = (page_of(fake_run(tmp_path / name)) for name in ("one", "other"))
    assert one == other


def test_every_number_of_the_results_is_on_the_page(tmp_path):
    ctx = fake_run(tmp_path)
    page = page_of(ctx)
    results = json.loads((ctx.inputs["evaluate"] / "results.json").read_text())
    for p in results["policies"].values():
        assert report.fixed(p["score"]) in page and report.fixed(p["gold"]["overall"], 3) in page
    for sentence in report.summary(results, plots.NAMES | {"best_of_n": "best of 16"}):
        assert sentence in page
    assert all(f"{x}\u00a0%" in page for x in (70.4, 73.3, 72.6))
    assert all(m["digest"][:12] in page for m in ctx.manifests.values())


def test_samples_are_chosen_by_rule_and_show_losses_too(tmp_path):
    ctx = fake_run(tmp_path)
    responses = report.read_rows(ctx.inputs["evaluate"] / "responses.jsonl")
    results = json.loads((ctx.inputs["evaluate"] / "results.json").read_text())
    groups = dict(report.side_by_side(responses, results, 12))
    assert [len(v) for v in groups.values()] == [3, 3, 3, 3]
    gold = lambda item, name: dict(item["answers"])[name]["gold"]["overall"]  # noqa: E731
    gain = lambda item: gold(item, "ppo") - gold(item, "sft")  # noqa: E731
    gains = {title: [gain(item) for item in items] for title, items in groups.items()}
    everything = [
        gain({"answers": [("ppo", a), ("sft", b)]})
        for a, b in zip(
            [r for r in responses if r["policy"] == "ppo" and r["sample"] == 0],
            [r for r in responses if r["policy"] == "sft" and r["sample"] == 0],
            strict=True,
        )
    ]
    assert (
        max(everything) in gains["PPO gains most over SFT"]
        and min(everything) in gains["PPO loses most against SFT"]
    )
    chosen = [json.dumps(item["prompt"]) for items in groups.values() for item in items]
    assert len(set(chosen)) == len(chosen)


def test_the_reward_model_is_told_in_parts(tmp_path):
    """Reliability and rank distance as plots, K, labelers and their agreement as a table; nothing of an older manifest
    that lacks them."""
    ctx = fake_run(tmp_path / "new")
    page = page_of(ctx)
    assert "Is the reward model as sure as it should be?" in page and "Accuracy by rank distance" in page
    for cells in (
        "<td>4</td><td>70.0\u00a0%</td><td>67.0 to 73.0</td><td>2112</td>",
        "<td>ada&lt;b&gt; / ben</td><td>72.0\u00a0%</td><td>–</td>",
    ):
        assert cells in page
    ctx = fake_run(tmp_path / "old")
    ctx.manifests["rm"]["metrics"] = {}
    page = page_of(ctx)
    assert "as sure as it should be" not in page and "on held-out pairs</th>" not in page


def test_needs_follow_the_policies_and_the_data():
    def experiment(policies, **data):
        data = {"rankings": None, "prompts": None} | data
        return SimpleNamespace(
            evaluate=SimpleNamespace(policies=policies, model_fields_set={"policies"}),
            ppo=SimpleNamespace(reward_model=None),
            data=SimpleNamespace(**data, model_dump=lambda: data),
        )

    without_judge = ["base", "sft", "rankings", "dpo", "evaluate"]
    assert report.needs(experiment(["sft", "dpo"], rankings="ours.jsonl")) == without_judge
    assert report.needs(experiment(["sft", "dpo"], prompts="mine.jsonl", rankings="ours.jsonl")) == [
        "base",
        "sft",
        "rankings",
        "rm",
        "dpo",
        "evaluate",
    ]
    assert report.needs(experiment(["ppo"], prompts="world"))[0] == "world"


@pytest.mark.parametrize("parts", PARTS_MISSING, ids=str)
def test_table_fits_100_columns(tmp_path, parts):
    ctx = fake_run(tmp_path, **parts)
    report.run(ctx)
    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    report.show(ctx.publish, console)
    text = console.export_text()
    table = text.split("win rates with")[0]
    assert max(map(len, table.splitlines())) <= 100 and "…" not in table
    assert all(plots.NAMES[n] in table for n in ctx.experiment.evaluate.policies)
    assert "70.4\u00a0%" in table and text.strip().endswith("report/index.html")


def test_what_is_said_of_the_prompts_is_what_evaluate_found(tmp_path):
    """In the world: how many tasks are known and how many are new. Elsewhere: how many prompts are near copies."""
    page = page_of(fake_run(tmp_path / "gold"))
    assert "20 of the prompts set tasks that training data set too, in other words; 20 set tasks that no " in page
    ctx = fake_run(tmp_path / "none", gold=False)
    file = ctx.inputs["evaluate"] / "results.json"
    results = json.loads(file.read_text())
    said = {
        0: "None of these prompts is a near copy of a training prompt.",
        1: "Of these prompts 1 is a near copy of training prompts",
        3: "Of these prompts 3 are near copies of training prompts",
    }
    for leaked, sentence in said.items():
        file.write_text(json.dumps(results | {"leaked": leaked}))
        assert sentence in page_of(ctx)


def test_a_climbed_judge_is_named_beside_what_it_says(tmp_path):
    """On the page and in the terminal, and best of n has no win rate by its own selector."""
    for gold in (False, True):
        ctx = fake_run(tmp_path / str(gold), gold=gold)
        page = page_of(ctx)
        console = Console(width=100, record=True, file=io.StringIO())
        report.show(ctx.publish, console)
        table = console.export_text()
        assert ("The judge is the reward model itself, which PPO and best of 16 were trained" in page) == (not gold)
        assert ("PPO †" in table and "† trained to please the judge" in table) == (not gold)
        line = next(row for row in table.splitlines() if row.startswith("best of n"))
        assert ("%" in line) == gold


def test_how_base_was_asked_is_said(tmp_path):
    ctx = fake_run(tmp_path)
    assert "Base (asked in plain text) is " in page_of(ctx)
    console = Console(width=100, record=True, file=io.StringIO())
    report.show(ctx.publish, console)
    text = console.export_text()
    assert "base *" in text and "* asked in plain text" in text


def test_table_without_results_is_a_line(tmp_path):
    with pytest.raises(UserError, match="rlhf run evaluate -c CONFIG"):
        report.show(tmp_path / "report", Console())


def test_numbers_as_people_read_them():
    assert [report.fixed(v, 1) for v in (None, "NaN", -0.04, -1.25, 2)] == ["–", "–", "0.0", "−1.2", "2.0"]
    assert report.percent(0.7261, 1) == "72.6\u00a0%" and report.percent(None) == "–"


def test_ticks_are_round_and_inside():
    assert svg.ticks(0.0, 1.0, 5) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert svg.ticks(-3.1, 2.2, 3) == [-2.0, 0.0, 2.0]
    assert svg.log_ticks(0.5, 2000) == [1, 10, 100, 1000] and svg.log_ticks(1.5, 30) == [2, 5, 10, 20]


def test_root_axis_shows_small_and_large():
    assert svg.root_ticks(0.0, 60.0) == [0.0, 1.0, 5.0, 10.0, 20.0, 50.0]
    axes = svg.Axes([-0.01, 50.0], [0.0, 1.0], "KL", "score", root_x=True)
    assert axes.x(-0.01) == axes.x(0.0) < axes.x(1.0) < axes.x(50.0)


def test_constant_and_single_points_can_be_drawn():
    for ys in ([0.0], [3.0, 3.0], [1e-9, 1e9]):
        axes = svg.Axes([1.0], ys, "x", "y", log_y=True)
        axes.line([(1.0, y) for y in ys], "ppo")
        assert "nan" not in axes.svg("t") and "inf" not in axes.svg("t")


def test_thin_keeps_the_mean_and_smooth_skips_gaps():
    points = [(float(i), float(i % 2)) for i in range(1000)]
    thinned = svg.thin(points, 100)
    assert len(thinned) == 100 and sum(y for _, y in thinned) / 100 == pytest.approx(0.5)
    assert svg.smooth([(0, 1.0), (1, None), (2, 3.0)]) == [(0, 1.0), (1, 2.0), (2, 3.0)]


def test_held_out_looks_stand_at_their_episodes_though_batches_changed():
    """8 episodes an update, then 4: a look after update 4 is one after 24 episodes, not after 4 · 28 / 5."""
    metrics = [{"step": s, "episode": e} for s, e in ((1, 8), (2, 16), (3, 20), (4, 24), (5, 28))]
    samples = [{"step": s, "prompt": "a", "response": "b"} for s in (0, 2, 4)]
    journal = plots.Journal(metrics, [{"step": s, "score": 0.0} for s in (0, 2, 4)], samples)
    assert plots.episodes_by_step(journal) == {0: 0, 1: 8, 2: 16, 3: 20, 4: 24, 5: 28}
    assert [episode for episode, _ in report.ppo_looks(journal, 3)] == [0, 16, 24]


def test_rank_correlation_agrees_with_pandas():
    import pandas

    rng = random.Random(1)
    points = [(rng.randint(0, 5), rng.randint(0, 5)) for _ in range(60)]
    frame = pandas.DataFrame(points)
    by_hand = frame[0].rank().corr(frame[1].rank())
    assert plots.rank_correlation(points) == pytest.approx(by_hand)
    assert plots.rank_correlation([(1, 1), (1, 2), (1, 3)]) is None


def test_drawing_leaves_out_what_another_input_implies(tmp_path):
    ctx = fake_run(tmp_path)
    drawn = report.drawing(ctx.manifests)
    assert (
        drawn.count('class="edge"') == 9
    )  # of 18: world base sft rankings, then rm ppo beside dpo, evaluate, this page
