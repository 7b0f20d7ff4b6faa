"""Test GAE against the double sum that defines it, RLOO and GRPO against loops and expectations."""

import itertools
import statistics

import pytest
import torch

from stages.objectives.advantages import gae, grpo, rloo

LENGTHS, WIDTH = [5, 1, 3, 4], 5


@pytest.fixture
def rewards():
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.fixture
def values():
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.fixture
def mask(prefix_mask):
    return prefix_mask(LENGTHS, WIDTH)


def double_sum(rewards, values, lam, gamma):
    """Return A_t = Σ_l (γλ)^l δ_{t+l}, δ_t = r_t + γ V_{t+1} − V_t (Schulman 2016, eq. 16), by
    loops.
    """
    advantages = [[0.0] * WIDTH for _ in LENGTHS]
    for b, length in enumerate(LENGTHS):
        r, v = rewards[b].tolist(), [*values[b].tolist()[:length], 0.0]
        for t in range(length):
            advantages[b][t] = sum(
                (gamma * lam) ** (k - t) * (r[k] + gamma * v[k + 1] - v[k]) for k in range(t, length)
            )
    return torch.tensor(advantages, dtype=torch.float64)


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("gamma", [0.9, 1.0])
def test_gae_is_the_double_sum(rewards, values, mask, lam, gamma):
    advantages, returns = gae(rewards, values, mask, lam, gamma)
    expected = double_sum(rewards, values, lam, gamma)
    torch.testing.assert_close(advantages, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(returns, torch.where(mask, expected + values, 0.0), rtol=1e-12, atol=1e-14)


def test_at_lambda_one_the_return_is_the_sum_of_rewards_to_come(rewards, values, mask):
    """λ = γ = 1 is the Monte-Carlo return, whatever the values are."""
    _, returns = gae(rewards, values, mask, 1.0)
    for b, length in enumerate(LENGTHS):
        for t in range(length):
            assert returns[b, t].item() == pytest.approx(sum(rewards[b, t:length].tolist()), abs=1e-12)


def test_right_values_leave_no_advantage(rewards, mask):
    """If V is the sum of rewards to come, every advantage is 0 at any λ."""
    rewards = torch.where(mask, rewards, 0.0)
    values = rewards.flip(-1).cumsum(-1).flip(-1)
    assert gae(rewards, values, mask, 0.7)[0].abs().max() < 1e-12


def test_nan_under_the_mask_is_unseen(rewards, values, mask):
    clean = gae(rewards, values, mask, 0.95)
    poisoned = gae(torch.where(mask, rewards, torch.nan), torch.where(mask, values, torch.nan), mask, 0.95)
    for one, other in zip(clean, poisoned, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
        assert (one[~mask] == 0).all()


# -- against the other samples of a prompt --------------------------------------------------------


def test_rloo_takes_off_the_mean_of_the_other_samples(rewards, mask):
    """By loops over two prompts of two samples; every token of a response has one advantage."""
    advantages = rloo(rewards, mask, 2)
    total = [sum(rewards[i, t].item() for t in range(length)) for i, length in enumerate(LENGTHS)]
    for i, length in enumerate(LENGTHS):
        expected = total[i] - total[i + 1 if i % 2 == 0 else i - 1]
        assert advantages[i].tolist() == pytest.approx([expected] * length + [0.0] * (WIDTH - length))


@pytest.mark.parametrize("scale", [True, False])
def test_grpo_is_relative_to_the_samples_of_a_prompt(mask, scale):
    scores = torch.tensor([1.0, 4.0, -2.0, 7.0], dtype=torch.float64)
    advantages = grpo(scores, mask, 4, scale)
    mean, deviation = statistics.mean(scores.tolist()), statistics.stdev(scores.tolist())
    for i, length in enumerate(LENGTHS):
        expected = (scores[i].item() - mean) / (deviation + 1e-4 if scale else 1.0)
        assert advantages[i].tolist() == pytest.approx([expected] * length + [0.0] * (WIDTH - length))


def test_equal_scores_teach_nothing(mask):
    for advantages in (
        grpo(torch.full((4,), 0.3), mask, 2, True),
        rloo(torch.full((4, 1), 0.3).expand(4, WIDTH) * mask.float() / mask.sum(-1, keepdim=True), mask, 2),
    ):
        torch.testing.assert_close(advantages, torch.zeros(4, WIDTH))


def test_what_stands_off_the_mask_changes_nothing(rewards, mask):
    poisoned = torch.where(mask, rewards, torch.nan)
    assert torch.equal(rloo(poisoned, mask, 2), rloo(rewards, mask, 2))


@pytest.mark.parametrize("samples", [2, 3])
def test_the_expected_gradient_is_the_policy_gradient(samples):
    """Over all draws: RLOO gives ∇E[r], GRPO without division (n−1)/n of it."""
    logits = torch.tensor([0.3, -0.8, 0.5], dtype=torch.float64, requires_grad=True)
    table = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    (right,) = torch.autograd.grad((logits.softmax(-1) * table).sum(), logits)
    mask = torch.ones(samples, 1, dtype=torch.bool)
    expected = {"rloo": torch.zeros(3, dtype=torch.float64), "grpo": torch.zeros(3, dtype=torch.float64)}
    for draw in itertools.product(range(3), repeat=samples):
        chosen = torch.tensor(draw)
        chance = logits.softmax(-1)[chosen].prod().detach()
        scores = table[chosen]
        for name, advantages in (
            ("rloo", rloo(scores.unsqueeze(-1), mask, samples)),
            ("grpo", grpo(scores, mask, samples, scale=False)),
        ):
            surrogate = (advantages.squeeze(-1) * logits.log_softmax(-1)[chosen]).mean()
            (gradient,) = torch.autograd.grad(surrogate, logits)
            expected[name] += chance * gradient
    torch.testing.assert_close(expected["rloo"], right)
    torch.testing.assert_close(expected["grpo"], right * (samples - 1) / samples)
