"""Train a model of one token a response, whose optimum is known: π* ∝ π_ref · exp(r / β)."""

import copy
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from stages.models.packing import can_pack
from stages.models.roles import Roles
from stages.ppo.options import Correction, advantage_options, update_options
from stages.ppo.run import advantage, correct, reward
from stages.ppo.update import Learners, Rates, update
from stages.rollouts.engine import Sampled
from stages.rollouts.transformers import draw
from stages.scorers.scorer import Scores
from stages.settings import ppo as ppo_settings
from stages.settings.rollout import RolloutSettings
from stages.training.trainee import Average, Skips, make_trainee
from tests.builders import EOS, PAD, build, tiny_config
from tests.ppo_sampler import drawn, sampler_of

PROMPT = [2, 3]
UPDATES = 120


def llama(auto, seed, **options):
    """Return a random Llama of one layer and four ids in eval mode."""
    return build(auto, seed, tiny_config(vocab_size=4, num_hidden_layers=1, **options))


def probabilities(model):
    with torch.no_grad():
        return model(torch.tensor([PROMPT])).logits[0, -1].softmax(-1)


class TableScorer:
    """Score a response by its first token."""

    reads_rows = True

    def __init__(self, rewards):
        self.rewards = torch.tensor(rewards)

    def score(self, request):
        return Scores(self.rewards[[response[0] for response in request.responses]])


@pytest.mark.parametrize(
    "beta, rewards",
    [
        (0.3, (0.4, -0.3, 0.1, 0.6)),
        (1.0, (0.0, 0.0, 0.5, -0.5)),
        pytest.param(0.3, (0.0, 0.0, 0.5, -0.5), marks=(pytest.mark.slow, pytest.mark.exhaustive)),
        pytest.param(1.0, (0.4, -0.3, 0.1, 0.6), marks=(pytest.mark.slow, pytest.mark.exhaustive)),
    ],
)
def test_ppo_reaches_the_closed_form_optimum(rewards, beta):
    """Check that the stage's own steps bring every probability within 0.02 of π*.

    With two arms that get a reward, and with four different rewards. A penalty of the wrong sign or
    size, or a score that counts twice, would settle elsewhere.
    """
    roles = bandit()
    right = optimum(roles, rewards, beta)
    assert (right - probabilities(roles.policy)).abs().max() > 0.05  # there is a way to go
    train(roles, rewards, beta)
    torch.testing.assert_close(probabilities(roles.policy), right, rtol=0, atol=0.02)


class OtherEngine:
    """Sample from the policy's logits plus a constant: another distribution, and its log-probs."""

    is_policy = False
    shift = torch.tensor([0.9, -0.6, 0.5, -0.8])

    def start(self, model, poll):
        self.model = copy.deepcopy(model)

    def update_weights(self, model):
        self.model = copy.deepcopy(model)

    def sample(self, request, poll):
        with torch.no_grad():
            logits = self.model(torch.tensor([PROMPT])).logits[0, -1] + self.shift
        uniforms = torch.stack([torch.rand(1, generator=torch.Generator().manual_seed(s))[0] for s in request.seeds])
        tokens = draw(logits.expand(len(uniforms), -1), uniforms)
        logprobs = logits.log_softmax(-1)[tokens].unsqueeze(-1)
        return Sampled([[token] for token in tokens.tolist()], logprobs, torch.zeros_like(logprobs))

    def close(self):
        pass


def test_a_correction_finds_the_optimum_through_an_engine_of_another_distribution():
    """With weights within 0.03 of π*; without them over 0.1 off.

    The value model stays near 0, far from the mean reward. So the gradient is 0 where μ(y) A(y) is
    proportional to π(y), which is π* only if μ is π.
    """
    rewards, beta = (1.4, 0.7, 1.1, 1.6), 1.0
    errors = {}
    for correction in (None, Correction("token", 10.0, None, "truncate")):
        roles = bandit()
        right = optimum(roles, rewards, beta)
        train(roles, rewards, beta, engine=OtherEngine(), correction=correction, value_rate=0.0)
        errors[correction] = (probabilities(roles.policy) - right).abs().max().item()
    without, with_weights = errors.values()
    assert with_weights < 0.03 and without > 0.1


def test_rloo_reaches_the_optimum_without_a_value_model():
    rewards, beta = (0.4, -0.3, 0.1, 0.6), 0.5
    roles = replace(bandit(), value_model=None)
    right = optimum(roles, rewards, beta)
    assert (right - probabilities(roles.policy)).abs().max() > 0.05
    train(roles, rewards, beta, advantage="rloo")
    torch.testing.assert_close(probabilities(roles.policy), right, rtol=0, atol=0.02)


def test_grpo_comes_to_rest_where_its_loss_does():
    """Reward gradient and that of KL(π_ref ‖ π), which k3 has in a loss, cancel out there.

    For logits z both have a closed form: (n−1)/n · π (r − E[r]) = β (π − π_ref).
    """
    rewards, beta, n = torch.tensor([0.4, -0.3, 0.1, 0.6]), 0.5, 64
    roles = replace(bandit(), value_model=None)
    reference = probabilities(roles.ref_policy)
    right = reference.clone()
    for _ in range(20_000):  # gradient ascent on the logits of a table, without the code under test
        push = (n - 1) / n * right * (rewards - (right * rewards).sum()) - beta * (right - reference)
        right = (right.log() + 0.5 * push).softmax(-1)
    assert (right - reference).abs().max() > 0.05
    train(roles, tuple(rewards.tolist()), beta, advantage="grpo", grpo_scale=False)
    torch.testing.assert_close(probabilities(roles.policy), right, rtol=0, atol=0.02)


def bandit() -> Roles:
    """Return the models: policy, its copy as reference, and a value model."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    policy, value = llama(AutoModelForCausalLM, 0), llama(AutoModelForSequenceClassification, 1, num_labels=1)
    value.config.reward_bias = 0.0
    reference = copy.deepcopy(policy).requires_grad_(False)
    assert all([can_pack(model, 8) for model in (policy, reference, value)])
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), autocast=nullcontext, backward=lambda loss: loss.backward()
    )
    tokenizer = SimpleNamespace(eos_token_id=EOS, pad_token_id=PAD)
    return Roles(policy, reference, {}, value, tokenizer, accelerator, packed=True)


def optimum(roles, rewards, beta):
    """Return π*, (4,)."""
    return (probabilities(roles.ref_policy).log() + torch.tensor(rewards) / beta).softmax(-1)


def train(roles, rewards, beta, engine=None, correction=None, value_rate=None, **settings):
    """Train by the stage's own steps.

    Args:
        roles: The models; policy and value model change.
        rewards: Score of each of the four tokens.
        beta: Weight of KL.
        engine: Samples; None: the policy itself.
        correction: How its samples are weighed.
        value_rate: Learning rate of the value model; None: the policy's.
        settings: Further settings of ppo.
    """
    c = ppo_settings.PPOSettings(
        batch_size=128, mini_batch_size=64, per_device_train_batch_size=64, samples_per_prompt=64, response_length=1,
        max_length=8, kl_coef=beta, missing_eos_score=None, ptx_coef=0, total_episodes=128 * UPDATES,
        rollout=RolloutSettings(max_engine_kl=99.0), **settings,
    )  # fmt: skip
    trainees = [make_trainee(name, model, learning_rate=0.0, max_grad_norm=10.0)
                for name, model in zip(("policy", "value_model"), roles.trained(), strict=False)]  # fmt: skip
    learners = Learners(trainees[0], trainees[1] if trainees[1:] else None, Average(None), Skips(0))
    sampler = sampler_of(roles, c, engine=engine, seed=5, scorer=TableScorer(rewards))
    options, returns = update_options(c, seed=5), replace(advantage_options(c), whiten_advantages=False)
    for step in range(1, UPDATES + 1):
        rollout = sampler.rollout(drawn([PROMPT, PROMPT]), step, recompute=False)
        rewards_of = reward(rollout, beta, c.kl_estimator, whiten=False)
        batch, _ = correct(advantage(rollout, rewards_of, returns, beta), correction)
        rate = 1e-2 * (1 - (step - 1) / UPDATES)
        rates = Rates(policy=rate, value=rate if value_rate is None else value_rate)
        update(roles, learners, batch, options, step=step, rates=rates, next_texts=None, say=print)
        sampler.weights_changed = True
