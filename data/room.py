"""How long answers are, and how many of them a limit would cut. Lengths: tokens, EOS included."""

from collections.abc import Sequence

STEPS = 20  # quantiles at every 5 %
MANY = 0.1  # share of cut answers beyond which length is learned before anything else


def quantiles(lengths: Sequence[int]) -> list[int]:
    """Return the lengths that 0, 5, … 100 % of all do not exceed; [] of none."""
    ordered = sorted(lengths)
    if not ordered:
        return []
    return [ordered[max(0, -(-k * len(ordered) // STEPS) - 1)] for k in range(STEPS + 1)]


def share_over(marks: Sequence[int], limit: int) -> float:
    """Estimate which share of lengths is over a limit, from their `quantiles`: within a step, by proportion."""
    if not marks or limit >= marks[-1]:
        return 0.0
    above = next(k for k, mark in enumerate(marks) if mark > limit)
    if above == 0:
        return 1.0
    low, high = marks[above - 1], marks[above]
    return 1 - (above - 1 + (limit - low) / (high - low)) / STEPS


def describe(marks: Sequence[int], limit: int) -> str:
    """Say how many answers fit in a limit: "44 tokens in the median, 95 % up to 120; 23 % are over 48"."""
    over = share_over(marks, limit)
    cut = f"{over:.0%} are over {limit}" if over else f"none is over {limit}"
    return f"{marks[STEPS // 2]} tokens in the median, 95 % up to {marks[-2]}; {cut}"


def warning(marks: Sequence[int], limit: int) -> str | None:
    """Return a sentence if more than `MANY` of the demonstrations' answers do not fit in ppo.response_length; None if
    they fit, or nothing is known of them.

    Args:
        marks: quantiles of the answers' lengths.
        limit: ppo.response_length.
    """
    if share_over(marks, limit) <= MANY:
        return None
    return (
        f"the demonstrations' answers have {describe(marks, limit)}, ppo.response_length: such answers are cut, and "
        f"length is learned before anything else; raise it to {marks[-2]}, ppo.max_length by as much, and evaluate's "
        f"alike"
    )
