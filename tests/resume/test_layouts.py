"""Test launch.shard and launch.offload on whole stages: results, kills, resumes, other layouts."""

import signal

import pytest
from resume_worker import copy_without, published, rlhf, rlhf_together
from test_sharded import assert_same_results, command, slow

OPTIMIZER = ("launch.strategy=fsdp2", "launch.shard=optimizer")
GRADIENTS = ("launch.strategy=fsdp2", "launch.shard=gradients")
ALL = (*GRADIENTS, "launch.offload=all", "launch.offload_activations=true")
OFFLOADED = (*OPTIMIZER, "launch.offload=optimizer")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["base", "sft", "rm", "ppo", "dpo"])
@pytest.mark.parametrize("settings", [OFFLOADED, ALL], ids=["optimizer", "all"])
def test_results_are_those_of_one_whole_process(stage, settings, oracle, tmp_path):
    root = copy_without(oracle, tmp_path, stage)
    assert rlhf_together(*command(stage, root, *settings)) == [0, 0]
    assert_same_results(root / "micro" / stage, oracle / "micro" / stage)


@pytest.mark.parametrize("stage", ["sft", *slow("rm", "ppo", "dpo")])
def test_an_offloaded_optimizer_resumes_to_the_bytes_of_none(stage, oracle, tmp_path):
    """On a CPU the same kernels step; the checkpoints are the same too."""
    root = copy_without(oracle, tmp_path, stage)
    run = command(stage, root, "launch.offload=optimizer")
    assert rlhf(*run, die=(stage, 5)) == -signal.SIGKILL
    assert rlhf(*run) == 0
    assert published(root / "micro" / stage) == published(oracle / "micro" / stage)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "rm", "ppo", "dpo"])
def test_one_process_that_offloads_all_resumes(stage, oracle, tmp_path):
    root = copy_without(oracle, tmp_path, stage)
    run = command(stage, root, "launch.offload=all")
    assert rlhf(*run, die=(stage, 5)) == -signal.SIGKILL
    assert rlhf(*run) == 0
    assert_same_results(root / "micro" / stage, oracle / "micro" / stage)


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage, who, settings", [("sft", 0, OFFLOADED), ("ppo", 1, OPTIMIZER), ("dpo", 0, GRADIENTS), ("rm", 1, ALL)]
)
def test_killed_and_resumed_two_give_the_same_bytes(stage, who, settings, oracle, tmp_path):
    undisturbed = copy_without(oracle, tmp_path / "undisturbed", stage)
    assert rlhf_together(*command(stage, undisturbed, *settings)) == [0, 0]
    root = copy_without(oracle, tmp_path / "killed", stage)
    codes = rlhf_together(*command(stage, root, *settings), die=(who, stage, 5), seconds=60)
    assert codes == ([1, -signal.SIGKILL] if who else [-signal.SIGKILL, 4])
    assert list((root / "micro" / stage / "checkpoints").glob("step-*/manifest.json"))
    assert rlhf_together(*command(stage, root, *settings)) == [0, 0]
    assert published(root / "micro" / stage) == published(undisturbed / "micro" / stage)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_checkpoints_go_on_with_any_layout(stage, oracle, tmp_path):
    """Two processes that shard moments, one that offloads, two that shard and offload all."""
    root = copy_without(oracle, tmp_path, stage)
    folder, alone = root / "micro" / stage, oracle / "micro" / stage
    assert rlhf_together(*command(stage, root, *OPTIMIZER), die=(0, stage, 3))[0] == -signal.SIGKILL
    one = command(stage, root, "launch.offload=optimizer", "--allow-elastic")
    assert rlhf(*one, die=(stage, 5)) == -signal.SIGKILL
    assert rlhf_together(*command(stage, root, *ALL, "--allow-elastic")) == [0, 0]
    assert_same_results(folder, alone)
