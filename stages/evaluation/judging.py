"""Say what a judge's verdicts on pairs of responses are worth. Pure.

A pair holds two responses to one prompt, ours and theirs. A judge's preference for ours is 1, 0, or
½ for a tie. A judge that reads both responses at once (`mode: pairwise`) is asked in both orders:
its preference is a tie where the two verdicts differ.

Shares are estimated with intervals over clusters, as in `stages/evaluation/statistics.py`.
"""

from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np

from stages.evaluation.statistics import jackknife_interval, share_estimate

Verdict = Literal["first", "second", "tie"]
"""Which of two responses a judge prefers, in the order in which it read them."""
TIE = 0.5
PRIOR_DEVIATION = 2.5
"""Standard deviation of the normal prior of a coefficient of the length model, in logits."""
PSEUDO_PAIRS = 2
"""Pairs of equal length that we win, and as many that we lose, added for an interval."""


def preference_of(forward: Verdict | None, backward: Verdict | None) -> float:
    """Return the preference for ours from the verdicts in both orders (Zheng et al. 2023, §3.4).

    Args:
        forward: The verdict where ours came first; None if it was not valid.
        backward: The verdict where theirs came first.

    Returns:
        1 or 0 if both orders prefer the same response, otherwise ½.
    """
    if forward == "first" and backward == "second":
        return 1.0
    if forward == "second" and backward == "first":
        return 0.0
    return TIE


def preference_by_score(ours: float, theirs: float) -> float:
    """Return the preference for ours from the scores of both."""
    return TIE if ours == theirs else float(ours > theirs)


def position_bias(
    orders: Sequence[tuple[Verdict | None, Verdict | None]], clusters: Sequence[Hashable]
) -> dict[str, dict | None]:
    """Estimate how far a judge's verdicts depend on which response comes first.

    Args:
        orders: The verdicts on each pair, one an order; None is not valid.
        clusters: The cluster of each pair.

    Returns:
        "first": the share of verdicts for the first response, of those that are no tie; ½ without
        bias. "consistent": the share of pairs on which both orders have the same outcome, of those
        with two valid verdicts. None for a share of nothing.
    """
    firsts, of_first, consistent, of_pair = [], [], [], []
    for (forward, backward), cluster in zip(orders, clusters, strict=True):
        for verdict in (forward, backward):
            if verdict in ("first", "second"):
                firsts.append(float(verdict == "first"))
                of_first.append(cluster)
        if forward is not None and backward is not None:
            agrees = preference_of(forward, backward) != TIE or (forward, backward) == ("tie", "tie")
            consistent.append(float(agrees))
            of_pair.append(cluster)
    return {
        "first": share_estimate(firsts, of_first) if firsts else None,
        "consistent": share_estimate(consistent, of_pair) if consistent else None,
    }


def longer_preferred(preferences: Sequence[float], gaps: Sequence[float], clusters: Sequence[Hashable]) -> dict | None:
    """Estimate how often a judge prefers the longer of two responses.

    It is no proof of a bias: the longer response may be the better one. People's share on the same
    pairs says more.

    Args:
        preferences: The preference for ours in each pair.
        gaps: The length of ours minus that of theirs, in any unit.
        clusters: The cluster of each pair.

    Returns:
        The share, ties half, of the pairs whose lengths differ; None without one.
    """
    chosen = [i for i, gap in enumerate(gaps) if gap != 0]
    if not chosen:
        return None
    longer = [preferences[i] if gaps[i] > 0 else 1 - preferences[i] for i in chosen]
    return share_estimate(longer, [clusters[i] for i in chosen])


def longer_than_people(
    preferences: Sequence[float], gaps: Sequence[float], clusters: Sequence[Hashable]
) -> dict | None:
    """Estimate how much more often a judge prefers the longer response than people do.

    Args:
        preferences: The judge's preference for the response that people preferred, in each pair.
        gaps: The length of that response minus that of the other.
        clusters: The cluster of each pair.

    Returns:
        The difference of the two shares, paired, of the pairs whose lengths differ; None without
        one.
    """
    chosen = [i for i, gap in enumerate(gaps) if gap != 0]
    if not chosen:
        return None
    differences = [preferences[i] - 1 if gaps[i] > 0 else 1 - preferences[i] for i in chosen]
    found = share_estimate([(1 + x) / 2 for x in differences], [clusters[i] for i in chosen])
    return {"value": 2 * found["value"] - 1, "ci95": [2 * end - 1 for end in found["ci95"]], "n": found["n"]}


def agreement(ours: Sequence[float], theirs: Sequence[float], clusters: Sequence[Hashable]) -> dict | None:
    """Estimate how often two judges prefer the same response of a pair.

    Args:
        ours: One judge's preference in each pair.
        theirs: The other's.
        clusters: The cluster of each pair.

    Returns:
        The share of the pairs on which neither has a tie; None without one.
    """
    chosen = [i for i, (x, y) in enumerate(zip(ours, theirs, strict=True)) if TIE not in (x, y)]
    if not chosen:
        return None
    return share_estimate([float(ours[i] == theirs[i]) for i in chosen], [clusters[i] for i in chosen])


def accuracy(preferences: Sequence[float], clusters: Sequence[Hashable]) -> dict | None:
    """Estimate how often a judge prefers the response that people preferred; ties count half.

    Args:
        preferences: The judge's preference for the response that people preferred, in each pair.
        clusters: The cluster of each pair.
    """
    return share_estimate(preferences, clusters) if preferences else None


def repeatability(first: Sequence, second: Sequence, clusters: Sequence[Hashable]) -> dict | None:
    """Estimate how often a judge says the same when it is asked again; None if it was not.

    Args:
        first: Its verdicts, or scores.
        second: Those of the second time.
        clusters: The cluster of each.
    """
    if not first:
        return None
    return share_estimate([float(x == y) for x, y in zip(first, second, strict=True)], clusters)


# -- the length-controlled win rate ----------------------------------------------------------------


def length_controlled(preferences: Sequence[float], gaps: Sequence[float], clusters: Sequence[Hashable]) -> dict | None:
    """Estimate the win rate that a policy would have if all responses were as long as SFT's.

    As in AlpacaEval 2 (Dubois et al. 2024, equation 2), a logistic model of the preferences has a
    term for the policy and one for length, tanh of the difference in standard deviations; the
    prediction without the second term is the win rate. There is no term for how difficult a prompt
    is, which AlpacaEval fits on many policies. Both coefficients have a normal prior around 0, as
    weak as PRIOR_DEVIATION, so that they stay finite where all pairs are won.

    Args:
        preferences: The preference for the policy's response in each pair, (N,).
        gaps: The length of its response minus that of SFT's.
        clusters: The cluster of each pair.

    Returns:
        {"value", "ci95": [low, high], or None with fewer than three clusters, "length_effect": the
        coefficient of length in logits, "n": N}; None without pairs. The jackknife runs on the
        logit, with PSEUDO_PAIRS added as for other shares.
    """
    if not preferences:
        return None
    y, x = np.asarray(preferences, float), length_terms(gaps)
    intercept, slope = fit_logistic(y, x)
    added = np.repeat([1.0, 0.0], PSEUDO_PAIRS)
    y_more, x_more = np.concatenate([y, added]), np.concatenate([x, np.zeros(2 * PSEUDO_PAIRS)])
    more = [*clusters, *(("pseudo pair", i) for i in range(2 * PSEUDO_PAIRS))]

    def logit(keep: np.ndarray) -> float:
        return fit_logistic(y_more[keep], x_more[keep])[0]

    value = float(sigmoid(intercept))
    ends = jackknife_interval(logit, more) if len(set(clusters)) > 2 else None
    ci95 = None
    if ends is not None:
        ci95 = [min(value, float(sigmoid(ends[0]))), max(value, float(sigmoid(ends[1])))]
    return {"value": value, "ci95": ci95, "length_effect": float(slope), "n": len(y)}


def length_terms(gaps: Sequence[float]) -> np.ndarray:
    """Return tanh of the differences in standard deviations, (N,); zeros where all are equal."""
    values = np.asarray(gaps, float)
    deviation = values.std()
    return np.tanh(values / deviation) if deviation > 0 else np.zeros_like(values)


def fit_logistic(y: np.ndarray, x: np.ndarray) -> tuple[float, float]:
    """Fit P(y = 1) = σ(a + b·x) with a normal prior on a and b, by Newton's method.

    Args:
        y: (N,) observations in [0, 1].
        x: (N,) the regressor, in [−1, 1].

    Returns:
        The mode (a, b).
    """
    design, precision = np.stack([np.ones_like(x), x], axis=1), np.eye(2) / PRIOR_DEVIATION**2
    coefficients = np.zeros(2)
    for _ in range(50):
        p = sigmoid(design @ coefficients)
        gradient = design.T @ (y - p) - precision @ coefficients
        curvature = (design * (p * (1 - p))[:, None]).T @ design + precision
        step = np.linalg.solve(curvature, gradient)
        # far from the mode the curvature is too small, and a whole step would overshoot
        coefficients = coefficients + step * min(1.0, 2.0 / max(np.abs(step).max(), 1e-12))
        if np.abs(step).max() < 1e-10:
            break
    return float(coefficients[0]), float(coefficients[1])


def sigmoid(x: np.ndarray | float) -> np.ndarray | float:
    """Return 1 / (1 + e^−x)."""
    return 1 / (1 + np.exp(-np.clip(x, -500, 500)))
