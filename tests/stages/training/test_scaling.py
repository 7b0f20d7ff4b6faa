"""Test the gradient scaler of float16: it skips, halves, doubles, counts and is saved."""

import copy
import math
import shutil

import pytest
import torch

from pipeline.errors import TrainingStopped, UserError
from stages.models import precision
from stages.models.loading import load_policy, load_scalar_model
from stages.shared.runtime import make_accelerator
from stages.training.loop import read_and_step
from stages.training.scaling import Scaling, new_scaling
from stages.training.trainee import make_trainee
from tests.stages.micro_chain import MicroChain, spy


@pytest.fixture
def accelerator(monkeypatch):
    """Return an accelerator that computes in float16, whose scale doubles after two steps."""
    monkeypatch.setattr(precision, "FIRST_SCALE", 2.0**16)
    monkeypatch.setattr(precision, "GROWTH_STEPS", 2)
    return make_accelerator("cpu", "float16")


def trainee_of(name="model", seed=0):
    torch.manual_seed(seed)
    return make_trainee(name, torch.nn.Linear(4, 1), learning_rate=0.1, max_grad_norm=1.0)


def differentiate(accelerator, trainee, factor):
    """Compute the gradient of `factor` times the mean output; float16 holds it up to 65504."""
    with accelerator.autocast():
        out = trainee.model(torch.ones(2, 4))
    assert out.dtype == torch.float16
    accelerator.backward(factor * out.float().mean())


def state_of(trainee):
    """Return copies of the weights and of Adam's state."""
    weights = {name: x.clone() for name, x in trainee.tensors().items()}
    moments = [{k: v.clone() for k, v in s.items()} for s in trainee.optimizer.state_dict()["state"].values()]
    return weights, moments


def norm_of_step(trainee, scaling, step) -> float:
    """Take a step without figures, at a rate of 0.1."""
    return read_and_step(trainee, scaling, [], 0.1, step)["grad_norm"]


def assert_same(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_an_overflow_changes_nothing_but_halves_the_scale(accelerator):
    scaling, trainee = new_scaling(accelerator), trainee_of()
    differentiate(accelerator, trainee, 0.5)
    norm = norm_of_step(trainee, scaling, 1)
    assert norm == pytest.approx(0.5 * math.sqrt(5))  # of the unscaled gradient: 0.5 for each of five weights
    before = state_of(trainee)
    differentiate(accelerator, trainee, 4.0)
    assert math.isnan(norm_of_step(trainee, scaling, 2))
    assert_same(state_of(trainee), before)
    assert all(p.grad is None for p in trainee.parameters.values())
    assert scaling.figures() == {"grad_scale": 2.0**15, "steps_skipped_by_scaler": 1}


def test_the_scale_doubles_after_steps_without_an_overflow(accelerator):
    scaling, trainee = new_scaling(accelerator), trainee_of()
    scales = []
    for step in range(1, 6):
        differentiate(accelerator, trainee, 0.5)
        norm_of_step(trainee, scaling, step)
        scales.append(scaling.scale)
    assert scales == [2.0**16, 2.0**17, 2.0**16, 2.0**16, 2.0**17]  # half of 2¹⁷ overflows: no third step
    assert scaling.skipped == 1


def test_two_models_step_together_or_not_at_all(accelerator):
    scaling, one, other = new_scaling(accelerator), trainee_of("policy"), trainee_of("value_model", 1)
    differentiate(accelerator, one, 4.0)
    differentiate(accelerator, other, 0.5)
    assert scaling.overflow([one, other])
    assert all(p.grad is None for t in (one, other) for p in t.parameters.values())
    differentiate(accelerator, one, 0.5)
    differentiate(accelerator, other, 0.25)
    assert not scaling.overflow([one, other])
    assert [p.grad.unique().tolist() for t in (one, other) for p in t.parameters.values()] == [[0.5]] * 2 + [[0.25]] * 2


def test_below_a_scale_of_one_it_is_a_gradient_that_is_not_finite(accelerator):
    scaling, trainee = new_scaling(accelerator), trainee_of()
    for step in range(1, 17):
        differentiate(accelerator, trainee, math.inf)
        assert math.isnan(norm_of_step(trainee, scaling, step))
    assert scaling.scale == 1
    differentiate(accelerator, trainee, math.inf)
    with pytest.raises(TrainingStopped, match="model: the gradient at step 17 is not finite in float16"):
        norm_of_step(trainee, scaling, 17)


def test_it_continues_from_its_state(accelerator):
    scaling, trainee = new_scaling(accelerator), trainee_of()
    for step, factor in enumerate((4.0, 0.5)):
        differentiate(accelerator, trainee, factor)
        norm_of_step(trainee, scaling, step)
    saved = scaling.state()
    again = new_scaling(accelerator)
    assert again.scale == 2.0**16
    again.restore(saved)
    assert again.state() == saved and again.figures() == {"grad_scale": 2.0**15, "steps_skipped_by_scaler": 1}
    differentiate(accelerator, trainee, 0.5)
    assert not again.overflow([trainee]) and again.scale == 2.0**16  # the second of two steps
    again.restore({})  # a checkpoint of another dtype
    assert again.scale == 2.0**16


def test_other_dtypes_have_no_scaler():
    for dtype in ("float32", "bfloat16"):
        scaling = new_scaling(make_accelerator("cpu", dtype))
        assert scaling == Scaling() and scaling.scale == 1.0
        assert scaling.figures() == scaling.state() == scaling.skips() == {}
        assert not scaling.overflow([trainee_of()])


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    return MicroChain(tmp_path_factory.mktemp("chain"))


SHORT = {
    "sft": ["sft.max_steps=2 sft.max_length=64", "sft.learning_rate=1e-4"],
    "rm": ["rm.max_steps=2 rm.max_length=64", "rm.learning_rate=1e-4"],
    "dpo": ["dpo.max_steps=2 dpo.max_length=64", "dpo.learning_rate=1e-4"],
    "ppo": [
        "ppo.total_episodes=16 ppo.batch_size=8 ppo.mini_batch_size=8 ppo.per_device_train_batch_size=2",
        "ppo.learning_rate=1e-4 ppo.response_length=8 ppo.max_length=32 ppo.ptx_coef=0.5 ppo.ptx_length=16",
        "ppo.samples_per_prompt=2 ppo.missing_eos_score=-1 ppo.keep=last",
    ],
}


@pytest.mark.parametrize("stage", SHORT)
def test_losses_and_gradients_are_nearly_those_of_float32(stage, chain, tmp_path, monkeypatch):
    """Gradients are unscaled in what is measured, those of ptx and their cosine among them."""
    monkeypatch.setattr(precision, "FIRST_SCALE", 2.0**8)
    settings = [word for words in SHORT[stage] for word in words.split()]
    rows = {}
    for dtype in ("float32", "float16"):
        done = chain.run(stage, tmp_path / dtype, *settings, f"model.dtype={dtype}")
        rows[dtype] = done.rows("metrics.jsonl")[0]
    extra = rows["float16"].keys() - rows["float32"].keys()
    assert extra == {"grad_scale", "steps_skipped_by_scaler"} and rows["float16"]["grad_scale"] == 2.0**8
    measured = [key for key in rows["float32"] if key.startswith(("loss", "grad_"))]
    assert len(measured) >= 2
    for key in measured:
        assert rows["float16"][key] == pytest.approx(rows["float32"][key], rel=0.03, abs=3e-3), key


def test_ppo_averages_only_the_gradients_that_it_stepped_with(chain, tmp_path, monkeypatch):
    """Of four optimizer steps the first ones overflow, and their norms are no numbers."""
    from stages.ppo import update

    monkeypatch.setattr(precision, "FIRST_SCALE", 2.0**16)
    steps = spy(monkeypatch, update, "clipped_step")
    settings = [word for words in SHORT["ppo"] for word in words.split()]
    done = chain.run("ppo", tmp_path / "run", *settings, "ppo.mini_batch_size=2", "model.dtype=float16")
    first = done.rows("metrics.jsonl")[0]
    skipped = first["steps_skipped_by_scaler"]
    assert 0 < skipped < 4 and first["grad_scale"] == 2.0 ** (16 - skipped)
    assert math.isfinite(first["grad_norm/ppo"]) and math.isfinite(first["grad_norm/ptx"])
    assert done.figures["steps_skipped_by_scaler"] == done.rows("metrics.jsonl")[-1]["steps_skipped_by_scaler"]
    assert done.figures["skipped_steps"] == 0
    assert len(steps) == 2 * (2 * 4 - done.figures["steps_skipped_by_scaler"])  # of policy and value model


@pytest.mark.parametrize("stage, whose", [("dpo", "sft/model"), ("ppo", "rm/model")])
def test_a_frozen_model_that_overflows_is_no_silent_result(stage, whose, chain, tmp_path):
    """What trains has a scaler, and what does not has a check."""
    large = (load_scalar_model if stage == "ppo" else load_policy)(chain.root / whose)
    with torch.no_grad():
        for layer in large.base_model.layers:
            layer.mlp.down_proj.weight *= 3e5
    other = copy.copy(chain)
    other.root = tmp_path / "chain"
    shutil.copytree(chain.root, other.root)
    other.save(large, whose)
    settings = [word for words in SHORT[stage] for word in words.split()]
    with pytest.raises((UserError, TrainingStopped), match="not finite"):
        other.run(stage, tmp_path / "run", *settings, "model.dtype=float16")
