"""Is the score still worth what it was? Three checks that need no gold scorer: pure, from what `evaluate` measured.

A policy that is trained on a reward model's score, or selected by it, may climb the model's mistakes in place of what
the score stands for (Gao et al. 2023). The signs that are looked for:

1. Length: whether a policy's longer answers are the ones that score higher, and gained most over SFT (Singhal 2023).
2. Cut answers: what the reward model itself would give to answers that never ended; `missing_eos_score` hides it.
3. A held-out judge: how much of the gain a reward model of another seed sees, which nothing was trained to please.

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
    win_rate,
)

LEAST = 5
"""Answers of each kind below which nothing is said of them."""


def check(own: Measured, sft: Measured, clusters: Sequence[Hashable]) -> dict | None:
    """Run the three checks on a policy.

    Args:
        own: What was measured of the policy.
        sft: The same of SFT, on the same prompts.
        clusters: The cluster of each of the P prompts; intervals are over clusters.

    Returns:
        {"length", "cut", "held_out"}; each None where it cannot be computed. None where nothing was scored.
    """
    if own.scores is None:
        return None
    return {"length": length(own, sft, clusters), "cut": cut(own, clusters), "held_out": held_out(own, sft, clusters)}


def length(own: Measured, sft: Measured, clusters: Sequence[Hashable]) -> dict | None:
    """Correlate score with length, over the answers that ended (the others have all one length).

    Args:
        own: What was measured of the policy.
        sft: The same of SFT.
        clusters: The cluster of each prompt.

    Returns:
        {"within": Spearman's ρ of score and length over the policy's answers, "gain": the same of how much higher and
        how much longer its answers are than SFT's, prompt by prompt}, as `correlation_estimate`; "gain" is None for
        SFT itself. None where fewer than LEAST answers ended.
    """
    rows = [
        (size, score, cluster)
        for sizes, scores, ends, cluster in zip(own.lengths, own.scores, own.finished, clusters, strict=True)
        for size, score, ended in zip(sizes, scores, ends, strict=True)
        if ended
    ]
    if len(rows) < LEAST:
        return None
    found = {"within": correlation_estimate(*zip(*rows, strict=True)), "gain": None}
    if own is not sft and sft.scores is not None:
        longer, better = (_gaps(own, sft, values) for values in ("lengths", "scores"))
        kept = [i for i in range(len(clusters)) if longer[i] is not None]
        if len(kept) >= LEAST:
            parts = [[values[i] for i in kept] for values in (longer, better, list(clusters))]
            found["gain"] = correlation_estimate(*parts)
    return found


def _gaps(own: Measured, sft: Measured, name: str) -> list[float | None]:
    """Return how much higher the mean of a quantity is over a prompt's answers that ended than over SFT's, (P,); None
    for a prompt to which one of the two ended no answer."""

    def means(measured: Measured) -> list[float | None]:
        rows = zip(getattr(measured, name), measured.finished, strict=True)
        kept = [[x for x, ended in zip(values, ends, strict=True) if ended] for values, ends in rows]
        return [float(np.mean(some)) if some else None for some in kept]

    pairs = zip(means(own), means(sft), strict=True)
    return [None if a is None or b is None else round(a - b, 9) for a, b in pairs]  # ranks see no rounding errors


def cut(own: Measured, clusters: Sequence[Hashable]) -> dict:
    """Compare the reward model's own scores of answers that were cut off with those of answers that ended.

    Args:
        own: What was measured of the policy.
        clusters: The cluster of each prompt.

    Returns:
        {"share": of the answers that were cut, "n": how many, "finished_score", "cut_score": mean raw scores (before
        `missing_eos_score`), "difference": cut less finished, as `contrast_estimate`}. Scores are None for a kind of
        which there is no answer, the difference where there are fewer than LEAST of either, all three for what an
        older version measured.
    """
    ended = np.array([flag for row in own.finished for flag in row], bool)
    found = {"n": int((~ended).sum()), "share": float((~ended).mean())}
    none = {"finished_score": None, "cut_score": None, "difference": None}
    if own.raw_scores is None:
        return found | none
    raw = np.array([score for row in own.raw_scores for score in row], float)
    of = [cluster for cluster, row in zip(clusters, own.finished, strict=True) for _ in row]
    each = {"finished_score": raw[ended], "cut_score": raw[~ended]}
    means = {name: float(scores.mean()) if len(scores) else None for name, scores in each.items()}
    enough = min(len(scores) for scores in each.values()) >= LEAST
    return found | means | {"difference": contrast_estimate(raw, ~ended, of) if enough else None}


def held_out(own: Measured, sft: Measured, clusters: Sequence[Hashable]) -> dict | None:
    """Judge a policy by the reward model of another seed.

    Args:
        own: What was measured of the policy.
        sft: The same of SFT.
        clusters: The cluster of each prompt.

    Returns:
        {"score": its mean, "difference_to_sft": of mean scores (None for SFT itself), "win_rate_vs_sft"}, each as in
        `stages/evaluation/statistics.py`; None where there is no such reward model.
    """
    if own.held_out_scores is None or sft.held_out_scores is None:
        return None
    ours, theirs = (np.array(m.held_out_scores, float) for m in (own, sft))
    repeated = [cluster for cluster, row in zip(clusters, ours, strict=True) for _ in row]
    different = own is not sft
    return {
        "score": mean_estimate(ours.ravel().tolist(), repeated),
        "difference_to_sft": difference_estimate(ours.mean(1), theirs.mean(1), clusters) if different else None,
        "win_rate_vs_sft": win_rate(ours, theirs, clusters) if different else None,
    }
