"""Compute advantages: by generalised advantage estimation, or against a prompt's other samples."""

import torch
from torch import Tensor


def gae(rewards: Tensor, values: Tensor, mask: Tensor, lam: float, gamma: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return advantages and returns of each token (Schulman 2016, eq. 16).

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


def rloo(rewards: Tensor, mask: Tensor, samples: int) -> Tensor:
    """Return each response's reward minus the mean of the prompt's other samples (RLOO).

    A_i = R_i − 1/(n−1) Σ_{j≠i} R_j (Ahmadian 2024, eq. 8; Kool 2019), where R is the sum of the
    rewards of a response's tokens. The other samples do not depend on this one, so the baseline
    leaves the policy gradient unbiased. Every token of a response has the same advantage.

    Args:
        rewards: r, (B, R), KL penalty included.
        mask: True at response tokens, (B, R).
        samples: n ≥ 2, the successive rows that are samples of one prompt.

    Returns:
        A, (B, R); 0 off the mask.
    """
    total = torch.where(mask, rewards, 0.0).sum(-1).unflatten(0, (-1, samples))
    others = (total.sum(-1, keepdim=True) - total) / (samples - 1)
    return torch.where(mask, (total - others).flatten().unsqueeze(-1), 0.0)


def grpo(scores: Tensor, mask: Tensor, samples: int, scale: bool, epsilon: float = 1e-4) -> Tensor:
    """Return each response's score relative to the prompt's samples (GRPO; Shao 2024, §4.1.2).

    A_i = (r_i − mean_j r_j) / (std_j r_j + ε); without the division, which favours prompts whose
    samples score nearly alike, it is that of Dr. GRPO (Liu 2025). The standard deviation is over
    n − 1, as in trl. Every token of a response has the same advantage.

    Args:
        scores: r, (B,), without the KL penalty, which GRPO has in its loss.
        mask: True at response tokens, (B, R).
        samples: n ≥ 2, the successive rows that are samples of one prompt.
        scale: Whether to divide by the standard deviation.
        epsilon: ε: equal scores then give advantages of 0.

    Returns:
        A, (B, R); 0 off the mask.
    """
    groups = scores.unflatten(0, (-1, samples))
    advantages = groups - groups.mean(-1, keepdim=True)
    if scale:
        advantages = advantages / (groups.std(-1, keepdim=True) + epsilon)
    return torch.where(mask, advantages.flatten().unsqueeze(-1), 0.0)
