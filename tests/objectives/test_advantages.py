"""Test GAE against the double sum that defines it."""

import pytest
import torch

from stages.objectives.advantages import gae

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
