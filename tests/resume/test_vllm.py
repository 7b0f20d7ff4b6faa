"""Test rollout.engine: vllm with a stand-in: samples, training on them, and its failures."""

import json
import sys
from pathlib import Path

import pytest
from resume_worker import CONFIG, copy_without, published, rlhf, rlhf_together, rows_of

from tests.marks import first_of_a_kind

STAND_IN = Path(__file__).parents[1] / "rollouts" / "stand_in"


def command(root, *settings, stage="ppo"):
    python = root / "python"  # of an environment with "vllm"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{STAND_IN}" exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    vllm = (f"{stage}.rollout.engine=vllm", f"launch.vllm.python={python}")
    return ("run", stage, "-c", str(CONFIG), "--artifacts", str(root), "--only", *vllm, *settings)


def test_it_samples_and_the_policy_learns_from_it(oracle, tmp_path):
    root = copy_without(oracle, tmp_path, "ppo")
    assert rlhf(*command(root)) == 0
    folder = root / "micro" / "ppo"
    rows, other = rows_of(folder, "metrics.jsonl"), rows_of(oracle / "micro" / "ppo", "metrics.jsonl")
    assert len(rows) == len(other) == 8
    assert all(0 <= row["val/engine_kl"] < 1e-6 for row in rows)
    assert all(row["val/ratio"] == pytest.approx(1, abs=0.05) for row in rows)
    # the same prompts and weights, other samples
    assert [row["objective/scores"] for row in rows] != [row["objective/scores"] for row in other]
    assert not list(folder.glob(".tmp-*"))
    assert json.loads((folder / "manifest.json").read_text())["metrics"]["updates"] == 8


@pytest.mark.slow
def test_killed_and_resumed_it_gives_the_same_figures(oracle, tmp_path):
    """The stand-in's samples depend only on prompt, seed and weights, unlike vLLM's."""
    root, other = copy_without(oracle, tmp_path / "a", "ppo"), copy_without(oracle, tmp_path / "b", "ppo")
    assert rlhf(*command(root), die=("ppo", 5)) == -9
    assert rlhf(*command(root)) == 0
    assert rlhf(*command(other)) == 0
    rows = [[{k: v for k, v in row.items() if k != "eps"} for row in rows_of(x / "micro" / "ppo", "metrics.jsonl")]
            for x in (root, other)]  # fmt: skip
    assert rows[0] == rows[1]


def test_without_vllm_it_stops_with_a_checkpoint_and_resumes(oracle, tmp_path):
    """It generates for the preflight, the evaluations at 0 and 3, and each update."""
    root = copy_without(oracle, tmp_path, "ppo")
    assert rlhf(*command(root, "launch.vllm.options={dies_at: 5}", "checkpoints.every=0")) == 3
    assert [p.name for p in (root / "micro" / "ppo" / "checkpoints").iterdir()] == ["step-00000002"]
    assert rlhf(*command(root)) == 0
    assert len(rows_of(root / "micro" / "ppo", "metrics.jsonl")) == 8


@pytest.mark.slow
def test_a_failure_during_the_transfer_of_weights_stops_too(oracle, tmp_path):
    """Weights are loaded again before each rollout but the first."""
    root = copy_without(oracle, tmp_path, "ppo")
    assert rlhf(*command(root, "launch.vllm.options={reload_dies_at: 2}", "checkpoints.every=0")) == 3
    folder = root / "micro" / "ppo"
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-00000002"]
    assert "vllm.log" in [p.name for p in folder.iterdir()]
    settings = ("launch.vllm.options={reload_dies_at: 2}", "ppo.rollout.on_failure=transformers")
    assert rlhf(*command(root, *settings, "--override-config")) == 0
    assert len(rows_of(folder, "metrics.jsonl")) == 8


@pytest.mark.slow
def test_a_start_that_fails(oracle, tmp_path):
    root = copy_without(oracle, tmp_path, "ppo")
    assert rlhf(*command(root, "launch.vllm.options={refuses: no room}")) == 2
    settings = ("launch.vllm.options={refuses: no room}", "ppo.rollout.on_failure=transformers")
    assert rlhf(*command(root, *settings)) == 0


@pytest.mark.slow
def test_the_folder_for_weights_is_emptied(oracle, tmp_path):
    root, weights = copy_without(oracle, tmp_path, "ppo"), tmp_path / "weights"
    assert rlhf(*command(root, f"launch.vllm.folder={weights}"), term=("ppo", 3)) == 75
    assert weights.is_dir() and not list(weights.iterdir())
    assert rlhf(*command(root, f"launch.vllm.folder={weights}")) == 0
    assert not list(weights.iterdir())


@pytest.mark.slow
def test_a_failure_during_an_evaluation_stops_too(oracle, tmp_path):
    root = copy_without(oracle, tmp_path, "ppo")
    assert rlhf(*command(root, "launch.vllm.options={dies_at: 6}", "checkpoints.every=0")) == 3
    assert [p.name for p in (root / "micro" / "ppo" / "checkpoints").iterdir()] == ["step-00000003"]
    assert rlhf(*command(root)) == 0
    looks = [row["step"] for row in rows_of(root / "micro" / "ppo", "evaluations.jsonl")]
    assert looks == [0, 3, 6, 8]


@pytest.mark.slow
def test_on_request_the_run_continues_without_vllm(oracle, tmp_path):
    root = copy_without(oracle, tmp_path, "ppo")
    settings = ("launch.vllm.options={dies_at: 5}", "ppo.rollout.on_failure=transformers")
    assert rlhf(*command(root, *settings)) == 0
    assert len(rows_of(root / "micro" / "ppo", "metrics.jsonl")) == 8


@pytest.mark.slow
def test_samples_of_another_distribution_are_refused(oracle, tmp_path):
    root = copy_without(oracle, tmp_path, "ppo")
    settings = ("launch.vllm.options={drift: 3.0}", "ppo.rollout.max_engine_kl=0.001")
    assert rlhf(*command(root, *settings)) == 3
    assert rlhf(*command(root, "launch.vllm.options={drift: 3.0}", "ppo.rollout.max_engine_kl=100.0")) == 0
    assert all(row["val/engine_kl"] > 0.001 for row in rows_of(root / "micro" / "ppo", "metrics.jsonl"))


def test_its_samples_are_weighed_where_it_draws_from_another_distribution(oracle, tmp_path):
    """The weights are in metrics.jsonl, and what is learnt is not what is learnt without them."""
    drift = ("launch.vllm.options={drift: 0.5}", "ppo.rollout.max_engine_kl=100.0", "ppo.total_episodes=16")
    rows = {}
    for correction in ("none", "token"):
        root = copy_without(oracle, tmp_path / correction, "ppo")
        assert rlhf(*command(root, *drift, f"ppo.rollout.correction={correction}")) == 0
        rows[correction] = rows_of(root / "micro" / "ppo", "metrics.jsonl")
    weight, outliers = "sampling/importance_sampling_ratio", "sampling/importance_sampling_outliers"
    assert not [name for name in rows["none"][0] if name.startswith("sampling/")]
    first, plain = rows["token"][0], rows["none"][0]
    assert 0 < first[f"{weight}/min"] < 1 < first[f"{weight}/max"] <= 3 and 0 <= first[outliers] < 0.5
    assert first["val/engine_kl"] == plain["val/engine_kl"] and first["grad_norm/ppo"] != plain["grad_norm/ppo"]


@pytest.mark.slow
def test_two_processes_weigh_as_one(oracle, tmp_path):
    settings = (
        "launch.vllm.options={drift: 0.5}",
        "ppo.rollout.max_engine_kl=100.0",
        "ppo.rollout.correction=sequence",
    )
    roots = [copy_without(oracle, tmp_path / name, "ppo") for name in ("one", "two")]
    assert rlhf(*command(roots[0], *settings)) == 0
    assert rlhf_together(*command(roots[1], *settings)) == [0, 0]
    one, two = (rows_of(root / "micro" / "ppo", "metrics.jsonl") for root in roots)
    names = [name for name in one[0] if name.startswith(("sampling/", "grad_norm/", "loss/"))]
    for ours, theirs in zip(one[:3], two[:3], strict=True):
        assert {name: ours[name] for name in names} == pytest.approx({name: theirs[name] for name in names}, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", first_of_a_kind(["fsdp2", "ddp"], 1))
@pytest.mark.parametrize("peft", first_of_a_kind(["null", "{method: lora, r: 2}"], 1))
def test_two_processes_learn_from_one(oracle, tmp_path, strategy, peft):
    root = copy_without(oracle, tmp_path, "ppo")
    settings = (f"launch.strategy={strategy}", f"model.peft={peft}")
    assert rlhf("run", "rm", "-c", str(CONFIG), "--artifacts", str(root), f"model.peft={peft}") == 0
    assert rlhf_together(*command(root, *settings)) == [0, 0]
    rows = rows_of(root / "micro" / "ppo", "metrics.jsonl")
    assert len(rows) == 8 and all(0 <= row["val/engine_kl"] < 1e-6 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    "peft, how", [("null", "launch.vllm.hand_over=memory"), ("{method: lora, r: 2}", "launch.vllm.adapter_alone=true")]
)
def test_two_processes_with_shards_hand_over_without_files_of_weights(oracle, tmp_path, peft, how):
    root = copy_without(oracle, tmp_path, "ppo")
    settings = ("launch.strategy=fsdp2", f"model.peft={peft}", how, "launch.vllm.sleep=true")
    assert rlhf("run", "rm", "-c", str(CONFIG), "--artifacts", str(root), f"model.peft={peft}") == 0
    assert rlhf_together(*command(root, *settings)) == [0, 0]
    rows = rows_of(root / "micro" / "ppo", "metrics.jsonl")
    assert len(rows) == 8 and all(0 <= row["val/engine_kl"] < 1e-6 for row in rows)


# -- stages that sample from finished policies ---------------------------------------------------


def greedy_of(root):
    return rows_of(root / "micro" / "evaluate", "greedy.jsonl")


def test_evaluate_samples_each_policy_with_it(oracle, tmp_path):
    """Greedy answers do not depend on the engine, so each is of the policy whose turn it was."""
    root = copy_without(oracle, tmp_path, "evaluate")
    assert rlhf(*command(root, stage="evaluate")) == 0
    folder, other = root / "micro" / "evaluate", oracle / "micro" / "evaluate"
    rows, alone = rows_of(folder, "responses.jsonl"), rows_of(other, "responses.jsonl")
    assert [(row["policy"], row["prompt"]) for row in rows] == [(row["policy"], row["prompt"]) for row in alone]
    assert [row["response"] for row in rows] != [row["response"] for row in alone], "vLLM draws by itself"
    ours = {(row["policy"], row["prompt"]): row for row in greedy_of(root)}
    theirs = {(row["policy"], row["prompt"]): row for row in greedy_of(oracle)}
    both = ours.keys() & theirs.keys()  # the prompts are chosen by the samples
    assert {policy for policy, _ in both} == {"base", "sft", "ppo", "dpo"}
    assert all(ours[key]["response"] == theirs[key]["response"] for key in both)
    assert not list(folder.glob(".tmp-*")) and not (folder / "vllm.log").exists()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", first_of_a_kind(["fsdp2", "ddp"], 1))
@pytest.mark.parametrize("stage", first_of_a_kind(["rankings", "evaluate"], 1))
def test_two_processes_sample_with_one(stage, strategy, oracle, tmp_path):
    """With shards or whole models: the same responses as one process."""
    roots = [copy_without(oracle, tmp_path / name, stage) for name in ("alone", "both")]
    assert rlhf(*command(roots[0], stage=stage)) == 0
    assert rlhf_together(*command(roots[1], f"launch.strategy={strategy}", stage=stage)) == [0, 0]
    name = "train.jsonl" if stage == "rankings" else "responses.jsonl"
    rows, others = (rows_of(root / "micro" / stage, name) for root in roots)
    texts = "responses" if stage == "rankings" else "response"
    assert [row[texts] for row in rows] == [row[texts] for row in others]


@pytest.mark.slow
@pytest.mark.parametrize("stage", first_of_a_kind(["rankings", "evaluate"], 1))
def test_without_vllm_sampling_stops_and_resumes(stage, oracle, tmp_path):
    root, whole = copy_without(oracle, tmp_path, stage), copy_without(oracle, tmp_path / "whole", stage)
    dies = ("launch.vllm.options={dies_at: 5}", "checkpoints.every=0")
    assert rlhf(*command(root, *dies, stage=stage), output=tmp_path / "said") == 3
    assert f"{stage}: vLLM ended" in (tmp_path / "said").read_text()
    assert list((root / "micro" / stage / "checkpoints").glob("step-*"))
    assert rlhf(*command(root, stage=stage)) == 0
    assert rlhf(*command(whole, stage=stage)) == 0
    assert published(root / "micro" / stage) == published(whole / "micro" / stage)


@pytest.mark.slow
def test_on_request_the_policies_sample_without_it(oracle, tmp_path):
    root = copy_without(oracle, tmp_path, "evaluate")
    settings = ("launch.vllm.options={refuses: no room}", "evaluate.rollout.on_failure=transformers")
    assert rlhf(*command(root, *settings, stage="evaluate")) == 0
    rows = [rows_of(x / "micro" / "evaluate", "responses.jsonl") for x in (root, oracle)]
    assert rows[0] == rows[1]


def test_samples_of_no_policy_are_refused(oracle, tmp_path):
    root = copy_without(oracle, tmp_path, "rankings")
    settings = ("launch.vllm.options={drift: 3.0}", "rankings.rollout.max_engine_kl=0.001")
    assert rlhf(*command(root, *settings, stage="rankings"), output=tmp_path / "said") == 3
    assert "does not sample from sft's distribution" in (tmp_path / "said").read_text()
