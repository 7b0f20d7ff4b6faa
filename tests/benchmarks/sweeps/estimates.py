"""Compute means and paired differences with intervals, and best of n from N samples.

Pure functions. In a comparison over seeds the seed is what varies by chance, so if there are
several, each counts as one observation (Student's t over seeds). With one seed, the tasks of the
evaluation prompts are the clusters, and the interval says nothing about other seeds. Array shapes:
P prompts, N samples of each.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from stages.evaluation.statistics import difference_estimate, mean_estimate, share_estimate

SAME = 0.03
"""Differences in gold of at most this count as none."""


@dataclass(frozen=True)
class Series:
    """Hold a figure of each evaluation prompt on one seed."""

    values: np.ndarray
    """(P,); NaN for a prompt without the figure."""
    clusters: tuple[str, ...]
    """(P,); the task of each prompt, or the prompt itself if tasks are not known."""

    def mean(self) -> float:
        """Return the mean over the prompts that have the figure."""
        return float(np.nanmean(self.values))


def estimate(seeds: Sequence[Series], share: bool = False) -> dict:
    """Estimate the mean of a figure.

    Args:
        seeds: The figure on each seed.
        share: Whether every value lies in [0, 1].

    Returns:
        As `stages.evaluation.statistics.mean_estimate`: over seeds if there are several, otherwise
        over the tasks of the only one.
    """
    if len(seeds) > 1:
        return over_seeds([one.mean() for one in seeds], share)
    values, clusters = _known(seeds[0].values, seeds[0].clusters)
    return (share_estimate if share else mean_estimate)(values, clusters)


def difference(ours: Sequence[Series], theirs: Sequence[Series]) -> dict:
    """Estimate the mean of paired differences ours − theirs, on the same prompts of the same seeds.

    Args:
        ours: A figure on each seed.
        theirs: The figure that is subtracted, on the same seeds.

    Returns:
        As `estimate`.
    """
    gaps = [Series(a.values - b.values, a.clusters) for a, b in zip(ours, theirs, strict=True)]
    return estimate(gaps)


def over_seeds(values: Sequence[float], share: bool = False) -> dict:
    """Estimate a mean over seeds.

    Args:
        values: A value for each seed.
        share: Whether every value lies in [0, 1].

    Returns:
        As `estimate`; "ci95" is None if there is only one seed.
    """
    result = (share_estimate if share else mean_estimate)(values, range(len(values)))
    return result if len(values) > 1 else result | {"ci95": None}


def differences_over_seeds(ours: Sequence[float], theirs: Sequence[float]) -> dict:
    """Estimate the mean of ours − theirs over seeds.

    Args:
        ours: A value for each seed.
        theirs: The value that is subtracted, for each seed.

    Returns:
        As `estimate`; "ci95" is None if there is only one seed.
    """
    return difference_estimate(ours, theirs, range(len(ours)))


def unit_of(seeds: Sequence[Series]) -> str:
    """Return what intervals are over, as "3 seeds" or "74 tasks of one seed"."""
    if len(seeds) > 1:
        return f"{len(seeds)} seeds"
    return f"{len(set(seeds[0].clusters))} tasks of one seed"


def equality(ci95: Sequence[float] | None) -> str:
    """Return in words what the interval of a difference in gold says."""
    if ci95 is None:
        return "cannot be told from one observation"
    low, high = ci95
    if low >= -SAME and high <= SAME:
        return f"equal within ±{SAME}"
    if high < 0:
        return "lower"
    if low > 0:
        return "higher"
    return f"cannot be told apart, nor surely within ±{SAME}"


def _known(values: np.ndarray, clusters: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Return the values that are not NaN, and their clusters."""
    present = ~np.isnan(values)
    return values[present], [cluster for cluster, known in zip(clusters, present, strict=True) if known]


# ── samples of a prompt ───────────────────────────────────────────────────────────────────────────


def chosen_weights(scores: np.ndarray, n: int) -> np.ndarray:
    """Compute how likely each of the N samples is to be the best of n drawn without replacement.

    In ascending order the sample at index i (from 0) is the best of C(i, n − 1) of the C(N, n)
    subsets; equal scores share their chances. Averaging over all subsets uses every sample, and is
    unbiased for the best of n fresh ones.

    Args:
        scores: (P, N) scores.
        n: From 1 to N.

    Returns:
        (P, N) probabilities.
    """
    size = scores.shape[1]
    if not 1 <= n <= size:
        raise ValueError(f"n is {n}; use a value from 1 to the {size} samples of a prompt")
    by_index = np.array([math.comb(i, n - 1) / math.comb(size, n) for i in range(size)])
    weights = np.empty(scores.shape)
    for row, out in zip(scores, weights, strict=True):
        _, level, counts = np.unique(row, return_inverse=True, return_counts=True)
        out[np.argsort(row, kind="stable")] = by_index
        out[:] = (np.bincount(level, out) / counts)[level]
    return weights


def best_of(scores: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """Compute the expected value of the sample with the highest score among n.

    Args:
        scores: (P, N) scores.
        values: (P, N) values of the same samples.
        n: From 1 to N.

    Returns:
        (P,) expected values.
    """
    return (chosen_weights(scores, n) * values).sum(1)


def best_of_kl(n: int) -> float:
    """Compute KL(best of n ‖ the sampler) = ln n − (n − 1)/n, in nats a response.

    This is an upper bound if samples can coincide.
    """
    return math.log(n) - (n - 1) / n


def gold_order(scores: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """Compute how often the score orders two samples of a prompt as gold does.

    Args:
        scores: (P, N) scores.
        gold: (P, N) gold of the same samples.

    Returns:
        (P,) shares of the pairs of samples whose gold differs, equal scores counting half; NaN if
        gold is the same for all samples.
    """
    by_gold = np.sign(gold[:, :, None] - gold[:, None, :])
    by_score = np.sign(scores[:, :, None] - scores[:, None, :])
    decided = (by_gold != 0).sum((1, 2))
    alike = ((by_gold * by_score + 1) / 2 * (by_gold != 0)).sum((1, 2))
    return np.where(decided > 0, alike / np.maximum(decided, 1), np.nan)


# ── curves ────────────────────────────────────────────────────────────────────────────────────────


def perplexity_at(gold: float, curve: Sequence[tuple[float, float]]) -> float | None:
    """Compute the perplexity of a curve at a value of gold, by linear interpolation.

    Args:
        gold: The gold.
        curve: (gold, perplexity) points, in the order of their setting.

    Returns:
        The lowest perplexity if the curve passes that gold several times, which flatters it; None
        if it never does.
    """
    perplexities = [p for g, p in curve if g == gold]
    for (g0, p0), (g1, p1) in pairwise(curve):
        if min(g0, g1) < gold < max(g0, g1):
            perplexities.append(p0 + (p1 - p0) * (gold - g0) / (g1 - g0))
    return min(perplexities, default=None)
