"""Check what `rlhf compare` says: pairing by prompt, means over seeds, settings, and the page."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from report_run import HOSTILE, MADE_OF, fake_run, write_rows
from scipy import stats

from pipeline import cli
from pipeline.errors import UserError
from pipeline.store import integrity
from stages.page import compare, compare_pairs, compare_plots, compare_read, compare_results, compare_settings
from stages.page.compare_read import Side
from stages.page.drawing import Picture
from stages.page.results import complete
from tests.stages.page.test_report import Tags


@pytest.fixture
def small_pictures(monkeypatch):
    """Leave out the drawing, which takes seconds."""
    monkeypatch.setattr(compare, "picture", lambda plot: Picture(plot, f"<svg><title>{plot.name}</title></svg>"))


def publish(root, name, seed=0, kl_coef=0.1, taken=(), edit=None, **options):
    """Write an experiment with sealed manifests below `root`.

    Args:
        root: The folder of artifacts.
        name: The experiment.
        seed: Its seed.
        kl_coef: Its ppo.kl_coef.
        taken: Stages that it takes from the experiment `origin` beside it.
        edit: Function of the folder of evaluate that changes what was measured.
        **options: Those of `fake_run`.
    """
    ctx = fake_run(root / f".{name}", **options)
    folder = root / name
    (root / f".{name}" / "artifacts" / "fake").rename(folder)
    shutil.rmtree(folder / "report")
    if edit is not None:
        edit(folder / "evaluate")
    digests = {}
    for stage in taken:
        digests[stage] = json.loads((root / "origin" / stage / "manifest.json").read_text())["digest"]
        shutil.rmtree(folder / stage)
    for stage, manifest in ctx.manifests.items():
        if stage in taken:
            continue
        config = json.loads(json.dumps(manifest["config"]))
        if stage == "ppo":
            config["ppo"]["kl_coef"] = kl_coef
        needs = MADE_OF[stage].split()
        here = {need: {"experiment": "origin", "folder": f"../origin/{need}"} for need in needs if need in taken}
        record = manifest | {
            "seed": seed,
            "config": config | ({"from": here} if here else {}),
            "inputs": {need: digests[need] for need in needs if need in digests},
            "outputs": integrity.describe_files(folder / stage, integrity.list_files(folder / stage)),
            "fingerprint": stage,
            "run_id": f"{name}{stage}",
        }
        sealed = integrity.seal({key: value for key, value in record.items() if key != "digest"})
        (folder / stage / "manifest.json").write_text(json.dumps(sealed))
        digests[stage] = sealed["digest"]
    return folder


def compared(root, *names, output="page.html"):
    """Compare experiments; return the page and what the terminal shows."""
    from rich.console import Console

    console = Console(width=200, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    assert compare.run(names, root, str(root / output), console) == 0
    return (root / output).read_text(encoding="utf-8"), console.export_text()


def rows_of(page, label):
    """Return the rows of the table with a caption: lists of the text of each cell."""
    table = page[page.index(f"<caption>{label}</caption>") :]
    table = table[: table.index("</table>")]
    rows = [
        re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)
        for row in re.findall(r"<tr>.*?</tr>", table, re.DOTALL)
    ]
    return [[re.sub(r"<[^>]+>", " ", cell).split() for cell in row] for row in rows]


# -- pairs ---------------------------------------------------------------------------------------


def side(name, rows, rm="r1", seed=0, evaluate=None):
    """Return a side that answered prompts: rows are (prompt, sample, gold, score, length)."""
    responses = [
        {"policy": "ppo", "prompt": prompt, "sample": k, "response": f"{name} {prompt}", "score": score,
         "length": length, "finished": True, "gold": {"overall": gold} if gold is not None else None}
        for prompt, k, gold, score, length in rows
    ]  # fmt: skip
    manifest = {"seed": seed, "inputs": {"rm": rm}, "config": {"evaluate": evaluate or {}}, "digest": name}
    results = complete({"judge": "gold", "policies": {"ppo": {"score": 1.0, "gold": None, "kl_to_sft": 1.0}}})
    return Side(name, name, {"evaluate": manifest}, {}, results, responses, [])


def random_rows(seed, prompts, samples=2):
    rng = np.random.default_rng(seed)
    return [(f"p{i}", k, float(rng.uniform()), float(rng.normal()), int(rng.integers(3, 20)))
            for i in prompts for k in range(samples)]  # fmt: skip


def test_differences_are_paired_by_the_content_of_the_prompt():
    ours, theirs = random_rows(1, range(30)), random_rows(2, range(30))
    one, other = side("a", ours), side("b", theirs[::-1])
    pairing = compare_pairs.pair(one, other, "ppo")
    assert len(pairing.ours) == 30 == pairing.total and pairing.same_judge
    mean = {name: {f"p{i}": np.mean([row[3] for row in rows if row[0] == f"p{i}"]) for i in range(30)}
            for name, rows in (("ours", ours), ("theirs", theirs))}  # fmt: skip
    gaps = np.array([mean["ours"][p] - mean["theirs"][p] for p in mean["ours"]])
    half = stats.t.ppf(0.975, 29) * gaps.std(ddof=1) / np.sqrt(30)
    found = compare_pairs.difference(pairing, "reward_model")
    assert found["value"] == pytest.approx(gaps.mean())
    assert found["ci95"] == pytest.approx([gaps.mean() - half, gaps.mean() + half])
    gold = compare_pairs.difference(pairing, "gold")
    assert -1 <= gold["ci95"][0] < gold["value"] < gold["ci95"][1] <= 1
    back = compare_pairs.difference(compare_pairs.pair(other, one, "ppo"), "gold")
    assert back["value"] == pytest.approx(-gold["value"])


def test_wins_are_counted_over_all_pairs_of_samples():
    ours, theirs = random_rows(3, range(9), 3), random_rows(4, range(9), 2)
    found = compare_pairs.wins_over(compare_pairs.pair(side("a", ours), side("b", theirs), "ppo"), ["gold"])
    wins = [np.mean([float(a[2] > b[2]) for a in ours for b in theirs if a[0] == b[0] == f"p{i}"]) for i in range(9)]
    assert found["by"] == "gold" and found["value"] == pytest.approx(np.mean(wins))


@pytest.mark.parametrize("first, shared", [(50, "no evaluation prompts"), (9, "one evaluation prompt")])
def test_prompts_that_differ_are_not_paired(first, shared):
    one, other = side("a", random_rows(1, range(10))), side("b", random_rows(1, range(first, first + 10)))
    table, said = compare_results.paired_table([one, other], [compare_results.Contrast(1, 0)], "ppo", ["", ""])
    assert table is None
    assert said == [(f"{shared} in common, so the figures are not paired", "b and a")]


def test_common_prompts_are_counted():
    one, other = side("a", random_rows(1, range(10))), side("b", random_rows(1, range(4, 14)))
    table, said = compare_results.paired_table([one, other], [compare_results.Contrast(1, 0)], "ppo", ["", ""])
    assert table is not None and table.rows[0][-1].text == "6 of 14"
    assert said == [("compared on the 6 prompts that both answered, of 14", "b and a")]


def test_scores_of_different_reward_models_are_not_compared():
    one, other = side("a", random_rows(1, range(10))), side("b", random_rows(2, range(10)), rm="r2")
    pairing = compare_pairs.pair(one, other, "ppo")
    assert (
        compare_pairs.difference(pairing, "reward_model") is None
        and compare_pairs.difference(pairing, "gold") is not None
    )
    said = compare_results.sentences(compare_results.remarks_on(pairing, one, other))
    assert said == ["a and b: scored by different reward models, so the scores are not compared"]
    without_gold = [(p, k, None, s, n) for p, k, _, s, n in random_rows(1, range(10))]
    blind = compare_pairs.pair(side("a", without_gold), side("b", without_gold, rm="r2"), "ppo")
    assert compare_pairs.wins_over(blind, ["reward_model"]) is None
    judged = compare_pairs.pair(side("a", without_gold), side("b", without_gold), "ppo")
    assert compare_pairs.wins_over(judged, ["reward_model"])["by"] == "reward_model"


def test_other_sampling_is_said():
    one = side("a", random_rows(1, range(5)), evaluate={"temperature": 1.0})
    other = side("b", random_rows(1, range(5)), evaluate={"temperature": 0.7})
    said = compare_results.remarks_on(compare_pairs.pair(one, other, "ppo"), one, other)
    assert said == [("sampled differently: evaluate.temperature is 1.0 here and 0.7 there", "a and b")]
    lines = compare_results.sentences([("x", "a and b"), ("y", "a and b"), ("x", "a and c"), ("x", "a and b")])
    assert lines == ["a and b; a and c: x", "a and b: y"]


# -- seeds ---------------------------------------------------------------------------------------


def seeded(name, seed, score):
    made = side(name, [], seed=seed)
    made.policies["ppo"] |= {"score": score}
    return made


def test_the_seed_is_the_unit_of_means_and_differences():
    scores = {("a", 0): 1.0, ("a", 1): 1.5, ("a", 2): 1.1, ("b", 2): 2.0, ("b", 0): 1.9, ("b", 1): 2.6}
    sides = [seeded(f"{name}{seed}", seed, score) for (name, seed), score in scores.items()]
    groups = [[0, 1, 2], [3, 4, 5]]
    table = compare_results.seeds_table(sides, groups, "ppo", ["run1"] * 3 + ["run2"] * 3)
    score = table.columns.index("score")
    gaps = np.array([1.9 - 1.0, 2.6 - 1.5, 2.0 - 1.1])
    half = stats.t.ppf(0.975, 2) * gaps.std(ddof=1) / np.sqrt(3)
    cells = [row[score] for row in table.rows]
    assert cells[0].text == "1.20" and cells[1].text == "2.17" and cells[2].text == f"+{gaps.mean():.2f}"
    assert cells[2].small == f"+{gaps.mean() - half:.2f} to +{gaps.mean() + half:.2f}"
    assert table.rows[2][0].small == "paired by seed" and [row[-1].text for row in table.rows] == ["3", "3", "3"]
    assert compare_results.contrasts_of(sides, groups) == [
        compare_results.Contrast(i, j) for i, j in ((3, 2), (4, 0), (5, 1))
    ]


def test_no_common_seed_is_said():
    sides = [seeded("a-seed0", 0, 1.0), seeded("a-seed1", 1, 1.2), seeded("b", 7, 3.0)]
    table = compare_results.seeds_table(sides, [[0, 1], [2]], "ppo", ["run1", "run1", "run2"])
    assert len(table.rows) == 1
    said = compare_results.without_seeds(sides, [[0, 1], [2]])
    assert said == ["b and a-seed have no seed in common, so no difference over seeds can be computed"]


def test_means_over_seeds_stay_in_bounds():
    figure = next(figure for figure in compare_results.FIGURES if figure.name == "gold")
    assert compare_results.mean_cell([0.9, 1.0], figure).small == "0.315 to 1.000"
    assert compare_results.mean_cell([1.0, 1.0], figure).small == ""
    assert compare_results.mean_cell([1.0, None], figure).text == "–"


def test_mean_curves_need_a_common_x():
    assert compare_plots.mean_curve([[(1, 2.0), (2, 4.0), (3, None)], [(2, 6.0), (3, 1.0)]]) == [(2, 5.0)]


def test_a_second_run_of_a_seed_is_no_further_seed():
    settings = [{"seed": "0", "a": "1"}, {"seed": "1", "a": "1"}, {"seed": "0", "a": "1"}, {"seed": "0", "a": "2"}]
    assert compare_settings.groups_of(settings) == [[0, 1], [2], [3]]


# -- settings ------------------------------------------------------------------------------------


def test_labels_leave_out_what_all_have():
    assert compare_read.labels_of(["t--a-1--s-0", "t--a-2--s-0"]) == ["a-1", "a-2"]
    assert compare_read.labels_of(["t", "t--a-2"]) == ["t", "t--a-2"]
    assert compare_read.labels_of(["x", "y"]) == ["x", "y"]


def test_a_setting_that_an_older_version_did_not_record_has_its_default():
    def with_ppo(settings):
        return Side("a", "a", {"ppo": {"seed": 0, "inputs": {}, "config": {"ppo": settings}}}, {}, None, [], [])

    defaults = {"ppo.lam": 0.95, "ppo.gamma": 1.0}
    old = compare_settings.settings_of(with_ppo({"lam": 0.95}), defaults)
    new = compare_settings.settings_of(with_ppo({"lam": 0.95, "gamma": 1.0}), defaults)
    other = compare_settings.settings_of(with_ppo({"lam": 0.95, "gamma": 0.9}), defaults)
    assert compare_settings.differing([old, new]) == [] and compare_settings.differing([old, other]) == ["ppo.gamma"]


# -- the page ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_pictures")
def test_a_page_of_two_experiments(tmp_path):
    publish(tmp_path, "origin", kl_coef=0.1)
    publish(tmp_path, "other", kl_coef=0.2, taken=("world", "base", "sft", "rankings", "rm"), edit=shift_gold)
    page, text = compared(tmp_path, "origin", "other")
    Tags(page)
    assert not re.findall(r'(?:src|href)="(?!#)', page) and "<script" not in page
    assert rows_of(page, "Settings that differ")[1:] == [[["origin"], ["0.1"]], [["other"], ["0.2"]]]
    assert "World, base, sft, rankings and rm are the same in all of them, by digest." in page
    (_, row) = rows_of(page, "PPO: differences, paired by prompt")
    assert row[0] == ["other", "−", "origin"] and row[-1] == ["40", "of", "40"]
    assert row[1][0] == "+0.100"  # by construction
    assert HOSTILE not in page and "Where other gains most over origin" in page
    assert "ppo.kl_coef" in text and "− origin" in text and "page: " in text
    again, _ = compared(tmp_path, "origin", "other", output="again.html")
    assert again == page


def shift_gold(folder: Path) -> None:
    """Give every response of PPO a tenth more gold, and let the rest as it is."""
    rows = [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]
    for row in rows:
        if row["policy"] == "ppo":
            row["gold"]["overall"] += 0.1
    write_rows(folder / "responses.jsonl", rows)
    results = json.loads((folder / "results.json").read_text())
    results["policies"]["ppo"]["gold"]["overall"] += 0.1
    (folder / "results.json").write_text(json.dumps(results))


@pytest.mark.usefixtures("small_pictures")
def test_seeds_on_the_page(tmp_path):
    for seed in (0, 1):
        publish(tmp_path, f"t--kl-0.1--seed-{seed}", seed=seed, kl_coef=0.1)
        publish(tmp_path, f"t--kl-0.2--seed-{seed}", seed=seed, kl_coef=0.2, edit=shift_gold)
    names = [f"t--kl-{kl}--seed-{seed}" for kl in (0.1, 0.2) for seed in (0, 1)]
    page, _ = compared(tmp_path, *names)
    Tags(page)
    rows = rows_of(page, "PPO: means over seeds")
    assert [row[0] for row in rows[1:]] == [["kl-0.1"], ["kl-0.2"], ["kl-0.2", "−", "kl-0.1", "paired", "by", "seed"]]
    assert rows[3][1][0] == "+0.100"
    assert page.count('class="tag t-run1">kl-0.1') and page.count('class="tag t-run2">kl-0.2')


@pytest.mark.usefixtures("small_pictures")
def test_experiments_without_results(tmp_path):
    for name in ("a", "b"):
        folder = publish(tmp_path, name)
        for stage in ("evaluate", "dpo", "ppo", "rm"):
            shutil.rmtree(folder / stage)
    page, text = compared(tmp_path, "a", "b")
    Tags(page)
    assert "No experiment has finished evaluate" in page and "<figure>" in page and "no setting differs" in text
    publish(tmp_path, "c")
    page, _ = compared(tmp_path, "a", "c")
    assert "Without results, because evaluate is not finished: a." in page


@pytest.mark.usefixtures("small_pictures")
@pytest.mark.parametrize(
    "options", [{"gold": False}, {"gold": False, "reward_model": False, "policies": ("sft", "dpo")}]
)
def test_other_judges_and_none(tmp_path, options):
    publish(tmp_path, "a", **options)
    publish(tmp_path, "b", prompts=30, **options)
    page, _ = compared(tmp_path, "a", "b")
    Tags(page)
    assert ("†" in page) == ("policies" not in options)


def test_a_taken_stage_that_was_made_again_is_left_out(tmp_path):
    publish(tmp_path, "origin")
    publish(tmp_path, "other", taken=("world", "base", "sft"))
    shutil.rmtree(tmp_path / "origin")
    publish(tmp_path, "origin", seed=5)
    (made,) = compare_read.read_sides([str(tmp_path / "other")], tmp_path)
    assert "sft" not in made.manifests and "ppo" in made.manifests
    assert "sft was taken from origin, where it was made again since: it is left out" in made.notes


def test_what_a_taken_stage_was_made_from_is_found(tmp_path):
    publish(tmp_path, "origin")
    folder = publish(tmp_path, "other", taken=("world", "base", "sft", "rankings", "rm"))
    for stage in ("evaluate", "dpo"):
        shutil.rmtree(folder / stage)
    (made,) = compare_read.read_sides([str(folder)], tmp_path)  # PPO needs world, sft and rm
    assert list(made.manifests) == ["world", "base", "sft", "rankings", "rm", "ppo"] and made.notes == []
    assert made.journals["base"].metrics


def test_plots_are_drawn(tmp_path):
    publish(tmp_path, "a", kl_coef=0.1)
    publish(tmp_path, "b", kl_coef=0.2, edit=shift_gold)
    page, _ = compared(tmp_path, "a", "b")
    Tags(page)
    assert page.count("<svg") >= 15 and "var(--run1)" in page and "var(--run2)" in page
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("scheme, card", [(0, "#ffffff"), (1, "#1a1e27")])
def test_names_of_experiments_are_readable_in_both_schemes(scheme, card):
    """WCAG asks for a contrast of 4.5 between text and background."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    style = (Path(compare.__file__).parent / "compare_style.j2").read_text(encoding="utf-8")
    colours = re.findall(r"--run\d: (#\w{6})", style)[8 * scheme : 8 * scheme + 8]
    assert len(set(colours)) == 8
    for colour in colours:
        light, dark = sorted([luminance(colour), luminance(card)], reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, colour


# -- mistakes ------------------------------------------------------------------------------------


def test_mistakes_are_lines(tmp_path, capsys):
    folder = publish(tmp_path, "a")
    publish(tmp_path, "b")

    def refused(*names):
        assert cli.main(["compare", *names, "--artifacts", str(tmp_path)]) == 2
        return capsys.readouterr().err

    assert "needs two experiments or more" in refused("a")
    assert f"c: no experiment with a finished stage in {tmp_path}; there are: a, b" in refused("a", "c")
    assert "a: is named twice" in refused("a", "a") and "is named twice" in refused("a", str(folder))
    assert "ppo.kl_coef=1: no experiment" in refused("a", "b", "ppo.kl_coef=1")
    (folder / "evaluate" / "results.json").write_text("{}")
    assert "results.json" in refused("a", "b")
    (folder / "ppo" / "manifest.json").write_text("{}")
    assert "manifest.json: damaged" in refused("a", "b")


@pytest.mark.usefixtures("small_pictures")
def test_the_place_of_the_page(tmp_path, capsys):
    publish(tmp_path, "a")
    publish(tmp_path, "b")
    assert cli.main(["compare", "a", "b", "--artifacts", str(tmp_path)]) == 0
    assert (tmp_path / "compare-a-b" / "index.html").is_file()
    assert cli.main(["compare", "a", "b", "--artifacts", str(tmp_path), "-o", str(tmp_path / "here")]) == 0
    assert (tmp_path / "here" / "index.html").is_file()
    with pytest.raises(UserError, match="two experiments"):
        compare.run(["a"], tmp_path, None, None)
