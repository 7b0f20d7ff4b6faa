"""Test the stage reward_bench on a micro chain, against scores of transformers alone."""

import json

import pytest
import torch
from micro_chain import make_tokenizer
from second_route import prompt_ids, response_ids, scalar_model, score

from pipeline.errors import UserError

BEST = [
    {"id": str(i), "prompt": f"what color is the {'old ' * i}fox ?", "chosen": ["the fox is red ."],
     "rejected": ["no", "the fox is blue ?", "hello hello"], "subset": subset, "num_correct": 1}
    for i, subset in enumerate(["Factuality", "Factuality", "Focus"])
]  # fmt: skip
TIES = [
    {"id": f"{kind}:{i}", "prompt": f"what is {'kind ' * i}?", "chosen": good, "rejected": ["no", "old fox"],
     "subset": "Ties", "num_correct": len(good)}
    for i in range(3)
    for kind, good in (("ref", ["yes"]), ("tied", ["yes", "red"]))
]  # fmt: skip
PAIRS = [
    {"id": i, "prompt": f"what {'is ' * (i + 1)}red ?", "chosen": "the fox", "rejected": "no", "subset": subset}
    for i, subset in enumerate(["hep-js", "hep-js", "math-prm", "mine"])
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return the folder of the benchmark's files."""
    folder = tmp_path_factory.mktemp("bench")
    for name, rows in {"best": BEST, "ties": TIES, "pairs": PAIRS}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def finished(chain, files, tmp_path_factory):
    """Return a run over all files, of the chain's ensemble and of a model from outside."""
    data = f"reward_bench.data=[{files}/best.jsonl, {files}/ties.jsonl, {files}/pairs.jsonl]"
    models = f"reward_bench.models=[rm, {chain.root}/other_rm/model]"
    return chain.run("reward_bench", tmp_path_factory.mktemp("run") / "a", data, models, "reward_bench.batch_size=3")


def results_of(run):
    return json.loads((run.folder / "results.json").read_text())


@torch.no_grad()
def test_scores_are_those_of_transformers(chain, finished):
    tokenizer = make_tokenizer()
    other = f"{chain.root}/other_rm/model"
    of_model = {
        "rm": [scalar_model(chain.root / "rm" / name) for name in ("model", "ensemble/1")],
        other: [scalar_model(chain.root / "other_rm" / "model")],
    }
    rows = finished.rows("bench_scores.jsonl")
    assert len(rows) == 2 * (3 + 6 + 4)
    items = {("best", item["id"]): item for item in BEST} | {("pairs", str(item["id"])): item for item in PAIRS}
    for row in rows:
        kind = "pairs" if row["subset"] in ("hep-js", "math-prm", "mine") else "best"
        if row["subset"] == "Ties":
            continue
        item = items[kind, row["id"]]
        texts = item["chosen"] + item["rejected"] if kind == "best" else [item["chosen"], item["rejected"]]
        prompt = prompt_ids(tokenizer, item["prompt"])
        for text, found in zip(texts, row["scores"], strict=True):
            ids = response_ids(tokenizer, text)
            expected = sum(float(score(model, prompt, ids)) for model in of_model[row["model"]])
            assert found == pytest.approx(expected / len(of_model[row["model"]]), abs=1e-4)


def test_figures_follow_from_the_scores(finished):
    results, rows = results_of(finished), finished.rows("bench_scores.jsonl")
    for model, figures in results["models"].items():
        values = [row["value"] for row in rows if row["model"] == model and row["subset"] == "hep-js"]
        assert figures["pairs"]["subsets"]["hep-js"]["value"] == pytest.approx(sum(values) / 2)
        assert set(figures["pairs"]["sections"]) == {"Reasoning", "mine"}
        assert set(figures["best_of"]["subsets"]) == {"Factuality", "Focus", "Ties"}
        mean = sum(part["value"] for part in figures["best_of"]["subsets"].values()) / 3
        assert figures["best_of"]["overall"]["value"] == pytest.approx(mean)
        assert figures["dropped"] == 0
    assert finished.figures["items"] == 13 and finished.figures["models"] == 2


def test_items_that_are_too_long(chain, files, tmp_path):
    words = (f"reward_bench.data={files}/best.jsonl", "reward_bench.max_length=14")
    with pytest.raises(UserError, match=r"item of \d+ tokens, the limit is 14"):
        chain.run("reward_bench", tmp_path / "a", *words)
    run = chain.run("reward_bench", tmp_path / "b", *words, "reward_bench.on_too_long=drop")
    figures = results_of(run)["models"]["rm"]
    kept = figures["best_of"]["overall"]["n"]
    assert figures["dropped"] == 3 - kept > 0 and len(run.rows("bench_scores.jsonl")) == kept
    assert "dropped" in run.said
    with pytest.raises(UserError, match="200 is over the context"):
        chain.run("reward_bench", tmp_path / "c", words[0], "reward_bench.max_length=200")


@pytest.mark.parametrize(
    "words, said",
    [
        (["reward_bench.data=/nowhere.jsonl"], r"reward_bench\.data: no such file"),
        (["reward_bench.models=[none]"], r"reward_bench\.models: none is neither"),
        (["reward_bench.models=[]"], r"reward_bench\.models: is an empty list"),
    ],
)
def test_settings_that_cannot_work(chain, words, said):
    with pytest.raises(UserError, match=said):
        chain.experiment(*words)


def test_what_it_needs_and_refuses_before_it_runs(chain, files, tmp_path):
    stage = chain.stages["reward_bench"]
    other = f"reward_bench.models=[{chain.root}/other_rm/model]"
    assert stage.needs(chain.experiment()) == ["rm"] and stage.needs(chain.experiment(other)) == []
    assert "reward_bench.data: names no data" in stage.missing_requirements(chain.experiment())[0]
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text(json.dumps(BEST[0] | {"chosen": 3}) + "\n")
    (line,) = stage.missing_requirements(chain.experiment(f"reward_bench.data={wrong}"))
    assert line.startswith(f"{wrong}:1: 'chosen' is 3")
    folders = stage.folders(chain.experiment(other, f"reward_bench.data={files}/best.jsonl"))
    assert set(folders) == {"reward_bench.data", f"reward_bench.models ({chain.root}/other_rm/model)"}
    with pytest.raises(UserError, match="trained no judge"):
        words = (f"reward_bench.data={files}/best.jsonl", "reward_bench.models=[judge]")
        chain.run("reward_bench", tmp_path / "a", *words)
