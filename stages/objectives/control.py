"""Controllers: how a coefficient follows what it is to hold, and how weights are averaged over steps."""

import torch
from torch import Tensor


def adaptive_kl_coef(kl_coef: float, kl: float, target: float, episodes: int, horizon: float) -> float:
    """The next kl_coef, from the KL of the update just sampled (Ziegler 2019, §2.2).

    e = clip(KL / target − 1, −0.2, 0.2);  kl_coef ← kl_coef · (1 + e · episodes / horizon). KL, target: nats a response
    over the whole batch; episodes: of this update; horizon: episodes over which an error of 1 would double it.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * episodes / horizon)


@torch.no_grad()
def update_average(average: dict[str, Tensor], tensors: dict[str, Tensor], decay: float) -> None:
    """average ← decay · average + (1 − decay) · tensors, in place.

    After n steps it is decayⁿ θ₀ + (1 − decay) Σ decayⁿ⁻ⁱ θᵢ, i = 1 … n.
    """
    for name, held in average.items():
        held.lerp_(tensors[name].to(held.dtype), 1.0 - decay)
