"""Test that a signal ends a stage with a checkpoint, and that resuming gives the same bytes."""

import json

import pytest
from resume_worker import CONFIG, copy_without, published, rlhf


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_a_signal_ends_in_75_with_a_checkpoint_and_no_artifact(stage, oracle, tmp_path):
    root = copy_without(oracle, tmp_path, stage)
    run = ("run", stage, "-c", str(CONFIG), "--artifacts", str(root), "--only")
    assert rlhf(*run, term=(stage, 3)) == 75
    folder = root / "micro" / stage
    assert not (folder / "manifest.json").exists()
    assert list((folder / "checkpoints").glob("step-0000000[34]/manifest.json"))
    assert rlhf(*run) == 0
    assert published(folder) == published(oracle / "micro" / stage)


@pytest.mark.parametrize(
    "stage, step, evaluated", [slow("base", 5, 6), ("sft", 5, 6), slow("rm", 6, 6), ("rm", 16, 16), slow("dpo", 8, 8),
                          slow("ppo", 6, 6), ("ppo", 8, 8)]
)  # fmt: skip
def test_a_signal_does_not_wait_for_a_held_out_evaluation(stage, step, evaluated, oracle, tmp_path):
    """The step is saved and its evaluation is owed, also at the last step of rm, dpo and ppo."""
    root = copy_without(oracle, tmp_path, stage)
    run = ("run", stage, "-c", str(CONFIG), "--artifacts", str(root), "--only")
    assert rlhf(*run, term=(stage, step)) == 75
    folder = root / "micro" / stage
    assert (folder / "checkpoints" / f"step-{evaluated:08d}" / "manifest.json").is_file()
    steps = [json.loads(line)["step"] for line in (folder / "evaluations.jsonl").open()]
    assert steps and evaluated not in steps
    assert rlhf(*run) == 0
    assert published(folder) == published(oracle / "micro" / stage)


@pytest.mark.parametrize(
    "stage, step, later", [slow("base", 5, 7), ("sft", 5, 7), slow("rm", 6, 7), slow("dpo", 6, 7), ("ppo", 6, 7)]
)
def test_an_owed_evaluation_is_written_once(stage, step, later, oracle, tmp_path):
    """A signal cuts the evaluation at step 6 short; the next run repeats it and is killed."""
    root = copy_without(oracle, tmp_path, stage)
    run = ("run", stage, "-c", str(CONFIG), "--artifacts", str(root), "--only")
    assert rlhf(*run, term=(stage, step)) == 75
    assert rlhf(*run, die=(stage, later)) == -9
    steps = [json.loads(line)["step"] for line in (root / "micro" / stage / "evaluations.jsonl").open()]
    assert steps[-1] == 6
    assert rlhf(*run) == 0
    assert published(root / "micro" / stage) == published(oracle / "micro" / stage)


@pytest.mark.parametrize("stage, step", [("sft", 2), slow("rm", 3), slow("ppo", 3)])
def test_patience_may_end_with_the_owed_evaluation(stage, step, oracle, tmp_path):
    rate = 5 if stage == "sft" else 0.5
    options = [f"{stage}.patience=1", f"{stage}.learning_rate={rate}", f"{stage}.keep=last"]
    options += {"sft": ["sft.ppo_init=null"], "rm": ["rm.ensemble=1"], "ppo": ["ppo.kl_coef=10"]}[stage]
    found = []
    for name in ("whole", "left"):
        root = copy_without(oracle, tmp_path / name, stage)
        run = ("run", stage, "-c", str(CONFIG), "--artifacts", str(root), "--only", *options)
        if name == "left":
            assert rlhf(*run, term=(stage, step)) == 75
        assert rlhf(*run) == 0
        found.append(published(root / "micro" / stage))
        steps = [json.loads(line)["step"] for line in (root / "micro" / stage / "metrics.jsonl").open()]
        # rm goes on with the steps of the judge, which are counted from 9 on
        assert 3 in steps and 4 not in steps, "patience ends the run at its first evaluation"
    assert found[0] == found[1]


@pytest.mark.parametrize("stage, token", [("ppo", 60), ("ppo", 85), ("rankings", 20), ("evaluate", 40)])
def test_a_signal_during_a_rollout_acts_before_the_next_token(stage, token, oracle, tmp_path):
    """PPO saves the state after the previous update, the last one in its journal."""
    root = copy_without(oracle, tmp_path, stage)
    run = ("run", stage, "-c", str(CONFIG), "--artifacts", str(root), "--only")
    assert rlhf(*run, term_at_token=token) == 75
    folder = root / "micro" / stage
    assert not (folder / "manifest.json").exists()
    if stage == "ppo":
        rows = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()]
        saved = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
        assert rows and saved[-1] == f"step-{rows[-1]:08d}"
    assert rlhf(*run) == 0
    assert published(folder) == published(oracle / "micro" / stage)


def test_an_alarm_before_a_signal_stops_the_resumed_run(oracle, tmp_path):
    """It was raised in the update whose held-out evaluation a signal cut short.

    The next start stops; the one after that resumes, until another alarm (an untrained policy's
    responses run to the limit).
    """
    root = copy_without(oracle, tmp_path, "ppo")
    run = ("run", "ppo", "-c", str(CONFIG), "--artifacts", str(root), "--only")
    run += ("ppo.eval_steps=1", "ppo.alarm_kl=1e-9", "ppo.on_alarm=stop")
    assert rlhf(*run, term=("ppo", 2)) == 75
    assert [rlhf(*run), rlhf(*run), rlhf(*run)] == [3, 3, 0]
