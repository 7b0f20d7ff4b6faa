"""Weigh samples that were drawn from another distribution than the policy's: importance sampling.

An engine draws y from μ, the policy that learns from it is π_old. Under μ the mean of w · f(y) with
w = π_old(y)/μ(y) is the mean of f under π_old, so a gradient that is weighed so is the policy's own
again. Truncated weights (Ionides 2008; V-trace's ρ̄, Espeholt 2018, eq. 1) bound its variance and
make it biased towards μ; masked ones leave such samples out (Liu 2025, "When speed kills
stability"). For engines like vLLM: Yao 2025, "Your efficient RL framework secretly brings you
off-policy RL training".
"""

import torch
from torch import Tensor

from stages.objectives.masked import masked_mean


@torch.no_grad()
def importance_weights(
    logprobs: Tensor,
    sampler_logprobs: Tensor,
    mask: Tensor,
    level: str,
    *,
    clip_max: float,
    clip_min: float | None = None,
    outliers: str = "truncate",
) -> tuple[Tensor, Tensor]:
    """Return the weight of each response token, and which weights were out of bounds.

    token:     w_t = π_old(y_t | x, y_<t) / μ(y_t | x, y_<t)
    sequence:  w_t = Π_s π_old(y_s | x, y_<s) / μ(y_s | x, y_<s), the same at each token

    Sequence weights that are not out of bounds make the gradient of a whole response's reward
    unbiased. Token weights leave what came before a token, and what followed, as μ drew it: biased
    in responses of several tokens, with a variance that does not grow with their length.

    Args:
        logprobs: log π_old, (B, R).
        sampler_logprobs: log μ of the distribution that the tokens were drawn from, (B, R).
        mask: True at response tokens, (B, R).
        level: "token" or "sequence".
        clip_max: The largest weight.
        clip_min: The smallest weight; None: 0.
        outliers: What becomes of a weight beyond these: "truncate" (it becomes the bound) or "mask"
            (it becomes 0).

    Returns:
        Weights (B, R), 0 off the mask, and True (B, R) where a weight was out of bounds.
    """
    log_ratio = torch.where(mask, logprobs - sampler_logprobs, 0.0)
    if level == "sequence":
        log_ratio = log_ratio.sum(-1, keepdim=True).expand_as(log_ratio)
    ratio = log_ratio.exp()
    least = 0.0 if clip_min is None else clip_min
    is_outlier = mask & ((ratio > clip_max) | (ratio < least))
    bounded = ratio.clamp(least, clip_max)
    weights = torch.where(is_outlier, 0.0, bounded) if outliers == "mask" else bounded
    return torch.where(mask, weights, 0.0), is_outlier


def importance_figures(weights: Tensor, is_outlier: Tensor, mask: Tensor, level: str) -> dict[str, float]:
    """Return figures of the weights of a rollout, under trl's names where it has them.

    Args:
        weights: (B, R) after truncation or masking.
        is_outlier: (B, R).
        mask: (B, R).
        level: "token" or "sequence": what is counted.
    """
    if level == "sequence":  # each response once, however long it is
        weights, is_outlier, mask = weights[:, :1], is_outlier[:, :1], mask[:, :1]
    infinity = float("inf")
    figures = {
        "sampling/importance_sampling_ratio/mean": masked_mean(weights, mask),
        "sampling/importance_sampling_ratio/min": torch.where(mask, weights, infinity).min(),
        "sampling/importance_sampling_ratio/max": torch.where(mask, weights, -infinity).max(),
        "sampling/importance_sampling_outliers": masked_mean(is_outlier.float(), mask),
    }
    return dict(zip(figures, torch.stack(list(figures.values())).tolist(), strict=True))
