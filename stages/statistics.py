"""Figures with their uncertainty: bootstrap intervals over prompts, win rates, calibration."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np


def bootstrap_ci(sums: Sequence[float], counts: Sequence[float], seed: int, draws: int = 2000) -> list[float]:
    """95 % interval of Σ sums / Σ counts, prompts drawn with replacement; sums and counts are a prompt's, (G,)."""
    sums, counts = np.asarray(sums, float), np.asarray(counts, float)
    index = np.random.default_rng(seed).integers(0, len(sums), (draws, len(sums)))
    ratios = sums[index].sum(1) / np.maximum(counts[index].sum(1), 1e-12)
    return [float(x) for x in np.quantile(ratios, [0.025, 0.975])]


def win_rate(ours: Sequence[float], theirs: Sequence[float], seed: int) -> dict:
    """Share of prompts on which ours is higher, ties counting half: {value, ci95, n}."""
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(ours, theirs, strict=True)]
    return {"value": float(np.mean(wins)), "ci95": bootstrap_ci(wins, np.ones(len(wins)), seed), "n": len(wins)}


def rights(margins: Sequence[float]) -> np.ndarray:
    """1 for each pair whose winner scores higher, ½ for equal scores, 0 else."""
    margins = np.asarray(margins, float)
    return (margins > 0) + 0.5 * (margins == 0)


def pair_accuracy(margins: Sequence[float], groups: Sequence[int], seed: int) -> dict:
    """Share of pairs whose winner scores higher (margin > 0, ties half), interval over prompts (`groups`)."""
    right, groups = rights(margins), np.asarray(groups)
    labels, index = np.unique(groups, return_inverse=True)
    sums, counts = np.bincount(index, right, len(labels)), np.bincount(index, minlength=len(labels))
    return {"accuracy": float(right.mean()), "accuracy_ci95": bootstrap_ci(sums, counts, seed), "n_pairs": len(margins)}


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
            by_prompt.setdefault((str(r.prompt), r.answers), {})[r.labeler] = r.ranks
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
