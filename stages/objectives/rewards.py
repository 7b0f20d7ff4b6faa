"""From scores to per-token rewards: R(x, y) = r(x, y) − β log(π(y|x) / π_ref(y|x)) (InstructGPT, eq. 2)."""

import torch
from torch import Tensor


def kl_per_token(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k1") -> Tensor:
    """KL(π ‖ π_ref) estimated at each sampled token, (B, R), in nats (Schulman 2020, "Approximating KL divergence").

    k1 = log π − log π_ref: unbiased, can be negative. k3 = (ρ − 1) − log ρ with ρ = π_ref/π: unbiased, never
    negative, less variance; as a reward it is biased, so k1 is the default.
    """
    diff = logprobs - ref_logprobs
    if estimator == "k1":
        return diff
    if estimator == "k3":
        return torch.expm1(-diff) + diff
    raise ValueError(f"kl_estimator is {estimator!r}; it can be k1 or k3")


def final_scores(
    scores: Tensor,
    finished: Tensor,
    missing_eos_score: float | None,
    *,
    lengths: Tensor | None = None,
    score_clip: float | None = None,
    length_penalty: float = 0.0,
) -> Tensor:
    """What an episode is paid at its end, (B,): scores clipped to ±score_clip; then those of unfinished responses (no
    EOS) replaced by a fixed one, if one is given; then length_penalty · lengths (B,) subtracted."""
    if score_clip is not None:
        scores = scores.clamp(-score_clip, score_clip)
    if missing_eos_score is not None:
        scores = torch.where(finished, scores, torch.full_like(scores, missing_eos_score))
    return scores - length_penalty * lengths if length_penalty else scores


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """rewards (B, R) = −kl_coef · kl a token, and the score (B,) once, at the last response token. 0 off the mask."""
    rewards = torch.where(mask, -kl_coef * kl, 0.0)
    last = mask.sum(-1) - 1
    rows = torch.arange(len(scores), device=scores.device)
    return rewards.index_put((rows, last), scores, accumulate=True)
