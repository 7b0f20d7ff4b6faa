"""Compute advantages by generalised advantage estimation (Schulman 2016, eq. 16)."""

import torch
from torch import Tensor


def gae(rewards: Tensor, values: Tensor, mask: Tensor, lam: float, gamma: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return advantages and returns of each response token.

    δ_t = r_t + γ V_{t+1} − V_t;  A_t = δ_t + γλ A_{t+1}, where the value after the last token is 0.

    Args:
        rewards: r, (B, R).
        values: V before each token, (B, R).
        mask: True at response tokens, (B, R).
        lam: λ.
        gamma: γ, the discount per token.

    Returns:
        A and G = A + V (before any whitening), (B, R) each; 0 off the mask.
    """
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(values)
    next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        next_value = values[:, t + 1] if t + 1 < values.shape[1] else 0.0
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = next_advantage
    advantages = torch.where(mask, advantages, 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)
