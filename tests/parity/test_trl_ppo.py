"""Compare our PPO with trl 1.12's, its last release with PPO: every number of two steps.

trl_ppo.json contains what trl's train() computed for tiny models and fixed episodes, and the
command that wrote it. Where trl differs on purpose, its way is computed here with our functions,
marked `trl:`.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from data.groups import make_rows
from stages.models.forward import response_logprobs, response_scores, response_values
from stages.models.packing import can_pack
from stages.objectives.advantages import gae
from stages.objectives.losses import policy_loss, value_loss
from stages.objectives.masked import masked_whiten
from stages.objectives.rewards import kl_per_token, token_rewards

PEER = json.loads(Path(__file__).with_name("trl_ppo.json").read_text())
PAD = PEER["model"]["pad_token_id"]
EOS = PEER["model"]["eos_token_id"]
CLOSE = 1e-4


def build(role):
    """Return a model whose weights are drawn from the role's seed, by order of name, as the
    peer's.
    """
    auto = AutoModelForCausalLM if "policy" in role else AutoModelForSequenceClassification
    model = auto.from_config(LlamaConfig(**PEER["model"], num_labels=1)).float()
    generator = torch.Generator().manual_seed(PEER["seeds"][role])
    with torch.no_grad():
        for name, p in sorted(model.named_parameters(), key=lambda pair: pair[0]):
            p.copy_(0.5 * torch.randn(p.shape, generator=generator) + ("norm" in name))
    return model.eval()


def whiten(x, mask, shift_mean=True):
    """trl: the unbiased variance, N − 1 in place of N."""
    n = mask.sum()
    white = masked_whiten(x, mask, eps=1e-8 * (n - 1) / n) * ((n - 1) / n).sqrt()
    return white if shift_mean else torch.where(mask, white + x[mask].mean(), 0.0)


def rows(packed):
    return make_rows(PEER["prompts"], PEER["responses"], PAD, packed=packed)


def rows_with_a_slot_more(packed):
    """Return rows for trl, whose values and score are one place after the last token, if there
    is room.
    """
    width = max(map(len, PEER["responses"]))
    return make_rows(PEER["prompts"], [[*r, PAD][:width] for r in PEER["responses"]], PAD, packed=packed)


def our_rollout(models, packed, c):
    """Return all tensors of the rollout under trl's names, and the masks of tokens and value
    slots.
    """
    tight, wide = rows(packed), rows_with_a_slot_more(packed)
    mask, slots = tight.response_mask, wide.response_mask
    temperature = c["temperature"] + 1e-7  # trl: adds it
    with torch.no_grad():
        logprobs = response_logprobs(models["policy"], tight, temperature)
        ref_logprobs = response_logprobs(models["ref_policy"], tight, temperature)
        values = response_values(models["value_model"], wide)
        scores = response_scores(models["reward_model"], tight)
    if c["missing_eos_penalty"] is not None:  # trl: subtracted, not put in the score's place
        unfinished = torch.tensor([r[-1] != EOS for r in PEER["responses"]])
        scores = scores - c["missing_eos_penalty"] * unfinished
    kl = torch.where(mask, kl_per_token(logprobs, ref_logprobs, c["kl_estimator"]), 0.0)
    rewards = token_rewards(scores, kl, slots, c["kl_coef"])
    if c["whiten_rewards"]:
        rewards = whiten(rewards, slots, shift_mean=False)
    advantages, returns = gae(rewards, values, slots, c["lam"], c["gamma"])
    return {
        "logprobs": logprobs,
        "ref_logprobs": ref_logprobs,
        "values": values,
        "scores": scores,
        "kl": kl,
        "rewards": rewards,
        "advantages_before": advantages,
        "advantages": whiten(advantages, mask),
        "returns": returns,
    }, SimpleNamespace(tokens=mask, slots=slots)


def our_steps(models, packed, c, rollout, masks):
    """Return losses, clip fractions and gradients of each step; weights move as the peer's did."""
    policy, value_model = models["policy"], models["value_model"]
    tight, wide = rows(packed), rows_with_a_slot_more(packed)
    for _ in range(c["num_ppo_epochs"]):
        logprobs = response_logprobs(policy, tight, c["temperature"] + 1e-7)
        values = response_values(value_model, wide)
        count, slots = masks.tokens.sum(), masks.slots.sum()
        pg, sums = policy_loss(
            logprobs, rollout["logprobs"], rollout["advantages"], masks.tokens, c["cliprange"], count
        )
        vf, v_sums = value_loss(values, rollout["values"], rollout["returns"], masks.slots, c["cliprange_value"], slots)
        loss = pg + c["vf_coef"] * vf  # trl: one loss over both models, and no clipping of the gradient
        loss.backward()
        gradients = {f"policy.{n}": p.grad for n, p in policy.named_parameters()}
        gradients |= {f"value_model.{n}": p.grad for n, p in value_model.named_parameters()}
        yield (
            {"policy": pg.item(), "value": vf.item(), "all": loss.item()},
            {"policy": (sums["clipped"] / count).item(), "value": (v_sums["clipped"] / slots).item()},
            {n: g.clone() for n, g in gradients.items()},
        )
        with torch.no_grad():  # plain gradient descent
            for p in (*policy.parameters(), *value_model.parameters()):
                p -= c["learning_rate"] * p.grad
                p.grad = None


def assert_same(name, ours, theirs, mask=None):
    """Assert that tensors are close in norm, and each number on the scale of the largest."""
    theirs = torch.tensor(theirs)
    if mask is not None:
        ours, theirs = ours[mask], theirs[mask]
    assert ours.shape == theirs.shape, name
    error = (ours - theirs).norm() / theirs.norm()
    assert error <= CLOSE, f"{name}: off by {error:.2g} of its norm"
    torch.testing.assert_close(
        ours, theirs, rtol=CLOSE, atol=CLOSE * theirs.abs().max().item(), msg=lambda m: f"{name}: {m}"
    )


@pytest.fixture(
    params=PEER["cases"], ids=lambda case: "temperature {temperature}, {kl_estimator}".format(**case["settings"])
)
def case(request):
    return request.param


@pytest.fixture(params=[True, False], ids=["packed", "padded"])
def packed(request):
    return request.param


@pytest.fixture
def models(packed):
    built = {role: build(role) for role in PEER["seeds"]}
    assert not packed or all([can_pack(model, 32) for model in built.values()])
    return built


def test_the_weights_are_the_peers(models):
    for role, model in models.items():
        total = sum(p.double().abs().sum().item() for p in model.parameters())
        assert total == pytest.approx(PEER["absolute_sums"][role], rel=1e-5), role


def test_the_rollout_is_trls(models, packed, case):
    """Log-probs, reference, values, scores, KL, rewards, advantages before and after whitening,
    returns.
    """
    ours, masks = our_rollout(models, packed, case["settings"])
    theirs = case["rollout"]
    assert set(ours) == set(theirs)
    for name in ours:
        mask = None if name == "scores" else masks.tokens if "logprobs" in name else masks.slots
        assert_same(name, ours[name], theirs[name], mask)


def test_losses_and_every_gradient_of_both_steps_are_trls(models, packed, case):
    """The first at ratio 1; the second after both models have moved, where ratios and values are
    clipped.
    """
    c = case["settings"]
    rollout, masks = our_rollout(models, packed, c)
    clipped = {"policy": 0.0, "value": 0.0}
    for step, (losses, shares, gradients) in enumerate(our_steps(models, packed, c, rollout, masks)):
        assert losses == pytest.approx(case["losses"][step], rel=CLOSE, abs=1e-6), f"step {step + 1}"
        assert set(gradients) == set(case["gradients"][step])
        for name, gradient in gradients.items():
            assert_same(f"step {step + 1}, {name}", gradient, case["gradients"][step][name])
        clipped = {k: clipped[k] + shares[k] / c["num_ppo_epochs"] for k in clipped}
    assert clipped["policy"] > 0.1 and clipped["value"] > 0.1, "nothing was clipped: the second step shows little"
    assert clipped["policy"] == pytest.approx(case["logged"]["policy/clipfrac_avg"], abs=1e-6)
    assert clipped["value"] == pytest.approx(case["logged"]["val/clipfrac_avg"], abs=1e-6)
