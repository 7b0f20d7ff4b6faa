"""Arithmetic of the sweeps: means and paired differences with intervals, best of n from N samples.

Pure. What varies by chance in a comparison over seeds is the seed: where there are several, each counts as one
observation (Student's t over seeds). With one seed the tasks of the evaluation prompts are the clusters, and nothing is
said of other seeds. Array shapes: P prompts, N samples of each.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from stages.evaluation.statistics import difference_estimate, mean_estimate, share_estimate

SAME = 0.03
"""Differences in gold up to this one count as none."""


@dataclass(frozen=True)
class Series:
    """A figure of each evaluation prompt, on one seed."""

    values: np.ndarray
    """(P,); NaN for a prompt that has no such figure."""
    clusters: tuple[str, ...]
    """The task of each prompt (the prompt itself where tasks are not known), (P,)."""

    def mean(self) -> float:
        """Return the mean over the prompts that have the figure."""
        return float(np.nanmean(self.values))


def estimate(seeds: Sequence[Series], share: bool = False) -> dict:
    """Estimate the mean of a figure.

    Args:
        seeds: The figure on each seed.
        share: Whether every value lies in [0, 1].

    Returns:
        As `stages.evaluation.statistics.mean_estimate`: over seeds where there are several, over the tasks of the
        only one otherwise.
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
        values: A number a seed.
        share: Whether every value lies in [0, 1].

    Returns:
        As `estimate`; "ci95" is None where there is one seed.
    """
    found = (share_estimate if share else mean_estimate)(values, range(len(values)))
    return found if len(values) > 1 else found | {"ci95": None}


def differences_over_seeds(ours: Sequence[float], theirs: Sequence[float]) -> dict:
    """Estimate the mean of ours − theirs, a number a seed each; "ci95" is None where there is one seed."""
    return difference_estimate(ours, theirs, range(len(ours)))


def unit_of(seeds: Sequence[Series]) -> str:
    """Say what intervals are over, as "3 seeds" or "74 tasks of one seed"."""
    if len(seeds) > 1:
        return f"{len(seeds)} seeds"
    return f"{len(set(seeds[0].clusters))} tasks of one seed"


def equality(ci95: Sequence[float] | None) -> str:
    """Say what the interval of a difference in gold tells."""
    if ci95 is None:
        return "cannot be told from one observation"
    low, high = ci95
    if low >= -SAME and high <= SAME:
        return f"equal within ±{SAME}"
    return "lower" if high < 0 else "higher" if low > 0 else f"cannot be told apart, nor surely within ±{SAME}"


def _known(values: np.ndarray, clusters: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Return the values that are not NaN, and their clusters."""
    there = ~np.isnan(values)
    return values[there], [cluster for cluster, known in zip(clusters, there, strict=True) if known]


# ── samples of a prompt ──────────────────────────────────────────────────────────────────────────────────────


def chosen_weights(scores: np.ndarray, n: int) -> np.ndarray:
    """Compute how likely each of the N samples is the best of n that are drawn from them without replacement.

    In ascending order the sample at place i (from 0) is the best of C(i, n − 1) of the C(N, n) subsets; equal scores
    share their chances. Averaging over all subsets uses every sample, and is unbiased for the best of n fresh ones.

    Args:
        scores: (P, N) scores.
        n: From 1 to N.

    Returns:
        (P, N) probabilities.
    """
    size = scores.shape[1]
    if not 1 <= n <= size:
        raise ValueError(f"n is {n}; should be from 1 to the {size} samples of a prompt")
    by_place = np.array([math.comb(i, n - 1) / math.comb(size, n) for i in range(size)])
    weights = np.empty(scores.shape)
    for row, out in zip(scores, weights, strict=True):
        _, level, counts = np.unique(row, return_inverse=True, return_counts=True)
        out[np.argsort(row, kind="stable")] = by_place
        out[:] = (np.bincount(level, out) / counts)[level]
    return weights


def best_of(scores: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """Compute the expected value of the sample with the highest score among n: scores, values (P, N) → (P,)."""
    return (chosen_weights(scores, n) * values).sum(1)


def best_of_kl(n: int) -> float:
    """Compute KL(best of n ‖ the sampler) = ln n − (n − 1)/n, in nats a response; less where samples coincide."""
    return math.log(n) - (n - 1) / n


def gold_order(scores: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """Compute how often the score orders two samples of a prompt as gold does.

    Args:
        scores: (P, N) scores.
        gold: (P, N) gold of the same samples.

    Returns:
        (P,) shares of the pairs of samples whose gold differs, equal scores counting half; NaN where no gold differs.
    """
    by_gold = np.sign(gold[:, :, None] - gold[:, None, :])
    by_score = np.sign(scores[:, :, None] - scores[:, None, :])
    decided = (by_gold != 0).sum((1, 2))
    alike = ((by_gold * by_score + 1) / 2 * (by_gold != 0)).sum((1, 2))
    return np.where(decided > 0, alike / np.maximum(decided, 1), np.nan)


# ── curves ───────────────────────────────────────────────────────────────────────────────────────────────────


def perplexity_at(gold: float, curve: Sequence[tuple[float, float]]) -> float | None:
    """Compute the perplexity of a curve where it passes a gold, linearly in between.

    Args:
        gold: The gold.
        curve: (gold, perplexity) points, in the order of their setting.

    Returns:
        The perplexity; the lowest where the curve passes twice, which flatters it; None where it never does.
    """
    found = [p for g, p in curve if g == gold]
    for (g0, p0), (g1, p1) in pairwise(curve):
        if min(g0, g1) < gold < max(g0, g1):
            found.append(p0 + (p1 - p0) * (gold - g0) / (g1 - g0))
    return min(found, default=None)
