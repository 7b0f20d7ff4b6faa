"""Summarise how long answers are, and estimate how many of them a limit would cut.

Lengths are in tokens, EOS included.
"""

from collections.abc import Sequence

STEPS = 20
"""Steps between the quantiles: one at every 5 %."""
MANY = 0.1
"""Share of cut answers above which PPO first learns length and nothing else."""


def quantiles(lengths: Sequence[int]) -> list[int]:
    """Return the lengths that 0, 5, … 100 % of all do not exceed: 21 numbers, or [] of none."""
    ordered = sorted(lengths)
    if not ordered:
        return []
    # -(-a // b) rounds up
    return [ordered[max(0, -(-step * len(ordered) // STEPS) - 1)] for step in range(STEPS + 1)]


def share_over(marks: Sequence[int], limit: int) -> float:
    """Estimate the share of lengths above a limit, by linear interpolation between quantiles.

    Args:
        marks: The quantiles.
        limit: The limit, in tokens.
    """
    if not marks or limit >= marks[-1]:
        return 0.0
    above = next(step for step, mark in enumerate(marks) if mark > limit)
    if above == 0:
        return 1.0
    low, high = marks[above - 1], marks[above]
    return 1 - (above - 1 + (limit - low) / (high - low)) / STEPS


def describe(marks: Sequence[int], limit: int) -> str:
    """Describe how many answers fit: "44 tokens in the median, 95 % up to 120; 23 % are over 48".

    Args:
        marks: The quantiles of the answers' lengths.
        limit: The limit, in tokens.
    """
    over = share_over(marks, limit)
    cut = f"{over:.0%} are over {limit}" if over else f"none is over {limit}"
    return f"{marks[STEPS // 2]} tokens in the median, 95 % up to {marks[-2]}; {cut}"


def warning(marks: Sequence[int], limit: int) -> str | None:
    """Return a warning if more than 10 % of the demonstrations' answers exceed ppo.response_length.

    Args:
        marks: The quantiles of the answers' lengths; [] if they are not known.
        limit: ppo.response_length.

    Returns:
        The sentence; None if the answers fit, or nothing is known of them.
    """
    if share_over(marks, limit) <= MANY:
        return None
    return (
        f"the demonstrations' answers have {describe(marks, limit)}, ppo.response_length: such answers are cut, and "
        f"length is learned before anything else; raise it to {marks[-2]}, raise ppo.max_length by as much, and raise "
        f"both of evaluate to match"
    )
