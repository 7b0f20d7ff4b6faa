"""Estimate the difference of two shares over the same prompts, with an interval of some width."""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from stages.evaluation.statistics import share_estimate


def share_difference(ours: Sequence[float], theirs: Sequence[float], clusters: Sequence[Hashable]) -> dict[str, Any]:
    """Estimate the difference of two paired shares, ours − theirs.

    The interval combines those of the two shares, each side for itself, and takes their correlation
    over the prompts into account (Newcombe 1998, method 10). Where neither share varies, as in 0 of
    20 and 0 of 20, it is as wide as these two intervals allow.

    Args:
        ours: For each prompt our share of refusals, in [0, 1].
        theirs: The other policy's.
        clusters: The cluster of each prompt.

    Returns:
        {"value", "ci95", "n"}.
    """
    mine, other = share_estimate(ours, clusters), share_estimate(theirs, clusters)
    value = mine["value"] - other["value"]
    correlation = correlation_of(ours, theirs)
    low = spread(mine["value"] - mine["ci95"][0], other["ci95"][1] - other["value"], correlation)
    high = spread(mine["ci95"][1] - mine["value"], other["value"] - other["ci95"][0], correlation)
    return {"value": value, "ci95": [value - low, value + high], "n": len(ours)}


def spread(one: float, other: float, correlation: float) -> float:
    """Return how far an end of the interval is from the difference."""
    return math.sqrt(max(0.0, one**2 + other**2 - 2 * correlation * one * other))


def correlation_of(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return Pearson's correlation; 0 where one of both is constant."""
    if np.ptp(ours) == 0 or np.ptp(theirs) == 0:
        return 0.0
    return float(np.corrcoef(ours, theirs)[0, 1])
