"""Turn scores into ranks."""

from collections.abc import Sequence


def ranks_of_scores(scores: Sequence[float | None], tie_within: float = 0.0) -> list[int | None]:
    """Rank responses by their scores: the highest is ranked 1, and equal scores are a tie.

    Ranks count the better responses (1, 2, 2, 4), so that no rank exceeds K.

    Args:
        scores: A score per response; None was not scored, and gets no rank.
        tie_within: A response ties with the best one of a tier if its score is at most this much
            lower. A tier never spans more than that, so many small steps do not add up to a tie.

    Returns:
        A rank per response, or None.
    """
    order = sorted((i for i, score in enumerate(scores) if score is not None), key=lambda i: -_known(scores[i]))
    ranks: list[int | None] = [None] * len(scores)
    best, rank = 0.0, 0
    for position, i in enumerate(order, 1):
        score = _known(scores[i])
        if position == 1 or best - score > tie_within:
            best, rank = score, position
        ranks[i] = rank
    return ranks


def _known(score: float | None) -> float:
    """Return a score that is known to be one."""
    assert score is not None
    return score
