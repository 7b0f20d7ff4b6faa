"""Adapt what training is steered by: the KL coefficient, and a moving average of the weights."""

import torch
from torch import Tensor


def adaptive_kl_coef(kl_coef: float, kl: float, target: float, episodes: int, horizon: float) -> float:
    """Return the next kl_coef, given the KL of the latest update (Ziegler 2019, §2.2).

    e = clip(KL / target − 1, −0.2, 0.2);  kl_coef ← kl_coef · (1 + e · episodes / horizon).

    Args:
        kl_coef: The present coefficient, in reward per nat.
        kl: Mean KL over the whole batch, in nats per response.
        target: The KL to hold, in nats per response.
        episodes: Episodes of this update.
        horizon: Episodes over which an error of 1 would double the coefficient.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * episodes / horizon)


@torch.no_grad()
def update_average(average: dict[str, Tensor], tensors: dict[str, Tensor], decay: float) -> None:
    """Update a moving average in place: average ← decay · average + (1 − decay) · tensors.

    After n steps it is decayⁿ θ₀ + (1 − decay) Σ decayⁿ⁻ⁱ θᵢ, i = 1 … n.

    Args:
        average: The average by name; changed.
        tensors: The present weights by the same names.
        decay: Weight of the past, in [0, 1).
    """
    for name, mean in average.items():
        mean.lerp_(tensors[name].to(mean.dtype), 1.0 - decay)
