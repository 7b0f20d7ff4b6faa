"""Estimate shares with intervals, without any numeric library, one observation at a time.

Judgments of one prompt are not independent, so a prompt is a cluster. `rlhf data check` must start
at once, and numpy takes longer to import than a file takes to read.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field

ADDED = 2
"""Clusters at 1, and as many at 0, added to a share before its error (Agresti & Coull 1998)."""
EDGE = 1e-9
"""Means that differ by less count as equal: the rest is rounding."""
FEWEST = 5
"""Clusters from which `t_quantile` is exact enough."""
Z = 1.959963984540054
"""The 0.975 quantile of the normal distribution."""


@dataclass
class Share:
    """Collect observations in [0, 1], and estimate their mean with a 95 % interval."""

    ordinals: dict[int, int] = field(default_factory=dict)
    """Cluster → its position in the two arrays; several shares may have one between them."""
    sums: array[float] = field(default_factory=lambda: array("d"))
    """The sum of each cluster's observations."""
    counts: array[float] = field(default_factory=lambda: array("d"))
    """Their number."""

    def add(self, cluster: int, value: float) -> None:
        """Add an observation.

        Args:
            cluster: A number for the prompt.
            value: The observation.
        """
        ordinal = self.ordinals.setdefault(cluster, len(self.ordinals))
        missing = ordinal + 1 - len(self.sums)  # clusters of another share come between
        if missing > 0:
            self.sums.extend([0.0] * missing)
            self.counts.extend([0.0] * missing)
        self.sums[ordinal] += value
        self.counts[ordinal] += 1

    @property
    def number(self) -> int:
        """Return the number of observations."""
        return int(sum(self.counts))

    @property
    def clusters(self) -> int:
        """Return the number of clusters that have an observation."""
        return sum(1 for number in self.counts if number)

    @property
    def value(self) -> float:
        """Return the mean of all observations."""
        return sum(self.sums) / sum(self.counts)

    def interval(self) -> tuple[float, float]:
        """Return a 95 % interval of the mean of a population of clusters.

        As in the stages' `share_estimate`, it is the narrower of two delete-one jackknifes with
        Student's t: that of the mean after two clusters at 1 and two at 0 have been added, each of
        mean size (without them 5 successes of 5 would be certain), and that of the logit of the
        mean, which exists only where the mean without any one cluster is neither 0 nor 1.
        """
        sums = [s for s, n in zip(self.sums, self.counts, strict=True) if n]
        counts = [n for n in self.counts if n]
        intervals = [with_added_clusters(sums, counts)]
        if (other := of_logit(sums, counts)) is not None:
            intervals.append(other)
        value = self.value
        bounded = [(max(0.0, min(value, low)), min(1.0, max(value, high))) for low, high in intervals]
        return min(bounded, key=lambda interval: interval[1] - interval[0])

    def text(self, what: str = "pairs") -> str:
        """Return the estimate in words: "0.73 (95 % interval 0.68 to 0.78; 312 pairs, 60 prompts)".

        Args:
            what: What an observation is.
        """
        low, high = self.interval()
        counted = f"{self.number:,} {what}, {self.clusters:,} prompts"
        return f"{self.value:.2f} (95 % interval {low:.2f} to {high:.2f}; {counted})"


def with_added_clusters(sums: list[float], counts: list[float]) -> tuple[float, float]:
    """Return the jackknife interval of a mean with ADDED clusters at 1 and as many at 0.

    Args:
        sums: The sum of each cluster's observations.
        counts: Their number.
    """
    size = sum(counts) / len(counts)
    sums = [*sums, *[size] * ADDED, *[0.0] * ADDED]
    counts = [*counts, *[size] * 2 * ADDED]
    center = sum(sums) / sum(counts)
    width = half_width(without_each(sums, counts), center)
    return center - width, center + width


def of_logit(sums: list[float], counts: list[float]) -> tuple[float, float] | None:
    """Return the jackknife interval of the logit of a mean, transformed back.

    Args:
        sums: The sum of each cluster's observations.
        counts: Their number.

    Returns:
        The interval; None if it does not exist, or with fewer than FEWEST clusters.
    """
    if len(sums) < FEWEST:
        return None
    means = without_each(sums, counts)
    if min(means) < EDGE or max(means) > 1 - EDGE or max(means) - min(means) < EDGE:
        return None
    mean = sum(sums) / sum(counts)
    center = math.log(mean / (1 - mean))
    width = half_width([math.log(m / (1 - m)) for m in means], center)
    return 1 / (1 + math.exp(width - center)), 1 / (1 + math.exp(-width - center))


def without_each(sums: list[float], counts: list[float]) -> list[float]:
    """Return the mean over observations without each cluster in turn."""
    total, number = sum(sums), sum(counts)
    return [(total - s) / (number - n) for s, n in zip(sums, counts, strict=True)]


def half_width(estimates: list[float], center: float) -> float:
    """Return half the width of a jackknife interval.

    Args:
        estimates: The estimate without each cluster in turn.
        center: The estimate from all clusters.
    """
    clusters = len(estimates)
    squares = sum((estimate - center) ** 2 for estimate in estimates)
    return t_quantile(clusters - 1) * math.sqrt((clusters - 1) / clusters * squares)


def t_quantile(freedom: int) -> float:
    """Return the 0.975 quantile of Student's t (Hill's expansion around the normal one).

    Args:
        freedom: Degrees of freedom, at least 4: the error is below 0.003.
    """
    z, n = Z, freedom
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * n**4)
    )
