"""Test processes that hold a model, or compute rows, together: tensor and context parallel."""

import json
import signal

import pytest
from resume_worker import CONFIG, copy_without, published, rlhf, rlhf_together
from test_sharded import assert_same_measurements, assert_same_results

TENSOR, CONTEXT, FSDP = "launch.tensor_parallel=2", "launch.context_parallel=2", "launch.strategy=fsdp2"


def command(stage, root, *settings):
    return ("run", stage, "-c", str(CONFIG), "--artifacts", str(root), "--only", *settings)


def slow(*cases):
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


def exhaustive(*cases):
    return [pytest.param(*case, marks=(pytest.mark.slow, pytest.mark.exhaustive)) for case in cases]


@pytest.mark.parametrize("stage, size, settings", [
    ("dpo", 2, (TENSOR,)),
    *slow(("ppo", 2, (TENSOR,)), ("dpo", 2, (CONTEXT,)), ("sft", 2, (CONTEXT,)), ("rm", 4, (TENSOR, FSDP))),
    *slow(("rm", 4, (CONTEXT, FSDP)), ("dpo", 4, (TENSOR, CONTEXT))),
    *exhaustive(("rm", 2, (TENSOR,)), ("sft", 2, (TENSOR,)), ("base", 2, (TENSOR,)), ("ppo", 2, (CONTEXT,))),
    *exhaustive(("sft", 4, (TENSOR, FSDP)), ("sft", 4, (TENSOR,))),
])  # fmt: skip
def test_they_give_the_results_of_one_process(stage, size, settings, oracle, tmp_path):
    root = copy_without(oracle, tmp_path, stage)
    assert rlhf_together(*command(stage, root, *settings), size=size, one_reads=TENSOR in settings) == [0] * size
    folder = root / "micro" / stage
    assert_same_results(folder, oracle / "micro" / stage)
    manifest = json.loads((folder / "manifest.json").read_text())
    axes = [key for key in ("tensor_parallel", "context_parallel") if key in manifest]
    assert axes == [setting.split(".")[1].split("=")[0] for setting in settings if setting != FSDP]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["rankings", "evaluate"])
def test_they_sample_and_score_as_one_process_does(stage, oracle, tmp_path):
    root = copy_without(oracle, tmp_path, stage)
    assert rlhf_together(*command(stage, root, TENSOR)) == [0, 0]
    assert_same_measurements(root / "micro" / stage, oracle / "micro" / stage)


@pytest.mark.slow
@pytest.mark.parametrize("stage, who, size, settings", [
    ("dpo", 1, 2, (TENSOR,)),
    ("sft", 0, 2, (TENSOR,)),
    ("dpo", 0, 2, (CONTEXT,)),
    pytest.param("dpo", 3, 4, (TENSOR, FSDP), marks=pytest.mark.exhaustive),
])  # fmt: skip
def test_killed_and_resumed_they_give_the_same_bytes(stage, who, size, settings, oracle, tmp_path):
    found = []
    for name in ("whole", "killed"):
        root = copy_without(oracle, tmp_path / name, stage)
        run = command(stage, root, *settings)
        if name == "killed":
            codes = rlhf_together(*run, die=(who, stage, 5), seconds=120, size=size)
            assert codes[who] == -signal.SIGKILL and codes[0] != 0
            assert list((root / "micro" / stage / "checkpoints").glob("step-*/manifest.json"))
        assert rlhf_together(*run, size=size) == [0] * size
        found.append(published(root / "micro" / stage))
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_signal_ends_them_with_a_checkpoint_and_another_layout_goes_on(oracle, tmp_path):
    """From tensor parallel to one process to context parallel, with the results of one process."""
    root = copy_without(oracle, tmp_path, "dpo")
    folder = root / "micro" / "dpo"
    assert rlhf_together(*command("dpo", root, TENSOR), term=(0, "dpo", 3), seconds=120)[0] == 75
    assert not (folder / "manifest.json").exists()
    assert rlhf(*command("dpo", root)) == 2  # without the flag
    assert rlhf(*command("dpo", root, "--allow-elastic"), die=("dpo", 5)) == -signal.SIGKILL
    assert rlhf_together(*command("dpo", root, CONTEXT, "--allow-elastic")) == [0, 0]
    assert_same_results(folder, oracle / "micro" / "dpo")
