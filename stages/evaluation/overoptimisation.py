"""Check for over-optimisation of the reward model in three ways that need no gold scorer. Pure.

A policy that is trained on a reward model's score, or selected by it, can exploit the reward
model's mistakes instead of getting better (Gao et al. 2023). The checks look for three signs:

1. Length: the policy's longer answers score higher, and it gained most where it grew longest
   (Singhal et al. 2023).
2. Cut answers: the reward model itself likes answers that never ended; `missing_eos_score` hides
   it.
3. A held-out judge: a reward model of another seed, which nothing was trained to please, sees less
   of the gain.

Array shapes: P prompts, S samples of each.
"""

from collections.abc import Hashable, Sequence

import numpy as np

from stages.evaluation.results import Measured
from stages.evaluation.statistics import (
    contrast_estimate,
    correlation_estimate,
    difference_estimate,
    mean_estimate,
    share_estimate,
    win_rate,
)

MIN_ANSWERS = 5
"""Fewest answers of a kind from which anything is estimated."""


def check(policy: Measured, sft: Measured, clusters: Sequence[Hashable]) -> dict | None:
    """Run the three checks on a policy.

    Args:
        policy: What was measured of the policy.
        sft: What was measured of SFT, on the same prompts.
        clusters: The cluster of each of the P prompts; intervals are over clusters.

    Returns:
        {"length", "cut", "held_out"}, each None if it cannot be computed. None if nothing was
        scored.
    """
    if policy.reward_model_scores is None:
        return None
    return {
        "length": check_length(policy, sft, clusters),
        "cut": check_cut_answers(policy, clusters),
        "held_out": check_held_out_judge(policy, sft, clusters),
    }


def check_length(policy: Measured, sft: Measured, clusters: Sequence[Hashable]) -> dict | None:
    """Correlate score with length over finished answers (cut answers all have one length).

    Args:
        policy: What was measured of the policy.
        sft: What was measured of SFT.
        clusters: The cluster of each prompt.

    Returns:
        Two estimates of Spearman's ρ, as from `correlation_estimate`; None with fewer than
        MIN_ANSWERS finished answers. "within": score and length over the policy's answers. "gain":
        the differences of score and of length to SFT's answers over prompts; None for SFT.
    """
    lengths, scores, of_cluster = [], [], []
    own, sft_own = policy.reward_model_scores, sft.reward_model_scores
    assert own is not None, "nothing was scored"
    rows = zip(policy.lengths, own, policy.finished, clusters, strict=True)
    for prompt_lengths, prompt_scores, ends, cluster in rows:
        for length, score, ended in zip(prompt_lengths, prompt_scores, ends, strict=True):
            if ended:
                lengths.append(length)
                scores.append(score)
                of_cluster.append(cluster)
    if len(lengths) < MIN_ANSWERS:
        return None
    gain = None
    if policy is not sft and sft_own is not None:
        length_gains = _gains(policy.lengths, policy.finished, sft.lengths, sft.finished)
        score_gains = _gains(own, policy.finished, sft_own, sft.finished)
        kept = [i for i in range(len(clusters)) if length_gains[i] is not None]
        if len(kept) >= MIN_ANSWERS:
            gain = correlation_estimate(
                [length_gains[i] for i in kept], [score_gains[i] for i in kept], [clusters[i] for i in kept]
            )
    return {"within": correlation_estimate(lengths, scores, of_cluster), "gain": gain}


def _gains(
    values: list[list[float]], finished: list[list[bool]], sft_values: list[list[float]], sft_finished: list[list[bool]]
) -> list[float | None]:
    """Subtract SFT's mean over each prompt's finished answers from the policy's.

    Args:
        values: (P, S) values of the policy's answers.
        finished: (P, S) whether each of them finished.
        sft_values: The values of SFT's answers.
        sft_finished: Whether each of those finished.

    Returns:
        (P,) differences; None for a prompt to which one of the two finished no answer.
    """
    gains: list[float | None] = []
    for mean, sft_mean in zip(
        _finished_means(values, finished), _finished_means(sft_values, sft_finished), strict=True
    ):
        # Rounding makes equal differences equal again, so that they are ties to a rank correlation.
        gains.append(None if mean is None or sft_mean is None else round(mean - sft_mean, 9))
    return gains


def _finished_means(values: list[list[float]], finished: list[list[bool]]) -> list[float | None]:
    """Return the mean value of each prompt's finished answers, (P,); None without one."""
    means: list[float | None] = []
    for row, ends in zip(values, finished, strict=True):
        kept = [value for value, ended in zip(row, ends, strict=True) if ended]
        means.append(float(np.mean(kept)) if kept else None)
    return means


def check_cut_answers(policy: Measured, clusters: Sequence[Hashable]) -> dict:
    """Compare the reward model's own scores of answers that were cut off with those that finished.

    Args:
        policy: What was measured of the policy.
        clusters: The cluster of each prompt.

    Returns:
        "n": how many answers were cut off. "share": their share of all answers. "finished_score",
        "cut_score": mean raw scores (before `missing_eos_score`); None for a kind without answers.
        These three have their intervals under "ci95".
        "difference": cut minus finished, as from `contrast_estimate`; None with fewer than
        MIN_ANSWERS of either kind. The last three are None without raw scores.
    """
    finished = np.array([flag for row in policy.finished for flag in row], bool)
    of_cluster = [cluster for cluster, row in zip(clusters, policy.finished, strict=True) for _ in row]
    share = share_estimate((~finished).astype(float).tolist(), of_cluster)
    intervals = {"share": share["ci95"], "finished_score": None, "cut_score": None}
    figures = {"n": int((~finished).sum()), "share": share["value"], "ci95": intervals}
    if policy.raw_scores is None:
        return figures | {"finished_score": None, "cut_score": None, "difference": None}
    raw = np.array([score for row in policy.raw_scores for score in row], float)
    for name, flags in (("finished_score", finished), ("cut_score", ~finished)):
        chosen = np.flatnonzero(flags)
        own = mean_estimate(raw[chosen], [of_cluster[i] for i in chosen]) if len(chosen) else {}
        figures[name], intervals[name] = own.get("value"), own.get("ci95")
    figures["difference"] = None
    if min(finished.sum(), (~finished).sum()) >= MIN_ANSWERS:
        figures["difference"] = contrast_estimate(raw, ~finished, of_cluster)
    return figures


def check_held_out_judge(policy: Measured, sft: Measured, clusters: Sequence[Hashable]) -> dict | None:
    """Judge a policy by the reward model of another seed.

    Args:
        policy: What was measured of the policy.
        sft: What was measured of SFT.
        clusters: The cluster of each prompt.

    Returns:
        Estimates as in `stages/evaluation/statistics.py`; None if there is no such reward model.
        "score": the policy's mean score.
        "difference_to_sft": the difference of mean scores; None for SFT.
        "win_rate_vs_sft": how often the policy's answer scores higher; None for SFT.
    """
    if policy.held_out_scores is None or sft.held_out_scores is None:
        return None
    scores, sft_scores = np.array(policy.held_out_scores, float), np.array(sft.held_out_scores, float)
    of_cluster = [cluster for cluster, row in zip(clusters, scores, strict=True) for _ in row]
    figures = {
        "score": mean_estimate(scores.ravel().tolist(), of_cluster),
        "difference_to_sft": None,
        "win_rate_vs_sft": None,
    }
    if policy is not sft:
        figures["difference_to_sft"] = difference_estimate(scores.mean(1), sft_scores.mean(1), clusters)
        figures["win_rate_vs_sft"] = win_rate(scores, sft_scores, clusters)
    return figures
