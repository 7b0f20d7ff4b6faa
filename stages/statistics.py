"""Estimates with their uncertainty: clustered intervals, win rates, reliability of a reward model.

Every interval is a 95 % interval for the mean of a population of *clusters*: tasks of the embedded world, prompts
elsewhere, seeds in a table over seeds. Several samples of a prompt, several prompts of a task and several pairs of a
ranking are not independent, so they count as one cluster. `tests/stages/test_intervals.py` simulates how often the
intervals cover the truth.
"""

from collections.abc import Hashable, Sequence
from itertools import combinations

import numpy as np

PSEUDO_CLUSTERS = 2.0
"""Clusters won, and as many lost, that are added to a share before its spread is computed (Agresti & Coull 1998)."""


def mean_estimate(values: Sequence[float], clusters: Sequence[Hashable]) -> dict:
    """Estimate a mean with a jackknife interval over clusters.

    Leaving out one cluster at a time gives G means; their spread gives the standard error of the whole mean, and
    Student's t with G − 1 degrees of freedom the interval (delete-one jackknife; Cameron & Miller 2015, CV3).

    Args:
        values: The N observations.
        clusters: The cluster of each observation.

    Returns:
        {"value": mean over the observations, "ci95": [low, high] or None where there is one cluster, "n": N,
        "clusters": G}.
    """
    sums, counts = cluster_sums(values, clusters)
    half = _half_width(sums, counts)
    value = float(sums.sum() / counts.sum())
    ci95 = None if half is None else [value - half, value + half]
    return {"value": value, "ci95": ci95, "n": len(values), "clusters": len(sums)}


def share_estimate(values: Sequence[float], clusters: Sequence[Hashable]) -> dict:
    """Estimate a share (every observation in [0, 1]) with an interval that is sensible at its edges.

    Where all observations are equal their spread is 0, which says nothing about the next cluster. So two clusters at
    1 and two at 0, of the mean size, are added before the interval is computed (Agresti & Coull 1998 add as much to a
    binomial share). 16 wins of 16 give [0.78, 1] and not [1, 1]; 16 ties give about [0.40, 0.60].

    Args:
        values: The N observations: 1 for a success, 0 for a failure, anything between (a tie is ½).
        clusters: The cluster of each observation.

    Returns:
        As `mean_estimate`; "ci95" lies in [0, 1] and holds "value".
    """
    sums, counts = cluster_sums(values, clusters)
    value, size = float(sums.sum() / counts.sum()), counts.mean()
    pseudo = int(PSEUDO_CLUSTERS)
    sums_more = np.concatenate([sums, np.full(pseudo, size), np.zeros(pseudo)])
    counts_more = np.concatenate([counts, np.full(2 * pseudo, size)])
    center, half = sums_more.sum() / counts_more.sum(), _half_width(sums_more, counts_more)
    low, high = max(0.0, min(value, center - half)), min(1.0, max(value, center + half))
    return {"value": value, "ci95": [float(low), float(high)], "n": len(values), "clusters": len(sums)}


def difference_estimate(ours: Sequence[float], theirs: Sequence[float], clusters: Sequence[Hashable]) -> dict:
    """Estimate the mean of paired differences ours − theirs; as `mean_estimate`."""
    return mean_estimate(np.asarray(ours, float) - np.asarray(theirs, float), clusters)


def win_rate(ours: np.ndarray, theirs: np.ndarray, clusters: Sequence[Hashable]) -> dict:
    """Estimate how often a response of ours beats one of theirs to the same prompt; ties count half.

    All of a prompt's samples are compared with all of the other policy's, which uses them better than one comparison.

    Args:
        ours: (P, n) judgements of n samples of P prompts, higher is better.
        theirs: (P, m) judgements of the other policy's m samples.
        clusters: The cluster of each of the P prompts.

    Returns:
        As `share_estimate`; "n" is the number of prompts.
    """
    return share_estimate(wins(ours, theirs), clusters)


def wins(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Return each prompt's share of won comparisons, (P,), of all samples (P, n) with all others (P, m); ties half."""
    gaps = np.asarray(ours, float)[:, :, None] - np.asarray(theirs, float)[:, None, :]
    return rights(gaps).mean(axis=(1, 2))


def cluster_sums(values: Sequence[float], clusters: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum and the number of the observations of each cluster, (G,) each."""
    index: dict[Hashable, int] = {}
    of = [index.setdefault(cluster, len(index)) for cluster in clusters]
    values = np.asarray(values, float)
    if len(of) != len(values):
        raise ValueError(f"{len(values)} values and {len(of)} clusters")
    return np.bincount(of, values, len(index)), np.bincount(of, minlength=len(index)).astype(float)


def _half_width(sums: np.ndarray, counts: np.ndarray) -> float | None:
    """Return half the width of the jackknife interval of Σ sums / Σ counts; None where there is one cluster."""
    from scipy.stats import t as student

    clusters = len(sums)
    if clusters < 2:
        return None
    without = (sums.sum() - sums) / (counts.sum() - counts)
    variance = (clusters - 1) / clusters * ((without - sums.sum() / counts.sum()) ** 2).sum()
    return float(student.ppf(0.975, clusters - 1) * np.sqrt(variance))


def rights(margins: Sequence[float]) -> np.ndarray:
    """Return 1 for each margin above 0, ½ for 0, otherwise 0."""
    margins = np.asarray(margins, float)
    return (margins > 0) + 0.5 * (margins == 0)


def pair_accuracy(margins: Sequence[float], clusters: Sequence[Hashable]) -> dict:
    """Estimate the share of pairs whose preferred response scores higher.

    Args:
        margins: Score of the preferred response minus score of the other one, a pair each; 0 counts half.
        clusters: The cluster of each pair.

    Returns:
        {"accuracy", "accuracy_ci95", "n_pairs", "n_clusters"}.
    """
    found = share_estimate(rights(margins), clusters)
    return {
        "accuracy": found["value"],
        "accuracy_ci95": found["ci95"],
        "n_pairs": found["n"],
        "n_clusters": found["clusters"],
    }


def accuracy_by(margins: Sequence[float], keys: Sequence) -> dict[str, dict]:
    """Accuracy of the pairs that share a key, keys in order: {key: {accuracy, n_pairs}}; margins as in
    `pair_accuracy`."""
    found: dict = {}
    for right, key in zip(rights(margins), keys, strict=True):
        found.setdefault(key, []).append(right)
    return {str(k): {"accuracy": float(np.mean(found[k])), "n_pairs": len(found[k])} for k in sorted(found)}


def reliability(margins: Sequence[float], bins: int = 10) -> list[dict]:
    """The reliability curve of σ(margin) as the probability of the labelled winner: {confidence, accuracy, n_pairs}
    of each bin that has a pair.

    Each pair is read from the side that the model prefers: confidence σ(|margin|) in [½, 1] against being right.
    """
    margins = np.asarray(margins, float)
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    right = rights(margins)
    which = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    return [
        {
            "confidence": float(confidence[which == b].mean()),
            "accuracy": float(right[which == b].mean()),
            "n_pairs": int((which == b).sum()),
        }
        for b in range(bins)
        if (which == b).any()
    ]


def expected_calibration_error(margins: Sequence[float], bins: int = 10) -> float:
    """ECE of σ(margin) as the probability of the labelled winner (Guo 2017, eq. 3)."""
    return sum(b["n_pairs"] * abs(b["accuracy"] - b["confidence"]) for b in reliability(margins, bins)) / len(margins)


def agreements(rankings) -> dict[tuple[str, str], tuple[float, int]]:
    """(labeler, labeler), in order → (pairs on which they agree, untied pairs that both judged)."""
    by_prompt: dict = {}
    for r in rankings:
        if r.labeler is not None:
            by_prompt.setdefault((str(r.prompt), r.responses), {})[r.labeler] = r.ranks
    found: dict = {}
    for by_labeler in by_prompt.values():
        for (a, one), (b, other) in combinations(sorted(by_labeler.items()), 2):
            for i, j in combinations(range(len(one)), 2):
                x, y = (one[i], one[j]), (other[i], other[j])
                if None in x or None in y or x[0] == x[1] or y[0] == y[1]:
                    continue
                same, total = found.get((a, b), (0, 0))
                found[a, b] = (same + ((x[0] < x[1]) == (y[0] < y[1])), total + 1)
    return found


def labeler_agreement(rankings) -> float | None:
    """Share of untied pairs on which two labelers of the same prompt and responses agree; None if nobody shared one."""
    same, total = (sum(counts) for counts in zip((0, 0), *agreements(rankings).values(), strict=True))
    return same / total if total else None
