"""Test that conditional training resumes by bytes, in each round and between rounds."""

import json
import shutil

import pytest
from resume_worker import CONFIG, published, rlhf

SETTINGS = (
    "sft.ppo_init=null",
    "sft.max_steps=3",
    "sft.keep=best",
    "sft.conditional.scorer=[{rule: characters, at_most: 4, tolerance: 40}]",
    "sft.conditional.samples_per_prompt=2",
    "sft.conditional.prompts_per_round=12",
    "sft.conditional.rounds=3",
    "sft.conditional.response_length=8",
)


SLOW = pytest.param("{method: lora, r: 2, lora_dropout: 0.1}", (2, 4, 7), marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Return the folder of a policy to start from."""
    root = tmp_path_factory.mktemp("start")
    assert rlhf("run", "sft", "-c", str(CONFIG), "--artifacts", str(root), "sft.ppo_init=null") == 0
    return root / "micro" / "sft" / "model"


@pytest.mark.parametrize(("peft", "steps"), [("null", (3, 8)), SLOW])
def test_a_killed_run_ends_in_the_same_bytes(peft, steps, start, tmp_path):
    """Each round has 3 steps: 3 is the end of the first, and before the samples of the second."""
    options = (f"model.name_or_path={start}", "model.control_tokens=[<|bad|>, <|good|>]")
    whole = tmp_path / "whole"
    run = ("-c", str(CONFIG), *options, *SETTINGS, f"model.peft={peft}", "checkpoints.every=1", "--artifacts")
    assert rlhf("run", "sft", *run, str(whole)) == 0
    for step in steps:
        root = tmp_path / str(step)
        shutil.copytree(whole, root, ignore=shutil.ignore_patterns("sft"))
        again = ("run", "sft", *run, str(root), "--only")
        assert rlhf(*again, die=("sft", step)) == -9
        assert rlhf(*again) == 0
        record = json.loads((root / "micro" / "sft" / "manifest.json").read_text())
        assert record["resumes"] == 1 and record["metrics"]["samples"] == 72
        assert published(root / "micro" / "sft") == published(whole / "micro" / "sft")
