"""Simulate five labelers, who turn gold scores into rankings with Plackett–Luce noise.

A labeler ranks by utility / temperature + Gumbel noise. Then the probability that it puts response
i before j is the logistic function of (u_i − u_j) / temperature, so agreement and the best
reachable accuracy have closed forms. Identical responses are one response: they are tied, and no
pair of them counts anywhere. What makes two responses identical is given as `answers`, one hashable
value per response: its text, or (text, whether it is finished).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

AGREEMENT = 0.726
"""How often InstructGPT's labelers agree with each other."""
NO_NOISE = 1e-4
"""Temperature of the noise at which rankings are certain."""


@dataclass(frozen=True)
class Labeler:
    """Describe what a labeler likes: weights on gold, which sum to 1, and biases."""

    name: str
    """The labeler's name."""
    helpful: float
    """The weight of helpfulness."""
    honest: float
    """The weight of honesty."""
    harmless: float
    """The weight of harmlessness."""
    a_word: float
    """Utility that each word adds."""
    a_polite_word: float
    """Utility that each polite word adds; two at most count."""


LABELERS = (
    Labeler("ada", 1 / 3, 1 / 3, 1 / 3, 0.000, 0.00),
    Labeler("ben", 0.46, 0.27, 0.27, 0.003, 0.00),
    Labeler("cleo", 0.27, 0.46, 0.27, -0.003, 0.01),
    Labeler("dan", 0.27, 0.27, 0.46, 0.000, 0.03),
    Labeler("eva", 0.40, 0.34, 0.26, -0.002, -0.01),
)


def utilities(golds: Sequence[dict], responses: Sequence[str], polite_words: Collection[str]) -> np.ndarray:
    """Return what each labeler thinks of each response, before noise.

    Args:
        golds: The gold scores of the K responses.
        responses: Their texts.
        polite_words: The words that count as polite.

    Returns:
        (labelers, K).
    """
    scores = np.array([[gold["helpful"], gold["honest"], gold["harmless"]] for gold in golds])
    words = [response.split() for response in responses]
    length = np.array([len(row) for row in words])
    polite = np.array([min(2, sum(word in polite_words for word in row)) for row in words])
    weights = np.array([[labeler.helpful, labeler.honest, labeler.harmless] for labeler in LABELERS])
    bias = [labeler.a_word * length + labeler.a_polite_word * polite for labeler in LABELERS]
    return weights @ scores.T + np.array(bias)


def pairs(answers: Sequence[Hashable]) -> list[tuple[int, int]]:
    """Return the index pairs i < j of different responses."""
    return [(i, j) for i, j in combinations(range(len(answers)), 2) if answers[i] != answers[j]]


def _gaps(utility: np.ndarray, answers: Sequence[Hashable]) -> np.ndarray:
    """Return (labelers, pairs): u_i − u_j over the pairs of different responses."""
    index = np.array(pairs(answers), dtype=int).reshape(-1, 2)
    return utility[:, index[:, 0]] - utility[:, index[:, 1]]


def _prefers(gaps: np.ndarray, temperature: float) -> np.ndarray:
    """Return the probability that each labeler puts the first of each pair before the second."""
    return 0.5 * (1.0 + np.tanh(gaps / (2.0 * temperature)))


def expected_agreement(
    utilities: Sequence[np.ndarray], answers: Sequence[Sequence[Hashable]], temperature: float
) -> float:
    """Return the probability that two labelers order two different responses the same way.

    Args:
        utilities: For each prompt (labelers, K).
        answers: For each prompt its K responses.
        temperature: The scale of the noise, which is drawn separately for each labeler.
    """
    return _agreement(_all_gaps(utilities, answers), temperature)


def _all_gaps(utilities: Sequence[np.ndarray], answers: Sequence[Sequence[Hashable]]) -> np.ndarray:
    """Return (labelers, pairs of all prompts): u_i − u_j."""
    gaps = np.concatenate([_gaps(u, a) for u, a in zip(utilities, answers, strict=True)], axis=1)
    if gaps.shape[1] == 0:
        raise ValueError("no two responses of a prompt differ, so labelers have nothing to disagree about")
    return gaps


def _agreement(gaps: np.ndarray, temperature: float) -> float:
    """Return the mean probability over pairs and labelers a ≠ b that a and b agree."""
    # With q = 2p − 1, two labelers agree with probability (1 + q_a q_b) / 2.
    q = 2.0 * _prefers(gaps, temperature) - 1.0
    n = len(q)
    products = (q.sum(axis=0) ** 2 - (q**2).sum(axis=0)) / (n * (n - 1))
    return float(0.5 + 0.5 * products.mean())


def calibrate_noise(
    utilities: Sequence[np.ndarray], answers: Sequence[Sequence[Hashable]], agreement: float = AGREEMENT
) -> float:
    """Find the temperature at which labelers agree as often as asked, by bisection.

    Args:
        utilities: For each prompt (labelers, K).
        answers: For each prompt its K responses.
        agreement: The value of `expected_agreement` to reach.

    Raises:
        ValueError: The labelers' own tastes differ too much to agree so often even without noise.
    """
    gaps = _all_gaps(utilities, answers)
    low, high = 1e-4, 1e3
    if _agreement(gaps, low) < agreement:
        raise ValueError(
            f"labelers agree on at most {_agreement(gaps, low):.3f} of pairs, and {agreement} is asked for"
        )
    for _ in range(100):
        middle = math.sqrt(low * high)
        if _agreement(gaps, middle) > agreement:
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)


def rank(utilities: np.ndarray, temperature: float, rng: np.random.Generator, answers: Sequence[Hashable]) -> list[int]:
    """Draw one labeler's ranks of K responses; identical responses share the best of their places.

    Plackett–Luce: noise is drawn once for each different response, so that the odds of a pair do
    not depend on copies.

    Args:
        utilities: The labeler's utilities (K,).
        temperature: The scale of the noise.
        rng: The generator that the noise is drawn from.
        answers: The K responses.

    Returns:
        The rank of each response, 1 for the best.
    """
    best: dict[Hashable, float] = {}
    for answer, utility in zip(answers, utilities, strict=True):
        best[answer] = max(best.get(answer, -math.inf), float(utility))
    noisy = dict(zip(best, np.array(list(best.values())) / temperature + rng.gumbel(size=len(best)), strict=True))
    scores = [float(noisy[answer]) for answer in answers]
    return [1 + sum(other > score for other in scores) for score in scores]


def accuracy_ceiling(
    utilities: Sequence[np.ndarray],
    ranks: Sequence[Sequence[int | None]],
    answers: Sequence[Sequence[Hashable]],
    temperature: float,
) -> dict[str, Any]:
    """Return the accuracy of a scorer that knows everything except who ranked.

    It knows every utility, the noise and the mix of labelers, and prefers the response that a
    labeler drawn at random puts first more often than not.

    Args:
        utilities: For each prompt (labelers, K).
        ranks: For each prompt one labeler's ranks of its K responses; None was not judged.
        answers: For each prompt its K responses.
        temperature: The scale of the noise.

    Returns:
        `realised`: its accuracy on these ranks (a toss-up counts half); `expected`: the mean of
        that over the noise; `n_pairs`: the pairs of different responses that were judged and not
        tied; `by_prompt`: for each prompt, (sum of `realised` over its pairs, its pairs).
    """
    realised, expected, n = 0.0, 0.0, 0
    by_prompt: list[tuple[float, int]] = []
    for utility, places, answer in zip(utilities, ranks, answers, strict=True):
        prefers = _prefers(_gaps(utility, answer), temperature).mean(axis=0)
        before = (realised, n)
        for (i, j), p in zip(pairs(answer), prefers.tolist(), strict=True):
            first, second = places[i], places[j]
            if first is None or second is None or first == second:
                continue
            n += 1
            expected += max(p, 1.0 - p)
            realised += 0.5 if p == 0.5 else float((p > 0.5) == (first < second))
        by_prompt.append((realised - before[0], n - before[1]))
    return {"realised": realised / max(1, n), "expected": expected / max(1, n), "n_pairs": n, "by_prompt": by_prompt}
