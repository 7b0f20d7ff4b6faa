"""Check that the page is whole, loads nothing, and has the same bytes for the same artifacts."""

import io
import json
import random
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from report_run import fake_run, page_of
from rich.console import Console

from pipeline.errors import UserError
from stages import report
from stages.evaluation.statistics import rank_correlation
from stages.page import curves, drawing, lineage, palette, plot
from stages.page import samples as report_samples
from stages.page import terminal as report_terminal
from stages.page.numbers import fixed, percent
from stages.page.results import NAMES, complete
from stages.page.sentences import summary
from stages.settings import report as report_settings


class Tags(HTMLParser):
    """Parse a page: its tags and attributes; tags must close in order."""

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
def test_page_is_whole_with_what_was_measured_and_loads_nothing(tmp_path, drawn_run, parts):
    if parts:
        with_plots = parts in (PARTS_MISSING[4], PARTS_MISSING[6])  # not in all: drawing takes seconds
        page = page_of(fake_run(tmp_path, **parts), with_plots=with_plots)
    else:
        page = (drawn_run.publish / "index.html").read_text(encoding="utf-8")
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
    for element in re.findall(r"<svg.*?</svg>", page, re.S):
        ElementTree.fromstring(element)


def test_samples_are_text_and_never_markup(tmp_path):
    page = page_of(fake_run(tmp_path))
    assert "<script>alert" not in page and "<img" not in page
    assert "&lt;script&gt;alert" in page


def test_same_artifacts_same_bytes(tmp_path, drawn_run):
    runs = [drawn_run, fake_run(tmp_path)]
    assert (drawn_run.publish / "index.html").read_text(encoding="utf-8") == page_of(runs[1], with_plots=True)
    files = [{path.name: path.read_bytes() for path in (ctx.publish / "plots").iterdir()} for ctx in runs]
    assert files[0] == files[1] and len(files[0]) > 25 and all(name.endswith(".png") for name in files[0])


def test_every_number_of_the_results_is_on_the_page(tmp_path):
    ctx = fake_run(tmp_path)
    page = page_of(ctx)
    results = json.loads((ctx.inputs["evaluate"] / "results.json").read_text())
    for p in results["policies"].values():
        assert fixed(p["score"]) in page and fixed(p["gold"]["overall"], 3) in page
    for sentence in summary(results, NAMES | {"best_of_n": "best of 16"}):
        assert sentence in page
    assert all(f"{x}\u00a0%" in page for x in (70.4, 73.3, 72.6))
    assert all(m["digest"][:12] in page for m in ctx.manifests.values())


def test_samples_are_chosen_by_rule_and_show_losses_too(tmp_path):
    ctx = fake_run(tmp_path)
    responses = report.read_rows(ctx.inputs["evaluate"] / "responses.jsonl")
    results = complete(json.loads((ctx.inputs["evaluate"] / "results.json").read_text()))
    options = ([], results, NAMES, 12, report_samples.SystemPrompts())
    groups = dict(report_samples.side_by_side(responses, *options))
    assert [len(v) for v in groups.values()] == [3, 3, 3, 3]
    gold = lambda item, name: {answer.policy: answer.sampled for answer in item.answers}[name]["gold"]["overall"]  # noqa: E731
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


def test_the_reward_model_is_shown_in_parts(tmp_path):
    """Reliability and rank distance are plots; K, labelers and their agreement are tables.

    An older manifest that lacks them gives none.
    """
    ctx = fake_run(tmp_path / "new")
    page = page_of(ctx)
    assert "How well is the reward model calibrated?" in page and "Accuracy by rank distance" in page
    for cells in (
        '<th scope="row">4</th><td>70.0\u00a0%<br><small>67.0 to 73.0\u00a0%</small></td><td>2,112</td>',
        '<th scope="row">ada&lt;b&gt; / ben</th><td>72.0\u00a0%</td><td>812</td>',
    ):
        assert cells in page
    ctx = fake_run(tmp_path / "old")
    ctx.manifests["rm"]["metrics"] = {}
    page = page_of(ctx)
    assert "calibrated" not in page and "Accuracy by labeler" not in page


def test_needs_follow_the_policies_and_the_data():
    def experiment(policies, **data):
        data = {"rankings": None, "prompts": None} | data
        return SimpleNamespace(
            evaluate=SimpleNamespace(policies=policies, model_fields_set={"policies"}),
            ppo=SimpleNamespace(reward_model=None, rewards=None),
            rankings=SimpleNamespace(scorer=None, judge_fraction=None),
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
    console = Console(width=100, record=True, file=io.StringIO())
    report_terminal.show(ctx.publish, console)
    text = console.export_text()
    table = text.split("\nwin rates with")[0].split("\nKL in nats")[0]
    assert max(map(len, table.splitlines())) <= 100 and "…" not in table
    assert all(NAMES[n] in table for n in ctx.experiment.evaluate.policies)
    assert "70.4\u00a0%" in table and text.strip().endswith("report/index.html")


def test_the_page_says_how_far_prompts_are_held_out(tmp_path):
    """Count known and new tasks in the world, and near copies of prompts elsewhere."""
    page = page_of(fake_run(tmp_path / "gold"))
    assert (
        "20 of the prompts set tasks that also occur in training data, in other words; the tasks of the other 20 "
        in page
    )
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


def test_a_judge_that_was_maximised_is_named_with_its_verdict(tmp_path):
    """Check the page and the terminal; best of n has no win rate by its own selector."""
    for gold in (False, True):
        ctx = fake_run(tmp_path / str(gold), gold=gold)
        page = page_of(ctx)
        console = Console(width=100, record=True, file=io.StringIO())
        report_terminal.show(ctx.publish, console)
        table = console.export_text()
        assert ("The judge is the reward model itself, which PPO and best of 16 were trained" in page) == (not gold)
        assert ("PPO †" in table and "† trained on the judge's score" in table) == (not gold)
        line = next(row for row in table.splitlines() if row.startswith("best of n"))
        assert ("%" in line) == gold


def test_the_page_says_how_base_was_prompted(tmp_path):
    ctx = fake_run(tmp_path)
    assert "Base (prompted in plain text) is " in page_of(ctx)
    console = Console(width=100, record=True, file=io.StringIO())
    report_terminal.show(ctx.publish, console)
    text = console.export_text()
    assert "base *" in text and "* prompted in plain text" in text


def test_missing_results_give_an_error_line(tmp_path):
    with pytest.raises(UserError, match="rlhf run evaluate -c CONFIG"):
        report_terminal.show(tmp_path / "report", Console())


def test_numbers_are_formatted_for_people():
    assert [fixed(v, 1) for v in (None, "NaN", -0.04, -1.25, 2)] == ["–", "–", "0.0", "−1.2", "2.0"]
    assert percent(0.7261, 1) == "72.6\u00a0%" and percent(None) == "–"


def ticks(axis) -> list[float]:
    """Return the ticks that are drawn: matplotlib's locators also give one beyond either end."""
    low, high = sorted(axis.get_view_interval())
    return [float(f"{tick:.10g}") for tick in axis.get_majorticklocs() if low <= tick <= high]


def axes_of(ys, **options):
    """Draw a line through ys at x = 0, 1, …; return matplotlib's axes."""
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    drawing.draw_curves(axes, plot.Curves([plot.Line(list(enumerate(ys)), "ppo")], "x", "y", **options))
    return axes


def test_ticks_are_round_and_inside():
    assert ticks(axes_of([0.0, 1.0]).yaxis) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(axes_of([-3.1, 2.2]).yaxis) == [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0]
    assert ticks(axes_of([0.5, 2000.0], log_y=True).yaxis) == [1, 10, 100, 1000]
    assert ticks(axes_of([1.5, 30.0], log_y=True).yaxis) == [2, 5, 10, 20]
    assert [drawing.tick_text(value) for value in (0.30000000000000004, -2.0, 20_000.0)] == ["0.3", "−2", "20k"]


def test_root_axis_shows_small_and_large():
    assert drawing.root_ticks(0.0, 60.0) == [0.0, 1.0, 5.0, 10.0, 20.0, 50.0]
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    drawing.draw_curves(axes, plot.Curves([plot.Line([(-0.01, 0.0), (50.0, 1.0)], "ppo")], "KL", "score", root_x=True))
    x = lambda value: axes.transData.transform((value, 0.0))[0]  # noqa: E731
    assert x(-0.01) == x(0.0) < x(1.0) < x(50.0)


def test_constant_and_single_points_can_be_drawn():
    for ys in ([0.0], [3.0, 3.0], [1e-9, 1e9], [None], []):
        points = [(1.0, y) for y in ys]
        curve = plot.Curves([plot.Line(points, "ppo"), plot.Dots(points, "ppo")], "x", "y", log_y=True)
        svg = drawing.picture(plot.Plot("name", "title", "caption", curve)).svg
        assert "nan" not in svg and "inf" not in svg


def test_a_picture_has_the_colours_of_the_page_and_its_words():
    """Check that colours are variables, text is text and markers have tooltips."""
    label = plot.Label(1.0, 2.0, "<PPO>", "ppo")
    marks = [plot.Dots([(0.0, 1.0), (None, 3.0), (1.0, 2.0)], "ppo", tips=("a", "", "b & c")), label]
    drawn = plot.Plot("name", "A <title>", "caption", plot.Curves(marks, "x axis", "y axis"), size="large")
    svg = drawing.picture(drawn).svg
    small, large = (ElementTree.fromstring(part + "</svg>") for part in svg.split("</svg>")[:2])
    assert [small.get("class"), large.get("class")] == ["plot narrow", "plot wide"]
    for element in (small, large):
        assert element.get("role") == "img"
        names = {child.get("id"): child.text for child in element if child.tag in ("title", "desc")}
        assert names[element.get("aria-labelledby")] == "A <title>"
        assert "y axis against x axis" in names[element.get("aria-describedby")]
        texts = [text.text for text in element.iter("text")]
        assert {"x axis", "y axis", "<PPO>"} <= set(texts)
        assert [title.text for use in element.iter("use") for title in use] == ["a", "b & c"]
    assert not re.search(r"#[0-9a-f]{6}", svg) and "var(--ppo)" in svg and "font-family" not in svg
    ids = re.findall(r' id="([^"]+)"', svg)
    assert len(set(ids)) == len(ids)


def test_labels_cover_neither_markers_nor_each_other():
    labels = [plot.Label(1.0, 1.0, "first", "ppo"), plot.Label(1.02, 1.0, "second", "sft")]
    marks = [*labels, plot.Dots([(0.0, 0.0), (2.0, 2.0)], "ppo")]
    figure = drawing.draw(plot.Plot("name", "title", "", plot.Curves(marks, "x", "y")), "large")
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 2 and not boxes[0].overlaps(boxes[1])


def test_the_palette_is_that_of_the_page():
    folder = Path(report.__file__).parent / "page"
    styles = [(folder / name).read_text(encoding="utf-8") for name in ("style.j2", "compare_style.j2")]
    light = dict(pair for style in styles for pair in re.findall(r"--(\w+): (#\w{6})", style.split("}")[0]))
    assert {tone: light[tone] for tone in palette.COLOURS} == palette.COLOURS
    assert len(set(palette.COLOURS.values())) == len(palette.COLOURS), "a colour in an SVG names its tone"


def test_thin_keeps_the_mean_and_smooth_skips_gaps():
    points = [(float(i), float(i % 2)) for i in range(1000)]
    thinned = plot.thin(points, 100)
    assert len(thinned) == 100 and sum(y for _, y in thinned) / 100 == pytest.approx(0.5)
    assert plot.smooth([(0, 1.0), (1, None), (2, 3.0)]) == [(0, 1.0), (1, 2.0), (2, 3.0)]


def test_held_out_evaluations_are_at_their_episodes_though_batches_changed():
    """With 8 episodes per update, then 4, update 4 is at 24 episodes and not at 4 · 28 / 5."""
    metrics = [{"step": s, "episode": e} for s, e in ((1, 8), (2, 16), (3, 20), (4, 24), (5, 28))]
    samples = [{"step": s, "prompt": "a", "response": "b"} for s in (0, 2, 4)]
    journal = curves.Journal(metrics, [{"step": s, "score": 0.0} for s in (0, 2, 4)], samples)
    assert curves.episodes_by_step(journal) == {0: 0, 1: 8, 2: 16, 3: 20, 4: 24, 5: 28}
    assert [episode for episode, _ in report_samples.moments(journal, 3, report_samples.SystemPrompts())] == [0, 16, 24]


def test_rank_correlation_agrees_with_pandas():
    import pandas

    rng = random.Random(1)
    points = [(rng.randint(0, 5), rng.randint(0, 5)) for _ in range(60)]
    frame = pandas.DataFrame(points)
    by_hand = frame[0].rank().corr(frame[1].rank())
    assert rank_correlation(*zip(*points, strict=True)) == pytest.approx(by_hand)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None


def test_drawing_leaves_out_what_another_input_implies(tmp_path):
    graph = lineage.lineage_plot(fake_run(tmp_path).manifests).drawing
    # of 18: world base sft rankings, then rm ppo beside dpo, evaluate, this page
    assert sum(len(inputs) for inputs in graph.edges.values()) == 9
