"""The losses. Each is a sum over its elements divided by `count`, the number in the whole (mini-)batch: hand the
same count to every micro-batch and their gradients add up to the gradient of the whole."""

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.objectives.masked import masked_sum


def ranking_loss(
    scores: Tensor,
    winners: Tensor,
    losers: Tensor,
    weights: Tensor,
    count: float,
    margins: Tensor | float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """InstructGPT eq. 1: (1/count) Σ_pairs w · ℓ(r_winner − r_loser − m), w = 1/C(K,2), count = prompts.

    ℓ(d) = −(1−s) log σ(d) − s log σ(−d), s = label_smoothing: the share of labels taken to be flipped. m: margins
    (Llama 2, eq. 2). scores (B,); winners, losers (N,) rows; weights, margins (N,). 0 (with a gradient of 0) where
    there is no pair.
    """
    gaps = scores[winners] - scores[losers] - margins
    return (weights * smoothed_logistic(gaps, label_smoothing)).sum() / count


def smoothed_logistic(gaps: Tensor, label_smoothing: float) -> Tensor:
    """−(1−s) log σ(d) − s log σ(−d)."""
    if label_smoothing == 0.0:
        return -F.logsigmoid(gaps)
    return -(1 - label_smoothing) * F.logsigmoid(gaps) - label_smoothing * F.logsigmoid(-gaps)


def plackett_luce_loss(
    utilities: Tensor, winners: Tensor, losers: Tensor, choice: Tensor, choice_weights: Tensor, count: float
) -> Tensor:
    """−log P(order) under Plackett–Luce (Rafailov 2023, eq. 18): (1/count) Σ_choices w · −log( e^{u_winner} /
    (e^{u_winner} + Σ_losers e^u) ), w = 1/(K − 1): with K = 2 it is the pairwise logistic loss.

    utilities (B,): scores, or β log π/π_ref; winners, losers, choice (N,), choice_weights (C,): see GroupBatch. Of an
    order with ties, each tied response is chosen out of itself and those ranked below it.
    """
    gaps = utilities[losers] - utilities[winners]
    nothing = gaps.new_zeros(len(choice_weights))
    top = nothing.scatter_reduce(0, choice, gaps.detach(), "amax")  # at least 0, the winner's own exponent
    others = nothing.index_add(0, choice, (gaps - top[choice]).exp())
    return (choice_weights * (top + ((-top).exp() + others).log())).sum() / count


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, cliprange: float, count: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate (Schulman 2017, eq. 7): Σ max(−A ρ, −A clip(ρ, 1−ε, 1+ε)) / count, ρ = π/π_old.

    All (B, R); count = response tokens of the minibatch. → (loss, sums over the mask: ratio, clipped, approxkl).
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    with torch.no_grad():
        sums = {
            "ratio": masked_sum(ratio, mask),
            "clipped": masked_sum((clipped > plain).float(), mask),
            "approxkl": masked_sum(0.5 * log_ratio**2, mask),
        }
    return masked_sum(torch.maximum(plain, clipped), mask) / count, sums


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, cliprange_value: float, count: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """½ Σ max((V − G)², (clip(V, V_old ± ε) − G)²) / count, all (B, R) (PPO2's value clipping)."""
    values, old_values, returns = (torch.where(mask, x, 0.0) for x in (values, old_values, returns))
    near = torch.minimum(torch.maximum(values, old_values - cliprange_value), old_values + cliprange_value)
    plain, clipped = (values - returns) ** 2, (near - returns) ** 2
    with torch.no_grad():
        sums = {"clipped": masked_sum((clipped > plain).float(), mask)}
    return 0.5 * masked_sum(torch.maximum(plain, clipped), mask) / count, sums


def language_model_loss(logits: Tensor, labels: Tensor, count: float) -> Tensor:
    """−Σ log p(label) / count over labels ≠ −100: logits (B, T, V), labels (B, T) already shifted."""
    counted = labels != -100
    return F.cross_entropy(logits[counted].float(), labels[counted], reduction="sum") / count


def dpo_loss(
    logps: Tensor,
    ref_logps: Tensor,
    winners: Tensor,
    losers: Tensor,
    weights: Tensor,
    beta: float,
    count: float,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> Tensor:
    """DPO over pairs of rows (Rafailov 2023, eq. 7): Σ w · ℓ(h) / count, h = log-ratio margin of winner over loser.

    logps, ref_logps (B,); winners, losers, weights (N,) with w = 1/C(K,2); count = prompts.
    sigmoid: −(1−s) log σ(βh) − s log σ(−βh), s = label_smoothing (conservative DPO, Mitchell 2023);
    robust: (−(1−s) log σ(βh) + s log σ(−βh)) / (1 − 2s), unbiased if s of the labels are flipped (Chowdhury 2024,
    eq. 9); ipo: (h − 1/(2β))² (Azar 2023, eq. 17); hinge: max(0, 1 − βh) (SLiC, Zhao 2023).
    """
    ratios, s = logps - ref_logps, label_smoothing
    h = ratios[winners] - ratios[losers]
    if loss_type == "sigmoid":
        losses = smoothed_logistic(beta * h, s)
    elif loss_type == "robust":
        losses = (-(1 - s) * F.logsigmoid(beta * h) + s * F.logsigmoid(-beta * h)) / (1 - 2 * s)
    elif loss_type == "ipo":
        losses = (h - 1 / (2 * beta)) ** 2
    elif loss_type == "hinge":
        losses = torch.relu(1 - beta * h)
    else:
        raise ValueError(f"loss_type is {loss_type!r}; it can be sigmoid, robust, ipo or hinge")
    return (weights * losses).sum() / count


def chosen_loss(logps: Tensor, rows: Tensor, weights: Tensor, tokens: float) -> Tensor:
    """Cross-entropy a token of the responses that were put first, −Σ w · log π(y) / tokens: what `sft` adds to DPO.

    logps (B,); rows, weights (F,); tokens: Σ w · length over the whole batch.
    """
    return -(weights * logps[rows]).sum() / tokens
