"""A language model of one token a response, whose optimum under the KL penalty is known: π* ∝ π_ref · exp(r / β)."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from stages.models.packing import can_pack
from stages.models.roles import Roles
from stages.objectives.advantages import gae
from stages.objectives.rewards import kl_per_token, token_rewards
from stages.ppo import run as ppo
from stages.settings import ppo as ppo_settings
from stages.training.trainee import Average, Skips, make_trainee

PAD, EOS = 0, 1
PROMPT = [2, 3]
UPDATES = 120


def llama(auto, seed, **options):
    from transformers import LlamaConfig

    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    ids = {"vocab_size": 4, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None, "use_cache": False}
    return auto.from_config(LlamaConfig(**shape, **ids, initializer_range=0.3, **options)).float().eval()


def probabilities(model):
    with torch.no_grad():
        return model(torch.tensor([PROMPT])).logits[0, -1].softmax(-1)


@pytest.mark.parametrize("rewards", [(0.0, 0.0, 0.5, -0.5), (0.4, -0.3, 0.1, 0.6)])
@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_ppo_reaches_the_closed_form_optimum(rewards, beta, monkeypatch):
    """Sampling, rewards, advantages and updates of the stage itself; every probability within 0.02 of π*. With two
    arms paid apart, and with four different ones; a penalty of the wrong sign or size, or a score paid twice, would
    settle elsewhere."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    policy, value = llama(AutoModelForCausalLM, 0), llama(AutoModelForSequenceClassification, 1, num_labels=1)
    value.config.reward_bias = 0.0
    reference = copy.deepcopy(policy).requires_grad_(False)
    assert all([can_pack(model, 8) for model in (policy, reference, value)])
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), autocast=nullcontext, backward=lambda loss: loss.backward()
    )
    tokenizer = SimpleNamespace(eos_token_id=EOS, pad_token_id=PAD)
    roles = Roles(policy, reference, None, value, tokenizer, accelerator, packed=True)
    table = torch.tensor(rewards)
    monkeypatch.setattr("stages.rollouts.collect.response_scores", lambda model, rows: table[rows.responses[:, 0]])
    c = ppo_settings.PPOSettings(
        batch_size=128, mini_batch_size=64, per_device_train_batch_size=64, samples_per_prompt=64, response_length=1,
        max_length=8, kl_coef=beta, missing_eos_score=None, ptx_coef=0, total_episodes=128 * UPDATES,
    )  # fmt: skip
    ctx = SimpleNamespace(config=c, seed=5, stage="ppo", tracker=SimpleNamespace(say=print))
    trainees = [make_trainee(name, model, learning_rate=0.0, max_grad_norm=10.0)
                for name, model in (("policy", policy), ("value_model", value))]  # fmt: skip
    right = (probabilities(reference).log() + table / beta).softmax(-1)
    assert (right - probabilities(policy)).abs().max() > 0.05  # there is a way to go
    for step in range(1, UPDATES + 1):
        rollout = ppo.rollout_of(ctx, roles, [PROMPT, PROMPT], [0, 1], step)
        kl = kl_per_token(rollout.logprobs, rollout.ref_logprobs)
        rewards_of = token_rewards(rollout.scores, kl, rollout.mask, beta)
        advantages, returns = gae(rewards_of, rollout.values, rollout.mask, c.lam)
        rate = 1e-2 * (1 - (step - 1) / UPDATES)
        rest = {"ptx_batch": lambda n: None, "average": Average(None), "skips": Skips(0)}
        ppo.update(ctx, roles, *trainees, rollout, advantages, returns, step=step, rate=rate, value_rate=rate, **rest)
    torch.testing.assert_close(probabilities(policy), right, rtol=0, atol=0.02)
