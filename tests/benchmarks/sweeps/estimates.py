"""Arithmetic of the sweeps: best of n from N samples, differences on the same prompts, where gold peaks. Pure."""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from stages.statistics import bootstrap_ci


def chosen_weights(scores: np.ndarray, n: int) -> np.ndarray:
    """How likely each of the N samples is the best of n that are drawn from them without replacement. (G, N) → (G, N).

    In ascending order the sample at place i (from 0) is the best of C(i, n − 1) of the C(N, n) subsets; equal scores
    share their chances. Averaging over all subsets uses every sample, and is unbiased for the best of n fresh ones.
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
    """Expected value of the sample with the highest score among n, a prompt: scores, values (G, N) → (G,)."""
    return (chosen_weights(scores, n) * values).sum(1)


def gold_order(scores: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """Share of the pairs of a prompt's samples, among those whose gold differs, that the score orders as gold does,
    equal scores counting half: (G, N), (G, N) → (G,), NaN where no gold differs."""
    by_gold = np.sign(gold[:, :, None] - gold[:, None, :])
    by_score = np.sign(scores[:, :, None] - scores[:, None, :])
    decided = (by_gold != 0).sum((1, 2))
    alike = ((by_gold * by_score + 1) / 2 * (by_gold != 0)).sum((1, 2))
    return np.where(decided > 0, alike / np.maximum(decided, 1), np.nan)


def wins(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """How often one of our samples beats one of theirs, of the same prompt, ties half: (G, N), (G, M) → (G,)."""
    return ((np.sign(ours[:, :, None] - theirs[:, None, :]) + 1) / 2).mean((1, 2))


def best_of_kl(n: int) -> float:
    """KL(best of n ‖ the sampler) = ln n − (n − 1)/n, in nats a response; less where samples or scores coincide."""
    return math.log(n) - (n - 1) / n


def mean_ci(values: Sequence[float], seed: int) -> list[float]:
    """95 % interval of the mean, by bootstrap over prompts."""
    return bootstrap_ci(values, np.ones(len(values)), seed)


def difference(ours: Sequence[float], theirs: Sequence[float], seed: int) -> dict:
    """Mean of ours − theirs on the same prompts: {value, ci95, n}; what makes a prompt hard for both drops out."""
    gaps = np.asarray(ours, float) - np.asarray(theirs, float)
    return {"value": float(gaps.mean()), "ci95": mean_ci(gaps, seed), "n": len(gaps)}


def overoptimisation(points: Sequence, seed: int) -> tuple:
    """(the point with the highest gold, those not clearly below it, [(point, gold difference to the peak)] of those
    that are over-optimised): further from SFT than the peak, with a higher score and a gold that is lower beyond
    chance (its 95 % interval on the same prompts excludes 0). Points have kl, score, gold and each (gold a prompt)."""
    peak = max(points, key=lambda p: p.gold)
    others = [(p, difference(p.each, peak.each, seed)) for p in sorted(points, key=lambda p: p.kl) if p is not peak]
    level = [p for p, gap in others if gap["ci95"][1] >= 0]
    over = [(p, gap) for p, gap in others if p.kl > peak.kl and p.score > peak.score and gap["ci95"][1] < 0]
    return peak, level, over


def perplexity_at(gold: float, curve: Sequence[tuple[float, float]]) -> float | None:
    """Perplexity of a curve of (gold, perplexity), in the order of its setting, where it passes this gold; linear in
    between. The lowest where it passes twice, which flatters the curve; None where it never does."""
    found = [p for g, p in curve if g == gold]
    for (g0, p0), (g1, p1) in pairwise(curve):
        if min(g0, g1) < gold < max(g0, g1):
            found.append(p0 + (p1 - p0) * (gold - g0) / (g1 - g0))
    return min(found, default=None)
