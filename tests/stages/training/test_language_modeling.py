"""Check the plain loss against trl's, and that a resume uses the current settings."""

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from pipeline.errors import Interrupted, TrainingStopped
from pipeline.stage import StopFlag
from pipeline.store import files, integrity
from pipeline.store.checkpoints import CheckpointStore
from stages.shared.runtime import Runtime
from stages.training.loop import Phase
from stages.training.schedule import Schedule, learning_rate_at
from stages.training.selection import Selection
from stages.training.session import Session
from stages.training.text import Optimization, TextTask, train_language_model
from tests.builders import tiny_causal, tiny_tokenizer

STEPS, FIRST = 8, 3  # FIRST: steps of an earlier training of the stage
TODAY = {"learning_rate": 0.01, "lr_scheduler_type": "cosine_with_min_lr", "warmup_steps": 2, "weight_decay": 0.1,
         "adam_beta2": 0.95}  # fmt: skip


@pytest.mark.parametrize("items", [None, 7])
def test_the_plain_loss_is_trls(tmp_path, items):
    """Loss and gradients are equal, with masked labels and padding."""
    from plain_loss import assert_is_trls

    tokenizer = tiny_tokenizer()
    assert_is_trls(lambda: tiny_causal("llama", 0, tokenizer), tokenizer, items, tmp_path)


class Tracker:
    """A tracker in memory that requests a stop at one row; it is heard after the next step."""

    def __init__(self, stop, stop_at):
        self.rows, self.stop, self.stop_at = [], stop, stop_at

    def log(self, step, row, seconds, tokens):
        assert seconds > 0 and tokens > 0
        self.rows.append({"step": step, **row})
        self.stop.requested = step == self.stop_at

    def evaluation(self, step, row):
        pass

    def say(self, line):
        pass

    @contextlib.contextmanager
    def progress(self, total, description, start=0):
        yield SimpleNamespace(update=lambda step, **figures: None)


@pytest.fixture
def train(tmp_path):
    """Return train(stop_at=…, settings…), → journal rows and AdamW's options; it resumes.

    `harm` changes the model before training.
    """
    tokenizer = tiny_tokenizer()

    def make():
        return tiny_causal("llama", 0, tokenizer, num_hidden_layers=1, initializer_range=0.02)

    def run(stop_at=None, harm=lambda model: None, **settings):
        stop, told = StopFlag(), []
        store = CheckpointStore(tmp_path / "checkpoints", 100, 2, "run", say=lambda line: None)
        tracker = Tracker(stop, stop_at)
        session = Session("sft", 1, store, tracker, stop, collective=False)
        rows = [{"input_ids": ids, "labels": ids} for ids in ([5, 6, 7], [8, 9, 10, 11], [12, 13], [5, 13, 7])]

        def made():
            model = make()
            harm(model)
            return model

        def hear(optimizer, args, kwargs):
            keys = ("lr", "weight_decay", "betas")
            told.append([{key: group[key] for key in keys} for group in optimizer.param_groups])

        hook = register_optimizer_step_pre_hook(hear)
        s = TODAY | settings
        runtime = Runtime(
            "cpu", "float32", "sdpa", sharded=False, gradient_checkpointing=False, trust_remote_code=False
        )
        task = TextTask(rows, rows[:1], rows_per_device=1, accumulation_steps=2, group_by_length=False)
        optimization = Optimization(1.0, s["weight_decay"], s["adam_beta2"])
        schedule = Schedule(s["learning_rate"], s["lr_scheduler_type"], s["warmup_steps"], STEPS)
        selection = Selection("last", None, "loss", higher_is_better=False, eval_steps=100)
        phase = Phase(first=FIRST, total=FIRST + STEPS)
        try:
            train_language_model(session, runtime, made, tokenizer, task, optimization, schedule, selection, phase)
        except Interrupted:
            assert stop_at is not None
        finally:
            hook.remove()
        return tracker.rows, told

    return run


def assert_told(found, settings, first=1):
    """Check that each step from `first` on was taken, and recorded, as `settings` say."""
    rows, told = found
    s = TODAY | settings
    schedule = [s[key] for key in ("learning_rate", "lr_scheduler_type", "warmup_steps")]
    rates = [learning_rate_at(step, STEPS, *schedule) for step in range(first, first + len(rows))]
    assert [row["step"] for row in rows] == list(range(FIRST + first, FIRST + first + len(rows)))
    assert [row["lr"] for row in rows] == rates
    shared = {"betas": (0.9, s["adam_beta2"])}
    decay = [{"weight_decay": s["weight_decay"]}, {"weight_decay": 0.0}]  # norms and biases are the second group
    assert told == [[shared | group | {"lr": rate} for group in decay] for rate in rates]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "cosine_with_min_lr"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_a_step_has_the_rate_that_any_stage_would_give_it(train, schedule, warmup):
    settings = {"lr_scheduler_type": schedule, "warmup_steps": warmup}
    found = train(**settings)
    assert len(found[0]) == STEPS and found[0][0]["lr"] > 0
    assert_told(found, settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"learning_rate": 0.002},
        {"lr_scheduler_type": "linear", "warmup_steps": 6},
        {"weight_decay": 0.0, "adam_beta2": 0.8},
    ],
)
def test_a_resumed_run_uses_the_current_settings(train, settings):
    assert_told(train(stop_at=FIRST + 3), {})
    found = train(**settings)
    assert [row["step"] for row in found[0]] == [FIRST + step for step in range(5, STEPS + 1)]
    assert_told(found, settings, first=5)


def test_weight_decay_may_begin_in_a_run_that_goes_on(train):
    train(stop_at=FIRST + 3, weight_decay=0.0)
    assert_told(train(), {}, first=5)


def test_a_checkpoint_with_a_schedule_of_transformers_is_gone_on_from(train, tmp_path):
    """Old checkpoints hold one, with its own peak."""
    from transformers import get_scheduler

    train(stop_at=FIRST + 3)
    folder = tmp_path / "checkpoints" / f"step-{FIRST + 4:08d}"
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(2)]
    options = {"min_lr_rate": 0.1}
    old = get_scheduler("cosine_with_min_lr", torch.optim.AdamW(groups, lr=0.7), 2, STEPS, options)
    torch.save(old.state_dict(), folder / "trainer" / "scheduler.pt")
    manifest = integrity.read_sealed(folder / "manifest.json")
    manifest["files"] = integrity.describe_files(folder, list(manifest["files"]))
    files.write_json(folder / "manifest.json", integrity.seal(manifest))
    assert_told(train(), {}, first=5)


def test_a_gradient_that_is_not_finite_stops_with_a_way_to_go_on(train):
    with pytest.raises(TrainingStopped) as caught:
        train(harm=lambda model: model.model.norm.weight.data.fill_(math.nan))
    assert str(caught.value) == (
        f"sft: the gradient at step {FIRST + 1} is not finite; this step was not taken. Run again with a lower "
        f"learning_rate or max_grad_norm and --override-config, or with model.dtype: float32 and --restart"
    )
