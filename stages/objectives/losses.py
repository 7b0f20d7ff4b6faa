"""Compute the losses of all stages: pure functions of tensors.

Each is a sum over its elements divided by `count`, their number in the whole (mini-)batch. Give the
same count to every micro-batch, and their gradients add up to the gradient of the whole.

Shapes: B responses (rows), R response tokens, N pairs, C choices, T tokens of a row, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.objectives.masked import masked_sum
from stages.objectives.pair_losses import PAIR_LOSSES, smoothed_logistic


def ranking_loss(
    scores: Tensor,
    winners: Tensor,
    losers: Tensor,
    weights: Tensor,
    count: float,
    margins: Tensor | float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the reward model's pairwise loss, (1/count) Σ_pairs w · ℓ(r_winner − r_loser − m).

    ℓ(d) = −(1−s) log σ(d) − s log σ(−d) with s = label_smoothing. With s = 0 and m = 0 this is
    InstructGPT's eq. 1; the margin m is Llama 2's eq. 2.

    Args:
        scores: r(x, y), (B,).
        winners: Rows of the preferred responses, (N,).
        losers: Rows of the others, (N,).
        weights: w = 1/C(K, 2) of each pair, (N,).
        count: Prompts in the whole batch.
        margins: Score difference that each pair should have at least, (N,) or one number.
        label_smoothing: Share of labels that are assumed to be flipped.

    Returns:
        A scalar; 0, with a gradient of 0, if there is no pair.
    """
    gaps = scores[winners] - scores[losers] - margins
    return (weights * smoothed_logistic(gaps, label_smoothing)).sum() / count


def plackett_luce_loss(
    utilities: Tensor, winners: Tensor, losers: Tensor, choice: Tensor, choice_weights: Tensor, count: float
) -> Tensor:
    """Return −log P(order) under the Plackett–Luce model (Rafailov 2023, eq. 18).

    An order is a sequence of choices, each of a winner out of itself and the responses below it:
    (1/count) Σ_choices w · −log( e^{u_winner} / (e^{u_winner} + Σ_losers e^u) ). With K = 2 this
    is the pairwise logistic loss. In an order with ties, each tied response is chosen out of itself
    and those ranked below it.

    Args:
        utilities: u, (B,): scores, or β log π/π_ref.
        winners: Rows of the chosen responses, one for each (choice, loser) pair, (N,).
        losers: Rows of the responses that they were preferred to, (N,).
        choice: Index of the choice that each pair belongs to, (N,); see GroupBatch.
        choice_weights: w = 1/(K − 1) of each choice, (C,).
        count: Prompts in the whole batch.
    """
    gaps = utilities[losers] - utilities[winners]
    nothing = gaps.new_zeros(len(choice_weights))
    # A log-sum-exp over each choice's losers. The winner's own exponent is 0, so the maximum is at
    # least 0. It is a constant: its gradient cancels.
    top = nothing.scatter_reduce(0, choice, gaps.detach(), "amax")
    others = nothing.index_add(0, choice, (gaps - top[choice]).exp())
    return (choice_weights * (top + ((-top).exp() + others).log())).sum() / count


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    cliprange: float,
    count: float,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return PPO's surrogate, Σ w max(−A ρ, −A clip(ρ, 1−ε, 1+ε)) / count (Schulman 2017, eq. 7).

    With w = π_old/μ, which is a constant, it is the surrogate of samples from π_old where another
    engine has drawn them from μ ("decoupled" PPO, Hilton 2022). A token of weight 0 still counts in
    `count`: dividing by the weights' sum instead would make the mean biased.

    Args:
        logprobs: log π of each response token, (B, R).
        old_logprobs: log π_old, of the policy before the update, (B, R); ρ = π/π_old.
        advantages: A, (B, R).
        mask: True at response tokens, (B, R).
        cliprange: ε.
        count: Response tokens in the whole minibatch.
        weights: w, (B, R); None: 1.

    Returns:
        The loss, and sums over the mask without a gradient: `ratio`, `clipped` (tokens at which the
        clipped term is the larger one) and `approxkl` (½ log²ρ, in nats).
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    with torch.no_grad():
        sums = {
            "ratio": masked_sum(ratio, mask),
            "clipped": masked_sum((clipped > unclipped).float(), mask),
            "approxkl": masked_sum(0.5 * log_ratio**2, mask),
        }
    losses = torch.maximum(unclipped, clipped)
    if weights is not None:
        losses = weights.detach() * losses
    return masked_sum(losses, mask) / count, sums


def kl_loss(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float, count: float) -> Tensor:
    """Return β Σ KL(π ‖ π_ref) / count, estimated at each token (Shao 2024, eq. 4).

    The estimate is k3, π_ref/π − log(π_ref/π) − 1. Its gradient on samples of π is on average that
    of KL(π_ref ‖ π), and is 0 where the two are equal; the gradient of k1 would always be 0.

    Args:
        logprobs: log π of each response token, (B, R).
        ref_logprobs: log π_ref, (B, R).
        mask: True at response tokens, (B, R).
        kl_coef: β.
        count: Response tokens in the whole minibatch.
    """
    log_ratio = torch.where(mask, ref_logprobs - logprobs, 0.0)
    return kl_coef * masked_sum(log_ratio.exp() - log_ratio - 1, mask) / count


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, cliprange_value: float, count: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the clipped value loss, ½ Σ max((V − G)², (clip(V, V_old ± ε) − G)²) / count.

    This is the value clipping of OpenAI Baselines' PPO2.

    Args:
        values: V before each response token, (B, R).
        old_values: V_old, of the value model when the policy sampled, (B, R).
        returns: G, (B, R).
        mask: True at response tokens, (B, R).
        cliprange_value: ε, in units of reward.
        count: Response tokens in the whole minibatch.

    Returns:
        The loss, and sums over the mask without a gradient: `clipped`.
    """
    # Off the mask anything may stand, NaN included, and max(NaN, 0) would pass it on.
    values, old_values, returns = (torch.where(mask, x, 0.0) for x in (values, old_values, returns))
    near = torch.minimum(torch.maximum(values, old_values - cliprange_value), old_values + cliprange_value)
    unclipped, clipped = (values - returns) ** 2, (near - returns) ** 2
    with torch.no_grad():
        sums = {"clipped": masked_sum((clipped > unclipped).float(), mask)}
    return 0.5 * masked_sum(torch.maximum(unclipped, clipped), mask) / count, sums


def language_model_loss(logits: Tensor, labels: Tensor, count: float | Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return −Σ log p(label) / count over the labels that are not −100.

    With smoothing ε it is −Σ ((1 − ε) log p(label) + ε/V Σ_v log p(v)) / count (Szegedy 2016).

    Args:
        logits: (B, T, V).
        labels: (B, T), shifted already: the label at t is what the logits at t predict.
        count: Labels in the whole batch.
        label_smoothing: ε.
    """
    counted = labels != -100
    scores = logits[counted].float()
    return F.cross_entropy(scores, labels[counted], reduction="sum", label_smoothing=label_smoothing) / count


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
    """Return DPO's loss over pairs of responses, Σ_pairs w · ℓ / count (Rafailov 2023, eq. 7).

    Args:
        logps: log π(y|x), (B,).
        ref_logps: log π_ref(y|x), (B,).
        winners: Rows of the preferred responses, (N,).
        losers: Rows of the others, (N,).
        weights: w = 1/C(K, 2) of each pair, (N,).
        beta: β.
        count: Prompts in the whole batch.
        loss_type: ℓ, a name in PAIR_LOSSES.
        label_smoothing: Share of labels that are assumed to be flipped.
    """
    if loss_type not in PAIR_LOSSES:
        raise ValueError(f"loss_type: {loss_type!r} is not a pair loss; use one of {', '.join(PAIR_LOSSES)}")
    ratios = logps - ref_logps
    losses = PAIR_LOSSES[loss_type](ratios[winners], ratios[losers], beta, label_smoothing)
    return (weights * losses).sum() / count


def kto_loss(
    ratios: Tensor,
    is_good: Tensor,
    kl: float,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
    count: float,
) -> Tensor:
    """Return KTO's loss, Σ w (1 − v) / count (Ethayarajh 2024, eq. 7).

    The value v of a good response is σ(β(r − z)), that of a bad one σ(β(z − r)), with
    r = log π(y|x)/π_ref(y|x). The reference point z is a constant: no gradient goes through it.

    Args:
        ratios: r of each judgement, (N,).
        is_good: Whether it is good, (N,).
        kl: z, the KL from the reference that is expected of any response, in nats; not below 0.
        beta: β.
        desirable_weight: w of good responses (the paper's λ_D).
        undesirable_weight: w of bad responses (λ_U).
        count: Judgements in the whole batch.
    """
    gains = beta * (ratios - kl)
    gains = torch.where(is_good, gains, -gains)
    weights = torch.full_like(gains, undesirable_weight).masked_fill(is_good, desirable_weight)
    return (weights * torch.sigmoid(-gains)).sum() / count  # 1 − σ(x) = σ(−x)


def chosen_loss(logps: Tensor, rows: Tensor, weights: Tensor, tokens: float) -> Tensor:
    """Return the cross-entropy per token of the responses ranked first, −Σ w · log π(y) / tokens.

    It is what `sft` in dpo.loss_type adds to DPO.

    Args:
        logps: log π(y|x), (B,).
        rows: Rows of the responses ranked first, (F,).
        weights: w of each, (F,).
        tokens: Σ w · length over the whole batch.
    """
    return -(weights * logps[rows]).sum() / tokens
