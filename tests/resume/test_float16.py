"""Test that float16's scaler, killed after skipped steps, resumes to the same bytes."""

import json

import pytest
import torch
from resume_worker import CONFIG, _main, copy_without, end, published, rows_of
from safetensors.torch import load_file

from tests.forked import process

FLOAT16 = "model.dtype=float16"
STAGES = ("base", "sft", "rm", "ppo", "dpo")
pytestmark = pytest.mark.slow


def run_scaled(argv, environment, die):
    """Run `rlhf` with a scale that overflows at first, and, soon doubled, does so again."""
    from stages.models import precision

    precision.FIRST_SCALE, precision.GROWTH_STEPS = 2.0**20, 2
    _main(argv, environment, die, None, None, None, True, None, None)


def rlhf(*argv, die=None):
    """Run `rlhf` with that scaler in a new process; return its exit code."""
    child = process(run_scaled, list(argv), {}, die)
    child.start()
    return end([child])[0]


def rlhf_together(*argv, die=None):
    """Run `rlhf` with that scaler in two processes; return their exit codes."""
    from pipeline.launch.launcher import process_environments

    children = [process(run_scaled, list(argv), place, die) for place in process_environments(2)]
    for child in children:
        child.start()
    return end(children)


def command(stage, root, *settings):
    return ("run", stage, "-c", str(CONFIG), "--artifacts", str(root), "--only", FLOAT16, *settings)


@pytest.fixture(scope="module")
def oracle16(tmp_path_factory):
    """Return the artifacts of the chain in float16, run without interruption."""
    root = tmp_path_factory.mktemp("oracle16")
    for stage in ("world", "base", "sft", "rankings", "rm", "ppo", "dpo"):
        assert rlhf(*command(stage, root)) == 0
    return root


def skipped_at(folder):
    """Return the steps that the scaler has skipped, by the journal."""
    rows = rows_of(folder)
    counts = [row["steps_skipped_by_scaler"] for row in rows]
    return [row["step"] for row, before, now in zip(rows, [0, *counts], counts, strict=False) if now > before]


@pytest.mark.parametrize("stage", STAGES)
def test_killed_after_a_skipped_step_it_ends_in_the_same_bytes(stage, oracle16, tmp_path):
    """The checkpoint is that of step 4; steps are skipped before it and after it."""
    steps = skipped_at(oracle16 / "micro" / stage)
    assert min(steps) <= 4 < max(steps)
    root = copy_without(oracle16, tmp_path, stage)
    assert rlhf(*command(stage, root), die=(stage, 5)) == -9
    (newest,) = sorted((root / "micro" / stage / "checkpoints").glob("step-*/manifest.json"))[-1:]
    assert newest.parent.name == "step-00000004"
    saved = json.loads((newest.parent / "state.json").read_text())["grad_scaler"]
    row = rows_of(oracle16 / "micro" / stage)[3]
    assert saved["scale"] == row["grad_scale"] and saved["skipped"] == row["steps_skipped_by_scaler"]
    assert rlhf(*command(stage, root)) == 0
    assert published(root / "micro" / stage) == published(oracle16 / "micro" / stage)


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_skip_the_same_steps(stage, strategy, oracle16, tmp_path):
    """An overflow on one rank is known to all: with shards, each has unscaled its own part."""
    root = copy_without(oracle16, tmp_path, stage)
    few = ["ppo.total_episodes=24"] if stage == "ppo" else []
    assert rlhf_together(*command(stage, root, f"launch.strategy={strategy}", *few)) == [0, 0]
    found, alone = (rows_of(x / "micro" / stage)[:3] for x in (root, oracle16))
    for row, expected in zip(found, alone, strict=True):
        assert row.keys() == expected.keys()
        for key in row:
            if key.startswith("loss"):
                assert row[key] == pytest.approx(expected[key], abs=5e-3)
            if key.startswith(("grad_scale", "steps_skipped")) or "NaN" in (row[key], expected[key]):
                assert row[key] == expected[key], (row["step"], key)
    assert found[-1]["steps_skipped_by_scaler"] > 0
    weights = load_file(root / "micro" / stage / "model" / "model.safetensors")
    assert all(x.isfinite().all() and x.dtype == torch.float32 for x in weights.values())
