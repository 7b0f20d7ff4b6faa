"""Turn an interval over seeds into a verdict, by a rule that is declared before anything runs.

Pure functions. A claim has a main figure and perhaps others. Each has a rule; the verdict of the
claim is that of its main figure, and is weakened where one of the others does not hold.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from stages.page.numbers import fixed

HOLDS, WEAKER, FAILS, UNTOLD, NOT_RUN = VERDICTS = (
    "holds", "weaker", "does not hold", "cannot be told", "not run",
)  # fmt: skip
"""Every verdict, the best first."""
SUPPORTED = (HOLDS, WEAKER)
"""Verdicts by which what the paper says is there at all."""
ROUNDING = 1e-9
"""Width of an interval that is none: all seeds are equal."""
FEWEST_SEEDS = 5
"""Seeds below which a verdict is marked as quick."""


@dataclass(frozen=True)
class Rule:
    """Say what a figure has to be for the claim to hold."""

    direction: Literal["above", "below", "equal", "exactly"] = "above"
    """Where the figure is claimed to lie: above or below `than`, within `nothing` of it, on it."""
    than: float = 0.0
    """The value that it is compared with."""
    nothing: float = 0.0
    """Distance to `than` that counts as none."""
    enough: float = 0.0
    """Distance to `than` below which a mean is weaker than what the paper says."""

    def __post_init__(self) -> None:
        """Refuse a rule that contradicts itself."""
        if self.nothing < 0 or self.enough < 0:
            raise ValueError(f"{self}: distances are positive")
        if self.direction == "exactly" and (self.nothing or self.enough):
            raise ValueError(f"{self}: 'exactly' leaves no distance")
        if self.direction == "equal" and (self.enough or not self.nothing):
            raise ValueError(f"{self}: 'equal' takes the distance `nothing`, and no `enough`")


def verdict_of(value: float | None, ci95: Sequence[float] | None, rule: Rule) -> str:
    """Return what a mean and its interval say by a rule.

    - above (below is its mirror image): it does not hold where the interval does not reach beyond
      `than` + `nothing`. Otherwise, where the whole interval lies above `than`, it holds if the
      mean is at least `enough` and `nothing` away, and is weaker if not.
    - equal: it holds where the whole interval lies within `nothing` of `than`, and does not hold
      where the whole interval lies outside.
    - exactly: a matter of no chance. It holds where the mean is `than`, and otherwise does not.

    Everything else cannot be told; so is an interval without width, which says nothing of other
    seeds.

    Args:
        value: The mean over seeds; None: the figure is not defined on some seed.
        ci95: Its interval; None: there is one seed only.
        rule: The rule.
    """
    if value is not None and rule.direction == "exactly":
        return HOLDS if value == rule.than else FAILS
    if value is None or ci95 is None or ci95[1] - ci95[0] < ROUNDING:
        return UNTOLD
    mean, low, high = (number - rule.than for number in (value, *ci95))
    if rule.direction == "below":
        mean, low, high = -mean, -high, -low
    if rule.direction == "equal":
        if low >= -rule.nothing and high <= rule.nothing:
            return HOLDS
        return FAILS if low > rule.nothing or high < -rule.nothing else UNTOLD
    if high <= rule.nothing:
        return FAILS
    if low <= 0:
        return UNTOLD
    return HOLDS if mean >= max(rule.enough, rule.nothing) else WEAKER


def combined(main: str, others: Sequence[str] = ()) -> str:
    """Return the verdict of a claim.

    Args:
        main: Verdict of its main figure.
        others: Verdicts of its other figures.

    Returns:
        The main one; "weaker" where that holds but one of the others is not "holds" itself.
    """
    if main != HOLDS:
        return main
    return HOLDS if all(other == HOLDS for other in others) else WEAKER


def in_words(rule: Rule, digits: int = 2) -> str:
    """Return a rule as a sentence."""
    least = max(rule.enough, rule.nothing)
    than, nothing, enough = (fixed(number, digits) for number in (rule.than, rule.nothing, least))
    if rule.direction == "equal":
        return f"Holds if the interval lies within ±{nothing} of {than}, does not hold if it lies wholly outside."
    if rule.direction == "exactly":
        return f"Holds if it is {than} on every seed, and otherwise does not."
    side = rule.direction
    limit = fixed(rule.than + (rule.nothing if side == "above" else -rule.nothing), digits)
    other = "below" if side == "above" else "above"
    weaker = f" and the mean is at least {enough} away, weaker if it is nearer" if least else ""
    return f"Holds if the interval lies {side} {than}{weaker}; does not hold if it lies {other} {limit}."


def claims_difference(rule: Rule) -> bool:
    """Return whether a rule asks for a difference that is not 0, so that none at all refutes it."""
    return rule.direction in ("above", "below") and rule.than == 0


def expected_by_chance(intervals: int) -> float:
    """Return how many of so many 95 % intervals miss the true value by chance."""
    return 0.05 * intervals
