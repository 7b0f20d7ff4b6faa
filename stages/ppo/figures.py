"""Compute the figures of a rollout, and find the episodes whose numbers are not finite."""

import torch
from torch import Tensor

from stages.objectives.masked import masked_mean
from stages.objectives.rewards import kl_per_token
from stages.rollouts.rollout import Rollout

# figures of an update that is skipped because a number is not finite: they are logged as NaN
OF_UPDATE = ("policy/approxkl_avg", "policy/clipfrac_avg", "loss/policy_avg", "val/ratio", "grad_norm/ppo")
OF_VALUES = ("loss/value_avg", "val/clipfrac_avg", "grad_norm/value")  # and these with a value model
OF_KL = ("loss/kl",)  # and this where KL is in the loss
OF_PARTS = "rewards/"  # with the name of a scorer: its mean score, before weights and rules
DROPPED = "val/dropped_scorers"  # where a scorer may be dropped: how many were
OF_PTX = ("loss/ptx", "grad_norm/ptx", "grad_cosine")  # and these if there is a pretraining gradient


def describe(rollout: Rollout, returns: Tensor | None, kl_coef: float, kl_estimator: str) -> dict[str, float]:
    """Return the figures of a rollout under their usual names.

    Args:
        rollout: B episodes.
        returns: (B, R) targets of the values; None without a value model.
        kl_coef: β of this update.
        kl_estimator: Which estimate of KL is penalised, k1 or k3.
    """
    mask = rollout.mask
    kl = _kl_per_response(rollout, "k1").mean().item()
    k3 = _kl_per_response(rollout, "k3").mean().item()
    scores = rollout.scores.mean().item()
    parts = {f"{OF_PARTS}{name}": x.nanmean().item() for name, x in rollout.parts.items()}
    if rollout.dropped is not None:
        parts[DROPPED] = len(rollout.dropped)
    return {
        "objective/kl": kl,
        "objective/kl_k3": k3,
        "objective/entropy": masked_mean(rollout.entropy, mask).item(),
        "objective/scores": scores,
        "objective/rlhf_reward": scores - kl_coef * (k3 if kl_estimator == "k3" else kl),
        "objective/length": mask.sum(-1).float().mean().item(),
        "objective/eos_rate": rollout.finished.float().mean().item(),
        "val/engine_kl": rollout.engine_kl,
        **explained_variance(rollout, returns),
        **parts,
    }


def explained_variance(rollout: Rollout, returns: Tensor | None) -> dict[str, float]:
    """Return which share of the returns' variance the values explain; {} without returns."""
    if returns is None:
        return {}
    mask = rollout.mask
    residual = returns - rollout.values
    residual_variance = masked_mean((residual - masked_mean(residual, mask)) ** 2, mask)
    variance = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
    return {"val/explained_variance": (1 - residual_variance / variance.clamp(min=1e-12)).item()}


def _kl_per_response(rollout: Rollout, estimator: str) -> Tensor:
    """Return KL(policy ‖ reference) of each response (B,), in nats."""
    kl = kl_per_token(rollout.logprobs, rollout.ref_logprobs, estimator)
    return torch.where(rollout.mask, kl, 0.0).sum(-1)


def not_finite_episodes(rollout: Rollout, advantages: Tensor, step: int) -> str | None:
    """Describe which numbers of an update are not finite, and on which prompts; None if none.

    Args:
        rollout: B episodes.
        advantages: (B, R).
        step: Index of the update, for the message.
    """
    tensors = {name: getattr(rollout, name) for name in ("logprobs", "ref_logprobs", "values", "scores")}
    bad: dict[str, Tensor] = {}  # name → (B,) True for an episode with a number that is not finite
    for name, x in (tensors | {"advantages": advantages}).items():
        is_bad = ~x.isfinite().reshape(len(x), -1).all(-1)
        if is_bad.any():
            bad[name] = is_bad
    if not bad:
        return None
    if len(bad) > 1:
        # advantages follow from the others, and whitening spreads one bad number over the batch
        bad.pop("advantages", None)
    episodes = torch.stack(list(bad.values())).any(0).nonzero().flatten().tolist()
    prompts = sorted({rollout.prompt_ids[i] for i in episodes})
    shown = ", ".join(map(str, prompts[:5]))
    if len(prompts) > 5:
        shown += ", …"
    return f"update {step}: {' and '.join(bad)} not finite on prompts {shown}"
