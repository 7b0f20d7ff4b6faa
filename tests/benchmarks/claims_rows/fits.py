"""Fit curves that papers give: over-optimisation (Gao 2023), and power laws.

Pure functions of arrays. Gao, Schulman & Hilton (2023, "Scaling laws for reward model
overoptimization") write the gold reward R, less that of the initial policy, as a function of
d = √KL(policy ‖ initial policy):

    best of n:               R(d) = d (α − β d)
    reinforcement learning:  R(d) = d (α − β ln d)

Both are linear in α and β, so that least squares need no starting values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Form = Literal["best_of_n", "rl"]
"""Which of the two equations."""


@dataclass(frozen=True)
class Fit:
    """Hold the coefficients of a curve, and how well it describes its points."""

    form: Form
    """The equation."""
    alpha: float
    """Slope at the start."""
    beta: float
    """How fast the slope falls."""
    residuals: tuple[float, ...]
    """Each point less the curve."""
    r_squared: float | None
    """Share of the points' sum of squares (R(0) = 0 is known) it explains; None if all are 0."""


def design(form: Form, d: np.ndarray) -> np.ndarray:
    """Return what α and β multiply, (N, 2): d and −d², or d and −d ln d (0 at d = 0)."""
    d = np.asarray(d, float)
    second = d if form == "best_of_n" else np.log(np.where(d > 0, d, 1.0))
    return np.stack([d, -d * second], axis=1)


def share_explained(left: float, total: float) -> float:
    """Return 1 − left / total.

    A fit by least squares leaves at most what was there, so that only rounding leads out of [0, 1].

    Args:
        left: Sum of squares of the residuals.
        total: Sum of squares of what is fitted; above 0.
    """
    return min(1.0, max(0.0, 1.0 - left / total))


def fit(form: Form, d: Sequence[float], reward: Sequence[float]) -> Fit:
    """Fit α and β by least squares.

    Args:
        form: The equation.
        d: (N,) √KL.
        reward: (N,) gold reward less that of the initial policy.

    Raises:
        ValueError: Fewer than two points differ from d = 0 and from one another.
    """
    d, reward = np.asarray(d, float), np.asarray(reward, float)
    if len(set(d[d > 0].round(9))) < 2:
        raise ValueError(f"d is {d.tolist()}; use at least two different values above 0")
    columns = design(form, d)
    (alpha, beta), *_ = np.linalg.lstsq(columns, reward, rcond=None)
    residuals = reward - columns @ (alpha, beta)
    total = float((reward**2).sum())
    explained = share_explained(float((residuals**2).sum()), total) if total > 0 else None
    return Fit(form, float(alpha), float(beta), tuple(map(float, residuals)), explained)


def curve(fitted: Fit, d: Sequence[float]) -> np.ndarray:
    """Return R(d) of a fit, (N,)."""
    return design(fitted.form, np.asarray(d, float)) @ (fitted.alpha, fitted.beta)


def peak(fitted: Fit) -> float | None:
    """Return the d at which R is highest; None if R never falls (β ≤ 0)."""
    if fitted.beta <= 0:
        return None
    ratio = fitted.alpha / fitted.beta
    return max(0.0, ratio / 2) if fitted.form == "best_of_n" else float(np.exp(ratio - 1))


@dataclass(frozen=True)
class Extrapolation:
    """Compare a curve with a straight line on points that neither was fitted to."""

    left_out: tuple[int, ...]
    """Indices of the points left out: those with the largest d."""
    errors: tuple[float, ...]
    """Each such point less the curve."""
    line_errors: tuple[float, ...]
    """Each less the line a·d of the kept points."""

    @property
    def rms(self) -> float:
        """Return the root mean square error of the curve."""
        return float(np.sqrt(np.mean(np.square(self.errors))))

    @property
    def line_rms(self) -> float:
        """Return the root mean square error of the line."""
        return float(np.sqrt(np.mean(np.square(self.line_errors))))


def extrapolate(form: Form, d: Sequence[float], reward: Sequence[float], left_out: int) -> Extrapolation:
    """Fit all but the furthest points, and foretell these.

    Args:
        form: The equation.
        d: (N,) √KL.
        reward: (N,) gold reward less that of the initial policy.
        left_out: How many points to leave out.
    """
    d, reward = np.asarray(d, float), np.asarray(reward, float)
    order = np.argsort(d, kind="stable")
    kept, rest = order[: len(d) - left_out], order[len(d) - left_out :]
    fitted = fit(form, d[kept], reward[kept])
    slope = slope_through_zero(d[kept], reward[kept])
    errors, line_errors = reward[rest] - curve(fitted, d[rest]), reward[rest] - slope * d[rest]
    return Extrapolation(tuple(map(int, rest)), tuple(map(float, errors)), tuple(map(float, line_errors)))


def slope_through_zero(d: np.ndarray, reward: np.ndarray) -> float:
    """Return the slope of the best line through (0, 0), by least squares; d is not all 0."""
    return float(d @ reward / (d @ d))


def line_share(d: Sequence[float], reward: Sequence[float]) -> float | None:
    """Return the share of the sum of squares that the best line through (0, 0) explains.

    It is None where there is nothing to explain, or no point lies beyond 0.
    """
    d, reward = np.asarray(d, float), np.asarray(reward, float)
    total = float((reward**2).sum())
    if not total or not d.any():
        return None
    return share_explained(float(((reward - slope_through_zero(d, reward) * d) ** 2).sum()), total)


def gap_at_equal_kl(ours: Sequence[tuple[float, float]], theirs: Sequence[tuple[float, float]]) -> float | None:
    """Return how far one curve lies above another, a mean over the √KL that both have reached.

    Args:
        ours: (KL, reward) points of a curve; between them it is a straight line in √KL.
        theirs: Those of the other one.

    Returns:
        The mean of ours − theirs; None if the curves share no range of KL.
    """
    curves = []
    for points in (ours, theirs):
        at = sorted((np.sqrt(max(kl, 0.0)), reward) for kl, reward in points)
        curves.append(np.array(at).T)
    low, high = max(x[0][0] for x in curves), min(x[0][-1] for x in curves)
    if not low < high:
        return None
    grid = np.linspace(low, high, 201)
    gap = np.interp(grid, *curves[0]) - np.interp(grid, *curves[1])
    return float(np.trapezoid(gap, grid) / (high - low))


@dataclass(frozen=True)
class PowerLaw:
    """Hold error(n) = scale · n^(−exponent)."""

    scale: float
    """The error at n = 1."""
    exponent: float
    """How fast it falls."""
    r_squared: float
    """Share of the variance of log(error) that it explains."""


def power_law(n: Sequence[float], error: Sequence[float]) -> PowerLaw:
    """Fit a power law, as a line through log(error) against log(n).

    Args:
        n: (N,) sizes, such as numbers of prompts.
        error: (N,) what falls with them, such as 1 − accuracy or the reachable accuracy − accuracy.

    Raises:
        ValueError: A value is not positive, or fewer than two sizes differ.
    """
    n, error = np.asarray(n, float), np.asarray(error, float)
    if (n <= 0).any() or (error <= 0).any() or len(set(n)) < 2:
        raise ValueError(f"sizes {n.tolist()}, errors {error.tolist()}; use positive values and at least two sizes")
    x, y = np.log(n), np.log(error)
    slope, offset = np.polyfit(x, y, 1)
    spread = float(((y - y.mean()) ** 2).sum())
    left = float(((y - slope * x - offset) ** 2).sum())
    explained = share_explained(left, spread) if spread > 0 else 1.0
    return PowerLaw(float(np.exp(offset)), float(-slope), explained)
