"""Compute the figures of a rollout, and find the episodes whose numbers are not finite."""

import torch
from torch import Tensor

from stages.objectives.masked import masked_mean
from stages.objectives.rewards import kl_per_token
from stages.rollouts.rollout import Rollout
from stages.training.readings import read_all

# figures of an update that is skipped because a number is not finite: they are logged as NaN
OF_UPDATE = ("policy/approxkl_avg", "policy/clipfrac_avg", "loss/policy_avg", "val/ratio", "grad_norm/ppo")
OF_VALUES = ("loss/value_avg", "val/clipfrac_avg", "grad_norm/value")  # and these with a value model
OF_KL = ("loss/kl",)  # and this where KL is in the loss
OF_PARTS = "rewards/"  # with the name of a scorer: its mean score, before weights and rules
DROPPED = "val/dropped_scorers"  # where a scorer may be dropped: how many were
ORDER = (
    "objective/kl",
    "objective/kl_k3",
    "objective/entropy",
    "objective/scores",
    "objective/rlhf_reward",
    "objective/length",
    "objective/eos_rate",
    "val/engine_kl",
    "val/explained_variance",
)
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
    on_device = {
        "objective/kl": _kl_per_response(rollout, "k1").mean(),
        "objective/kl_k3": _kl_per_response(rollout, "k3").mean(),
        "objective/entropy": masked_mean(rollout.entropy, mask),
        "objective/scores": rollout.scores.mean(),
        "objective/length": mask.sum(-1).float().mean(),
        "objective/eos_rate": rollout.finished.float().mean(),
        **explained_variance(rollout, returns),
        **{f"{OF_PARTS}{name}": x.nanmean() for name, x in rollout.parts.items()},
    }
    found = dict(zip(on_device, read_all(list(on_device.values())), strict=True))
    kl = found["objective/kl_k3" if kl_estimator == "k3" else "objective/kl"]
    found["objective/rlhf_reward"] = found["objective/scores"] - kl_coef * kl
    found["val/engine_kl"] = rollout.engine_kl
    if rollout.dropped is not None:
        found[DROPPED] = len(rollout.dropped)
    return {name: found[name] for name in sorted(found, key=_place)}


def _place(name: str) -> int:
    """Return where a figure stands in a line of metrics.jsonl."""
    return ORDER.index(name) if name in ORDER else len(ORDER)  # those of parts, and of what was dropped


def explained_variance(rollout: Rollout, returns: Tensor | None) -> dict[str, Tensor]:
    """Return which share of the returns' variance the values explain; {} without returns."""
    if returns is None:
        return {}
    mask = rollout.mask
    residual = returns - rollout.values
    residual_variance = masked_mean((residual - masked_mean(residual, mask)) ** 2, mask)
    variance = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
    return {"val/explained_variance": 1 - residual_variance / variance.clamp(min=1e-12)}


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
    tensors["advantages"] = advantages
    # name → (B,) True for an episode with a number that is not finite
    are_bad = {name: ~x.isfinite().reshape(len(x), -1).all(-1) for name, x in tensors.items()}
    counts = read_all([is_bad.sum() for is_bad in are_bad.values()])
    bad = {name: is_bad for (name, is_bad), count in zip(are_bad.items(), counts, strict=True) if count}
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
