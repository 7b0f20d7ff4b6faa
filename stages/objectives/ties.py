"""Define losses that count ties: Davidson's of pairs, Davidson–Luce of whole rankings.

In both, several responses are as likely to share a rank as the geometric mean of their worths e^u
is large, times a parameter δ that says how readily labelers call a tie. Of two responses of equal
utility, δ/(2 + δ) are tied. Without ties in the data δ falls to 0, and what remains is the logistic
loss of pairs, or Plackett–Luce. Shape letters: B responses, P pairs, C choices, K the most
responses of a choice, D the most responses of a tie.
"""

import torch
from torch import Tensor

NOTHING = -1e30
"""Stands for log 0: finite, so that no gradient is NaN."""


def davidson_logprobs(gaps: Tensor, log_strength: Tensor) -> tuple[Tensor, Tensor]:
    """Return log P(first is better) and log P(tie) of pairs (Davidson 1970).

    P(first) = e^{u₁} / (e^{u₁} + e^{u₂} + ν e^{(u₁+u₂)/2}); of a tie it is the last term's share.
    Chen 2024 calls this DPO-D and writes 2ν for our ν.

    Args:
        gaps: u₁ − u₂, (P,).
        log_strength: log ν, a scalar.

    Returns:
        Both, (P,).
    """
    half = gaps / 2
    total = torch.logaddexp(torch.logaddexp(half, -half), log_strength.to(half.dtype))
    return half - total, log_strength - total


def davidson_loss(
    utilities: Tensor, first: Tensor, second: Tensor, tied: Tensor, weights: Tensor, log_strength: Tensor, count: float
) -> Tensor:
    """Return −Σ_pairs w · log P(what was said of the pair) / count under Davidson's model.

    Args:
        utilities: u, (B,): scores, or β log π/π_ref.
        first: Rows of the preferred responses, or of either response of a tie, (P,).
        second: Rows of the others, (P,).
        tied: True at ties, (P,).
        weights: w = 1/C(K, 2) of each pair, (P,).
        log_strength: log ν, a scalar.
        count: Prompts in the whole batch.
    """
    better, tie = davidson_logprobs(utilities[first] - utilities[second], log_strength)
    return -(weights * torch.where(tied, tie, better)).sum() / count


def log_symmetric_sums(logs: Tensor, size: int) -> Tensor:
    """Return log Σ_S Π_{i∈S} e^{x_i} over all sets S of `size` items, (C,).

    It is the elementary symmetric polynomial of e^x, by the recurrence over items.

    Args:
        logs: x, (C, K); NOTHING where there is no item.
        size: Items of a set, 1 … K.
    """
    choices = len(logs)
    sums = torch.cat([logs.new_zeros(choices, 1), logs.new_full((choices, size), NOTHING)], dim=1)
    for item in logs.unbind(1):
        longer = torch.logaddexp(sums[:, 1:], sums[:, :-1] + item.unsqueeze(1))
        sums = torch.cat([sums[:, :1], longer], dim=1)
    return sums[:, size]


def davidson_luce_logprobs(
    utilities: Tensor, alternatives: Tensor, is_open: Tensor, chosen: Tensor, log_strengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each choice, and that of choosing a single response, (C,) each.

    P(T out of A) = f(T) / Σ_S f(S) over all sets S of 1 … D of the alternatives A, with
    f(S) = δ_{|S|} (Π_{i∈S} e^{u_i})^{1/|S|} and δ₁ = 1 (Firth, Kosmidis and Turner 2019, eq. 1).

    Args:
        utilities: u, (B,).
        alternatives: Rows of the responses that each choice is made from, (C, K).
        is_open: True where there is an alternative, (C, K).
        chosen: True at the responses that were chosen, (C, K); D of them at most.
        log_strengths: log δ₂ … log δ_D, (D − 1,).
    """
    u = utilities[alternatives]
    of_size = torch.cat([u.new_zeros(1), log_strengths.to(u.dtype)])
    totals = []
    for size, log_strength in enumerate(of_size[: u.shape[1]], start=1):
        worths = torch.where(is_open, u / size, NOTHING)
        totals.append(log_strength + log_symmetric_sums(worths, size))
    total = torch.stack(totals).logsumexp(0)
    sizes = chosen.sum(1)
    mean = torch.where(chosen, u, 0.0).sum(1) / sizes
    return of_size[sizes - 1] + mean - total, totals[0] - total


def davidson_luce_loss(
    utilities: Tensor,
    alternatives: Tensor,
    is_open: Tensor,
    chosen: Tensor,
    weights: Tensor,
    log_strengths: Tensor,
    count: float,
) -> Tensor:
    """Return −Σ_choices w · log P(choice) / count under the Davidson–Luce model.

    A ranking is a sequence of choices, each of all responses of one rank out of them and those
    below. With weights of 1 it is −log P(ranking).

    Args:
        utilities: u, (B,): scores, or β log π/π_ref.
        alternatives: As of `davidson_luce_logprobs`.
        is_open: As there.
        chosen: As there.
        weights: w = 1/(K − 1) of each choice, (C,).
        log_strengths: log δ₂ … log δ_D, (D − 1,).
        count: Prompts in the whole batch.
    """
    logprobs, _ = davidson_luce_logprobs(utilities, alternatives, is_open, chosen, log_strengths)
    return -(weights * logprobs).sum() / count
