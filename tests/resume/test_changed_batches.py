"""Test that a run that resumes with another batch size knows what it has drawn, or is refused."""

import json
from types import SimpleNamespace

import pytest
from resume_worker import CONFIG, assert_same_figures, copy_without, rlhf, rows_of

from data.streams import derive_seed
from pipeline import api
from pipeline.changes import compare
from pipeline.errors import UserError
from pipeline.fingerprints import Today
from stages.ppo import state
from stages.settings import ppo as ppo_settings

SEED = 1  # of micro.yaml


def command(root, stage, *more):
    return ("run", stage, "-c", str(CONFIG), "--artifacts", str(root), "--only", *more)


def refused(root, tmp_path, stage, *settings):
    """Return the error line of a run that resumes with other settings."""
    output = tmp_path / "output"
    assert rlhf(*command(root, stage, *settings, "--override-config"), output=output) == 2
    (line,) = [line for line in output.read_text().splitlines() if line.startswith("error: ")]
    return line


def taken(file, stream):
    """Return the size of a PPO stream and all indices that were drawn from it, in order."""
    rows = [json.loads(line) for line in file.open()]
    rows = [row for row in rows if row[1] == derive_seed(SEED, stream)]
    return rows[0][0], [index for row in rows for index in row[2]]


@pytest.mark.parametrize(
    "changed, episodes",
    [
        (["batch_size=4"], range(36, 65, 4)),
        (["batch_size=16", "mini_batch_size=8", "samples_per_prompt=4"], (48, 64)),
        (["num_ppo_epochs=1", "ptx_ratio=2", "mini_batch_size=8", "total_episodes=48"], (40, 48)),
    ],
    ids=["smaller", "larger", "other minibatches"],
)
def test_ppo_resumes_with_another_batch_size(changed, episodes, oracle, tmp_path):
    """It stops after 4 updates of 8 episodes; 54 prompts are drawn in a permutation per epoch."""
    root, takes = copy_without(oracle, tmp_path, "ppo"), tmp_path / "takes"
    assert rlhf(*command(root, "ppo"), term=("ppo", 4), takes=takes) == 75
    changed = [f"ppo.{setting}" for setting in changed]
    assert rlhf(*command(root, "ppo", *changed, "--override-config"), takes=takes) == 0
    rows = rows_of(root / "micro" / "ppo")
    assert [row["episode"] for row in rows] == [8, 16, 24, 32, *episodes]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    for stream, at_least in (("prompts", 16 + 1), ("ptx", 64 + 1)):
        size, indices = taken(takes, stream)
        assert len(indices) >= at_least
        for first in range(0, len(indices), size):
            epoch = indices[first : first + size]
            assert len(set(epoch)) == len(epoch), f"{stream}: drawn twice within an epoch"


def test_ppo_refuses_batches_that_cannot_end_at_total_episodes(oracle, tmp_path):
    """24 of 64 episodes are done, and the rest is no multiple of 16. The run stays as it was."""
    root = copy_without(oracle, tmp_path, "ppo")
    assert rlhf(*command(root, "ppo"), term=("ppo", 3)) == 75
    assert refused(root, tmp_path, "ppo", "ppo.batch_size=16") == (
        "error: ppo.batch_size: 24 of 64 episodes are done, and batches of 16 do not end there; choose a divisor of 8, "
        "or --restart"
    )
    assert refused(root, tmp_path, "ppo", "ppo.batch_size=16", "ppo.total_episodes=16") == (
        "error: ppo.total_episodes: 24 episodes are done and the settings now ask for 16; ask for more, or --restart"
    )
    assert rlhf(*command(root, "ppo")) == 0


def test_ppo_refuses_limits_that_change_the_prompts(oracle, tmp_path):
    root = copy_without(oracle, tmp_path, "ppo")
    assert rlhf(*command(root, "ppo"), term=("ppo", 2)) == 75
    output = refused(root, tmp_path, "ppo", "ppo.max_length=20", "ppo.on_too_long=drop")
    assert output.endswith("; set ppo.max_length, ppo.response_length and ppo.on_too_long back, or --restart")


def test_an_old_checkpoint_without_counts_needs_the_same_settings():
    """An older version made it: batches of 8, 2 samples per prompt, 4 steps of 4 ptx rows each."""
    settings = {"batch_size": 8, "mini_batch_size": 4, "num_ppo_epochs": 2, "samples_per_prompt": 2, "ptx_ratio": 1.0}
    store = SimpleNamespace(fingerprint="then", newest=lambda: SimpleNamespace(step=3, state={}, fingerprint="then"))
    c, session = ppo_settings.PPOSettings(**settings), SimpleNamespace(checkpoints=store)
    assert state.drawn_before(session, c) == state.Drawn(episodes=24, prompts=12, ptx_rows=48, optimizer_steps=12)
    store.fingerprint = "now"
    with pytest.raises(UserError, match=r"did not count what it drew; .*, or --restart"):
        state.drawn_before(session, c)


def test_rankings_resumes_with_another_batch_size(oracle, tmp_path):
    """Each of its labelers ranks a prompt once, whatever batch it is in."""
    root = copy_without(oracle, tmp_path, "rankings")
    assert rlhf(*command(root, "rankings"), die=("rankings", 2)) == -9
    assert rlhf(*command(root, "rankings", "rankings.batch_size=5", "--override-config")) == 0
    for name in ("train.jsonl", "validation.jsonl"):
        ours, usual = (
            {(row["id"], row["prompt"]) for row in rows_of(x / "micro" / "rankings", name)} for x in (root, oracle)
        )
        assert ours == usual


def test_smaller_micro_batches_of_the_same_batch_are_accepted(oracle, tmp_path):
    """For less memory, 4 × 2 rows become 2 × 4, and the steps see the same rows."""
    root = copy_without(oracle, tmp_path, "sft")
    assert rlhf(*command(root, "sft"), term=("sft", 3)) == 75
    output = refused(root, tmp_path, "sft", "sft.gradient_accumulation_steps=4")
    assert output == (
        "error: sft: interrupted at step 4, since then sft.gradient_accumulation_steps 2 → 4, which cannot change "
        "while a run is interrupted; set it back to resume, --restart starts again"
    )
    smaller = ("sft.per_device_train_batch_size=2", "sft.gradient_accumulation_steps=4", "--override-config")
    assert rlhf(*command(root, "sft", *smaller)) == 0
    assert_same_figures(rows_of(root / "micro" / "sft"), rows_of(oracle / "micro" / "sft"))


def test_sft_keeps_the_steps_of_the_model_in_training(oracle, tmp_path):
    """It stops while ppo_init trains, whose checkpoints count on from the 8 steps of model/."""
    root = copy_without(oracle, tmp_path, "sft")
    assert rlhf(*command(root, "sft"), term=("sft", 10)) == 75
    for steps in (6, 12):
        output = refused(root, tmp_path, "sft", f"sft.max_steps={steps}")
        assert (
            f"model/ is trained, in 8 steps, and sft.max_steps or sft.num_train_epochs now ask for {steps}; " in output
        )
    assert rlhf(*command(root, "sft")) == 0


STAGES = api.stages()


def changes(name, before, after):
    """Return what `compare` says of two sections of a stage."""
    fixed = STAGES[name].fixed
    record = {"fingerprint": "then", "config": {name: before, "seed": 0}, "inputs": {}}
    return compare(name, record, Today("now", {name: after, "seed": 0}, {}, fixed=fixed))


@pytest.mark.parametrize("stage", ["base", "sft", "rm", "dpo"])
def test_settings_that_order_the_rows_are_fixed(stage):
    section = STAGES[stage].settings().model_dump(mode="json")
    rows, accumulated = section["per_device_train_batch_size"], section["gradient_accumulation_steps"]
    for changed in ({"per_device_train_batch_size": 2 * rows}, {"gradient_accumulation_steps": 3 * accumulated},
                    {"max_length": 80}):  # fmt: skip
        assert [change.is_fixed for change in changes(stage, section, section | changed)] == [True]
    section |= {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 4}
    traded = section | {"gradient_accumulation_steps": 8, "per_device_train_batch_size": 2}
    assert [change.is_fixed for change in changes(stage, section, traded)] == [False, False]
    longer = section | {"max_steps": 77, "learning_rate": 1e-9}
    assert [change.is_fixed for change in changes(stage, section, longer)] == [False, False]


def test_fixed_settings_are_settings():
    from pipeline.config.sections import COMMON

    sections = {name: stage.settings for name, stage in STAGES.items()} | COMMON
    for stage in STAGES.values():
        for entry in stage.fixed:
            for key in (entry,) if isinstance(entry, str) else entry:
                name, *path = key.split(".")
                fields = sections[name].model_fields
                for part in path[:-1]:
                    inner = next(a for a in fields[part].annotation.__args__ if hasattr(a, "model_fields"))
                    fields = inner.model_fields
                assert path[-1] in fields, key
