"""Check which rankings are kept for a judge: prompts apart always, labelers where they can be."""

import itertools

import numpy as np
import pytest

from data.streams import held_out_limit, position_of
from stages.shared.kept_rankings import JUDGE, NOBODY, TRAIN, VALIDATION, choose_labelers, split_rankings

SHARE = 0.2


def ranked(prompts: int, labelers: int, each: int = 1):
    """Return (positions, labelers, names) where `each` labelers rank a prompt, in turn."""
    rows = [(f"prompt {i}", (i * each + k) % labelers) for i in range(prompts) for k in range(each)]
    positions = np.array([position_of(prompt) for prompt, _ in rows])
    return positions, np.array([k for _, k in rows]), [f"person {k}" for k in range(labelers)]


def sides_of(split, values, *sides):
    """Return the different values of some sides."""
    return set(np.asarray(values)[np.isin(split.sides, sides)].tolist())


CASES = {
    "one labeler a prompt": ranked(1000, 12),
    "two labelers a prompt": ranked(1000, 12, each=2),
    "all rank everything": ranked(200, 5, each=5),
    "two labelers": ranked(500, 2),
    "few prompts": ranked(12, 6),
}


@pytest.mark.parametrize("case", CASES)
def test_no_prompt_is_on_two_sides_and_validation_is_what_it_was(case):
    positions, labelers, names = CASES[case]
    split = split_rankings(positions, labelers, names, 0.1, SHARE)
    for one, other in itertools.combinations((TRAIN, VALIDATION, JUDGE), 2):
        assert not sides_of(split, positions, one) & sides_of(split, positions, other)
    without = split_rankings(positions, labelers, names, 0.1, 0.0)
    assert ((split.sides == VALIDATION) == (without.sides == VALIDATION)).all()
    assert ((without.sides == VALIDATION) == (positions <= held_out_limit(positions, 0.1))).all()
    assert not without.count(JUDGE) and min(split.count(TRAIN), split.count(JUDGE)) > 0
    assert split.count(NOBODY) <= 0.1 * len(positions)


def test_labelers_are_apart_where_each_prompt_has_one():
    positions, labelers, names = CASES["one labeler a prompt"]
    split = split_rankings(positions, labelers, names, 0.1, SHARE)
    assert split.labelers_apart and not split.count(NOBODY)
    own, others = sides_of(split, labelers, JUDGE), sides_of(split, labelers, TRAIN)
    assert not own & others and len(own) >= 2 and own | others == set(range(12))
    assert 0.5 * SHARE <= split.count(JUDGE) / len(positions) <= 1.5 * SHARE


def test_what_few_prompts_have_in_common_is_left_out():
    """Every 31st prompt has a second labeler."""
    positions, labelers, names = CASES["one labeler a prompt"]
    again = np.arange(0, len(positions), 31)
    positions = np.concatenate([positions, positions[again]])
    labelers = np.concatenate([labelers, (labelers[again] + 6) % 12])
    split = split_rankings(positions, labelers, names, 0.1, SHARE)
    assert split.labelers_apart and split.count(NOBODY) > 0
    own, others = sides_of(split, labelers, JUDGE), sides_of(split, labelers, TRAIN)
    assert not own & others
    left_out = split.sides == NOBODY
    assert set(labelers[left_out].tolist()) <= own, "the others' rankings of the prompt train"
    assert sides_of(split, positions, NOBODY) <= sides_of(split, positions, TRAIN)


@pytest.mark.parametrize("case", ["all rank everything", "two labelers", "few prompts", "two labelers a prompt"])
def test_otherwise_prompts_are_kept_by_their_hash(case):
    positions, labelers, names = CASES[case]
    split = split_rankings(positions, labelers, names, 0.1, SHARE)
    if case == "two labelers a prompt":  # neighbours rank together, so some rank with few others
        assert split.count(NOBODY) <= 0.1 * len(positions)
        return
    assert not split.labelers_apart and not split.count(NOBODY)
    low, high = (held_out_limit(positions, share) for share in (0.1, 0.1 + SHARE))
    assert ((split.sides == JUDGE) == ((positions > low) & (positions <= high))).all()


def test_a_labeler_without_a_name_may_be_anybody():
    positions, labelers, names = CASES["one labeler a prompt"]
    labelers = np.where(np.arange(len(labelers)) == 7, -1, labelers)
    assert not split_rankings(positions, labelers, names, 0.1, SHARE).labelers_apart


def test_a_prompt_stays_on_its_side_when_the_file_grows():
    positions, labelers, names = CASES["two labelers"]
    whole = split_rankings(positions, labelers, names, 0.1, SHARE)
    half = split_rankings(positions[:250], labelers[:250], names, 0.1, SHARE)
    assert (whole.sides[:250] == half.sides).all()


def test_a_labeler_with_most_of_the_rankings_is_passed_over():
    names = [f"person {k}" for k in range(6)]
    counts = np.array([50, 50, 50, 5000, 50, 50])
    chosen = choose_labelers(counts, names, target=100)
    assert 3 not in chosen and 100 <= counts[chosen].sum() <= 150
    assert chosen == choose_labelers(counts, names, target=100)
