"""The page: complete, self-contained, the same bytes for the same artifacts, whole when parts are missing."""

import io
import json
import random
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from report_run import fake_run, page_of
from rich.console import Console

from pipeline.errors import UserError
from stages import report
from stages.evaluation.statistics import rank_correlation
from stages.page import experiment as report_experiment
from stages.page import plots, svg, words
from stages.page import samples as report_samples
from stages.page import terminal as report_terminal
from stages.settings import report as report_settings


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
    {"gold": False, "world": False, "held_out": True},
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
        assert words.fixed(p["score"]) in page and words.fixed(p["gold"]["overall"], 3) in page
    for sentence in words.summary(results, words.NAMES | {"best_of_n": "best of 16"}):
        assert sentence in page
    assert all(f"{x}\u00a0%" in page for x in (70.4, 73.3, 72.6))
    assert all(m["digest"][:12] in page for m in ctx.manifests.values())


def test_samples_are_chosen_by_rule_and_show_losses_too(tmp_path):
    ctx = fake_run(tmp_path)
    responses = report.read_rows(ctx.inputs["evaluate"] / "responses.jsonl")
    results = words.complete(json.loads((ctx.inputs["evaluate"] / "results.json").read_text()))
    options = ([], results, words.NAMES, 12, report_samples.Systems())
    groups = dict(report_samples.side_by_side(responses, *options))
    assert [len(v) for v in groups.values()] == [3, 3, 3, 3]
    gold = lambda item, name: {n: row for n, row, _ in item.answers}[name]["gold"]["overall"]  # noqa: E731
    gain = lambda item: gold(item, "ppo") - gold(item, "sft")  # noqa: E731
    gains = {title: [gain(item) for item in items] for title, items in groups.items()}
    everything = [
        a["gold"]["overall"] - b["gold"]["overall"]
        for a, b in zip(
            [r for r in responses if r["policy"] == "ppo" and r["sample"] == 0],
            [r for r in responses if r["policy"] == "sft" and r["sample"] == 0],
            strict=True,
        )
    ]
    assert (
        max(everything) in gains["PPO gains most over SFT"] and min(everything) in gains["PPO loses most against SFT"]
    )
    chosen = [json.dumps(item.turns) for items in groups.values() for item in items]
    assert len(set(chosen)) == len(chosen)


def test_the_reward_model_is_told_in_parts(tmp_path):
    """Reliability and rank distance as plots, K, labelers and their agreement as a table; nothing of an older manifest
    that lacks them."""
    ctx = fake_run(tmp_path / "new")
    page = page_of(ctx)
    assert "Is the reward model as sure as it should be?" in page and "Accuracy by rank distance" in page
    for cells in (
        '<th scope="row">4</th><td>70.0\u00a0%<br><small>67.0 to 73.0\u00a0%</small></td><td>2,112</td>',
        '<th scope="row">ada&lt;b&gt; / ben</th><td>72.0\u00a0%</td><td>812</td>',
    ):
        assert cells in page
    ctx = fake_run(tmp_path / "old")
    ctx.manifests["rm"]["metrics"] = {}
    page = page_of(ctx)
    assert "as sure as it should be" not in page and "Accuracy by labeler" not in page


def test_needs_follow_the_policies_and_the_data():
    def experiment(policies, **data):
        data = {"rankings": None, "prompts": None} | data
        return SimpleNamespace(
            evaluate=SimpleNamespace(policies=policies, model_fields_set={"policies"}),
            ppo=SimpleNamespace(reward_model=None),
            data=SimpleNamespace(**data, model_dump=lambda: data),
        )

    without_judge = ["base", "sft", "rankings", "dpo", "evaluate"]
    assert report_settings.needs(experiment(["sft", "dpo"], rankings="ours.jsonl")) == without_judge
    assert report_settings.needs(experiment(["sft", "dpo"], prompts="mine.jsonl", rankings="ours.jsonl")) == [
        "base",
        "sft",
        "rankings",
        "rm",
        "dpo",
        "evaluate",
    ]
    assert report_settings.needs(experiment(["ppo"], prompts="world"))[0] == "world"


@pytest.mark.parametrize("parts", PARTS_MISSING, ids=str)
def test_table_fits_100_columns(tmp_path, parts):
    ctx = fake_run(tmp_path, **parts)
    report.run(ctx)
    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    report_terminal.show(ctx.publish, console)
    text = console.export_text()
    table = text.split("\nwin rates with")[0].split("\nKL in nats")[0]
    assert max(map(len, table.splitlines())) <= 100 and "…" not in table
    assert all(words.NAMES[n] in table for n in ctx.experiment.evaluate.policies)
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
        report_terminal.show(ctx.publish, console)
        table = console.export_text()
        assert ("The judge is the reward model itself, which PPO and best of 16 were trained" in page) == (not gold)
        assert ("PPO †" in table and "† trained to please the judge" in table) == (not gold)
        line = next(row for row in table.splitlines() if row.startswith("best of n"))
        assert ("%" in line) == gold


def test_how_base_was_asked_is_said(tmp_path):
    ctx = fake_run(tmp_path)
    assert "Base (asked in plain text) is " in page_of(ctx)
    console = Console(width=100, record=True, file=io.StringIO())
    report_terminal.show(ctx.publish, console)
    text = console.export_text()
    assert "base *" in text and "* asked in plain text" in text


def test_table_without_results_is_a_line(tmp_path):
    with pytest.raises(UserError, match="rlhf run evaluate -c CONFIG"):
        report_terminal.show(tmp_path / "report", Console())


def test_numbers_as_people_read_them():
    assert [words.fixed(v, 1) for v in (None, "NaN", -0.04, -1.25, 2)] == ["–", "–", "0.0", "−1.2", "2.0"]
    assert words.percent(0.7261, 1) == "72.6\u00a0%" and words.percent(None) == "–"


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
    assert [episode for episode, _ in report_samples.looks(journal, 3, report_samples.Systems())] == [0, 16, 24]


def test_rank_correlation_agrees_with_pandas():
    import pandas

    rng = random.Random(1)
    points = [(rng.randint(0, 5), rng.randint(0, 5)) for _ in range(60)]
    frame = pandas.DataFrame(points)
    by_hand = frame[0].rank().corr(frame[1].rank())
    assert rank_correlation(*zip(*points, strict=True)) == pytest.approx(by_hand)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None


def test_drawing_leaves_out_what_another_input_implies(tmp_path):
    ctx = fake_run(tmp_path)
    drawn = report_experiment.drawing(ctx.manifests)
    assert (
        drawn.count('class="edge"') == 9
    )  # of 18: world base sft rankings, then rm ppo beside dpo, evaluate, this page
