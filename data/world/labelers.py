"""Five simulated labelers: gold scores → utilities (labelers, K) → rankings with Plackett–Luce noise.

A labeler ranks by utility / temperature + Gumbel noise. Then the probability that it puts response i before j is
the logistic function of (u_i − u_j) / temperature, so agreement and the best reachable accuracy have closed forms.
Identical responses are one response: they are tied, and no pair of them counts anywhere. What tells responses apart
is given as `answers`, hashable and one for each: their texts, or (text, whether it is finished).
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import combinations

import numpy as np


@dataclass(frozen=True)
class Labeler:
    """Weights on gold (they sum to 1) and a bias: utility a word, and a polite word (two at most count)."""

    name: str
    helpful: float
    honest: float
    harmless: float
    a_word: float
    a_polite_word: float


LABELERS = (
    Labeler("ada", 1 / 3, 1 / 3, 1 / 3, 0.000, 0.00),
    Labeler("ben", 0.46, 0.27, 0.27, 0.003, 0.00),
    Labeler("cleo", 0.27, 0.46, 0.27, -0.003, 0.01),
    Labeler("dan", 0.27, 0.27, 0.46, 0.000, 0.03),
    Labeler("eva", 0.40, 0.34, 0.26, -0.002, -0.01),
)


def utilities(golds: list[dict], responses: list[str], polite_words) -> np.ndarray:
    """(labelers, K) from the K responses' gold scores and texts."""
    scores = np.array([[g["helpful"], g["honest"], g["harmless"]] for g in golds])
    words = [r.split() for r in responses]
    length = np.array([len(w) for w in words])
    polite = np.array([min(2, sum(word in polite_words for word in w)) for w in words])
    weights = np.array([[one.helpful, one.honest, one.harmless] for one in LABELERS])
    bias = [one.a_word * length + one.a_polite_word * polite for one in LABELERS]
    return weights @ scores.T + np.array(bias)


def pairs(answers: list[Hashable]) -> list[tuple[int, int]]:
    """Index pairs i < j of different responses."""
    return [(i, j) for i, j in combinations(range(len(answers)), 2) if answers[i] != answers[j]]


def _gaps(utility: np.ndarray, answers: list[Hashable]) -> np.ndarray:
    """(labelers, pairs): u_i − u_j over the pairs of different responses."""
    index = np.array(pairs(answers), dtype=int).reshape(-1, 2)
    return utility[:, index[:, 0]] - utility[:, index[:, 1]]


def _prefers(gaps: np.ndarray, temperature: float) -> np.ndarray:
    """Probability that each labeler puts the first of each pair before the second."""
    return 0.5 * (1.0 + np.tanh(gaps / (2.0 * temperature)))


def expected_agreement(utilities: list[np.ndarray], answers: list[list[Hashable]], temperature: float) -> float:
    """Probability that two different labelers, each with noise of its own, order two different responses alike."""
    return _agreement(_all_gaps(utilities, answers), temperature)


def _all_gaps(utilities, answers) -> np.ndarray:
    gaps = np.concatenate([_gaps(u, a) for u, a in zip(utilities, answers, strict=True)], axis=1)
    if gaps.shape[1] == 0:
        raise ValueError("no two responses of a prompt differ, so labelers have nothing to disagree about")
    return gaps


def _agreement(gaps: np.ndarray, temperature: float) -> float:
    # with q = 2p − 1, two labelers agree with probability (1 + q_a q_b) / 2; mean over a ≠ b
    q = 2.0 * _prefers(gaps, temperature) - 1.0
    n = len(q)
    products = (q.sum(axis=0) ** 2 - (q**2).sum(axis=0)) / (n * (n - 1))
    return float(0.5 + 0.5 * products.mean())


def calibrate_noise(utilities: list[np.ndarray], answers: list[list[Hashable]], agreement: float = 0.726) -> float:
    """The temperature at which `expected_agreement` is `agreement`; by bisection.

    `utilities`: a (labelers, K) array for each prompt; `answers`: its K responses. A ValueError if the labelers' own
    tastes differ too much to agree so often even without noise.
    """
    gaps = _all_gaps(utilities, answers)
    low, high = 1e-4, 1e3
    if _agreement(gaps, low) < agreement:
        raise ValueError(f"labelers agree on at most {_agreement(gaps, low):.3f} of pairs; {agreement} is out of reach")
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if _agreement(gaps, middle) > agreement else (low, middle)
    return math.sqrt(low * high)


def rank(utilities: np.ndarray, temperature: float, rng: np.random.Generator, answers: list[Hashable]) -> list[int]:
    """One labeler's ranks of K responses from its utilities (K,): 1 = best; identical responses share the best place.

    Plackett–Luce: noise is drawn once for each different response, so the odds of a pair do not depend on copies.
    """
    best: dict[Hashable, float] = {}
    for answer, utility in zip(answers, utilities, strict=True):
        best[answer] = max(best.get(answer, -math.inf), float(utility))
    noisy = dict(zip(best, np.array(list(best.values())) / temperature + rng.gumbel(size=len(best)), strict=True))
    scores = [float(noisy[answer]) for answer in answers]
    return [1 + sum(other > score for other in scores) for score in scores]


def accuracy_ceiling(
    utilities: list[np.ndarray], ranks: list[list[int | None]], answers: list[list[Hashable]], temperature: float
) -> dict[str, float]:
    """Accuracy of the scorer that knows every utility, the noise and the mix of labelers, but not who ranked.

    It prefers the response that a labeler drawn at random puts first more often than not. `realised`: its accuracy
    on these ranks (a toss-up counts half); `expected`: its mean over the noise; `n_pairs`: pairs of different
    responses, both judged, not tied.
    """
    realised, expected, n = 0.0, 0.0, 0
    for utility, places, answer in zip(utilities, ranks, answers, strict=True):
        prefers = _prefers(_gaps(utility, answer), temperature).mean(axis=0)
        for (i, j), p in zip(pairs(answer), prefers.tolist(), strict=True):
            if places[i] is None or places[j] is None or places[i] == places[j]:
                continue
            n += 1
            expected += max(p, 1.0 - p)
            realised += 0.5 if p == 0.5 else float((p > 0.5) == (places[i] < places[j]))
    return {"realised": realised / max(1, n), "expected": expected / max(1, n), "n_pairs": n}
