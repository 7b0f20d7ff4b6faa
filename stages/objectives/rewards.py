"""Turn scores into rewards per token (InstructGPT, eq. 2).

R(x, y) = r(x, y) − β log(π(y|x) / π_ref(y|x))
"""

import torch
from torch import Tensor


def kl_per_token(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k1") -> Tensor:
    """Estimate KL(π ‖ π_ref) at each sampled token, in nats.

    Source: Schulman 2020, "Approximating KL divergence".

    Args:
        logprobs: log π of the sampled tokens, (B, R).
        ref_logprobs: log π_ref of the same, (B, R).
        estimator: "k1" is log π − log π_ref: unbiased, can be negative. "k3" is (ρ − 1) − log ρ
            with ρ = π_ref/π: unbiased, never negative, less variance. As a reward k3 is biased,
            so k1 is the default.

    Returns:
        The estimates, (B, R).
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
    """Return the reward at the end of each episode: clipped, replaced if cut off, less length.

    Args:
        scores: Of the reward model, (B,).
        finished: True where the response ends with EOS, (B,).
        missing_eos_score: What an unfinished response gets in place of its score; None: its own.
        lengths: Response tokens, (B,); needed for a length penalty only.
        score_clip: Clip scores to ± this; None: do not.
        length_penalty: Reward subtracted per response token.
    """
    if score_clip is not None:
        scores = scores.clamp(-score_clip, score_clip)
    if missing_eos_score is not None:
        scores = torch.where(finished, scores, torch.full_like(scores, missing_eos_score))
    if length_penalty:
        assert lengths is not None
        scores = scores - length_penalty * lengths
    return scores


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Return −kl_coef · KL at each response token, plus the score at the last one.

    Args:
        scores: (B,).
        kl: Per token, in nats, (B, R).
        mask: True at response tokens, (B, R); every row has at least one.
        kl_coef: β, in reward per nat.

    Returns:
        Rewards, (B, R); 0 off the mask.
    """
    rewards = torch.where(mask, -kl_coef * kl, 0.0)
    last = mask.sum(-1) - 1
    rows = torch.arange(len(scores), device=scores.device)
    return rewards.index_put((rows, last), scores, accumulate=True)
