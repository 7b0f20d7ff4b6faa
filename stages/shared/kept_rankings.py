"""Choose the rankings that are kept to train a judge, which nothing else learns from. Pure.

A prompt is on one side only: training, validation, or the judge's. Where people's names allow it,
the judge's rankings come from labelers who rank for nothing else, so that training and judge do not
share one person's taste either. Otherwise they are chosen by the hash of the prompt, as validation
is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.streams import held_out_limit, position_of

TRAIN, VALIDATION, JUDGE, NOBODY = range(4)
"""The sides of a split. NOBODY has what both labelers of the judge and others ranked."""
FEWEST_PROMPTS = 100
"""Prompts of the judge below which none are kept, unless a share is set: it would learn nothing."""
FEWEST_LABELERS = 2
"""Labelers on each side: what one person likes is no judgement of others."""
MOST_OF_SHARE, LEAST_OF_SHARE = 1.5, 0.5
"""How far the judge's rankings may be from the share that is asked, where labelers are apart."""
MOST_LEFT_OUT = 0.1
"""Share of rankings that may be left out to keep labelers apart."""


@dataclass(frozen=True)
class Split:
    """Say on which side each of N rankings is."""

    sides: np.ndarray
    """The side of each ranking, (N,)."""
    labelers_apart: bool = False
    """Whether the judge's labelers rank nothing that others learn from."""

    def count(self, side: int) -> int:
        """Return the number of rankings on a side."""
        return int((self.sides == side).sum())


def split_rankings(
    positions: np.ndarray, labelers: np.ndarray, names: Sequence[str], validation: float, judge: float
) -> Split:
    """Split rankings into training, validation and the judge's.

    Validation is what it is without a judge.

    Args:
        positions: The position of each ranking's prompt, as of `position_of`, (N,).
        labelers: The index of each ranking's labeler in `names`; -1 where none is named, (N,).
        names: The names of the labelers.
        validation: The share of prompts for validation.
        judge: The share of prompts for the judge; 0: none.
    """
    is_held_out = positions <= held_out_limit(positions, validation)
    sides = np.where(is_held_out, VALIDATION, TRAIN)
    if not judge:
        return Split(sides)
    by_labeler = split_by_labeler(sides, positions, labelers, names, judge)
    if by_labeler is not None:
        return by_labeler
    is_judged = ~is_held_out & (positions <= held_out_limit(positions, validation + judge))
    return Split(np.where(is_judged, JUDGE, sides))


def split_by_labeler(
    sides: np.ndarray, positions: np.ndarray, labelers: np.ndarray, names: Sequence[str], judge: float
) -> Split | None:
    """Keep the rankings of some labelers for the judge.

    A prompt that others ranked too is for training, without what the judge's labelers say of it.

    Args:
        sides: Which rankings are for validation, and which are not, (N,).
        positions: As of `split_rankings`.
        labelers: As of `split_rankings`.
        names: As of `split_rankings`.
        judge: The share of prompts for the judge.

    Returns:
        The split, or None where too few labelers are named, or one side would have too little.
    """
    is_free = sides == TRAIN
    if (labelers < 0).any() or not is_free.any():
        return None
    target = judge * len(sides)
    chosen = choose_labelers(np.bincount(labelers[is_free], minlength=len(names)), names, target)
    is_of_judge = is_free & np.isin(labelers, chosen)
    with_others = np.unique(positions[is_free & ~is_of_judge])
    is_shared = is_of_judge & np.isin(positions, with_others)
    found = np.where(is_shared, NOBODY, np.where(is_of_judge, JUDGE, sides))
    kept, others = (np.unique(labelers[found == side]) for side in (JUDGE, TRAIN))
    if min(len(kept), len(others)) < FEWEST_LABELERS:
        return None
    if (found == JUDGE).sum() < LEAST_OF_SHARE * target or is_shared.sum() > MOST_LEFT_OUT * len(sides):
        return None
    if len(np.unique(positions[found == JUDGE])) < FEWEST_PROMPTS:
        return None
    return Split(found, labelers_apart=True)


def choose_labelers(counts: np.ndarray, names: Sequence[str], target: float) -> list[int]:
    """Choose labelers by the hash of their names until they have enough rankings.

    Args:
        counts: The number of rankings of each labeler.
        names: The names of the labelers.
        target: The number of rankings that is asked.

    Returns:
        Indices of labelers. A labeler with more rankings than fit is passed over.
    """
    chosen: list[int] = []
    total = 0
    for index in sorted(range(len(names)), key=lambda i: position_of(f"labeler {names[i]}")):
        if total < target and total + counts[index] <= MOST_OF_SHARE * target:
            chosen.append(index)
            total += int(counts[index])
    return chosen
