"""Check how episodes are cut into micro-batches."""

from hypothesis import given
from hypothesis import strategies as st

from stages.training.batching import in_micro_batches

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@given(LENGTHS, st.integers(1, 4), st.integers(1, 9), st.one_of(st.none(), st.integers(1, 90)))
def test_every_episode_once_in_parts_within_both_limits(lengths, n, size, tokens):
    parts = in_micro_batches(lengths, range(len(lengths)), n, size, tokens)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    for part in parts:
        assert 1 <= len(part) <= size
        groups = {i // n for i in part}
        assert tokens is None or len(groups) == 1 or sum(lengths[i] for i in part) <= tokens


def test_samples_of_a_prompt_stay_together_and_like_lengths_too():
    lengths = [9, 9, 2, 2, 5, 5, 3, 3]
    assert in_micro_batches(lengths, range(8), 2, 4) == [[2, 3, 6, 7], [4, 5, 0, 1]]
    assert in_micro_batches(lengths, range(8), 2, 4, tokens=20) == [[2, 3, 6, 7], [4, 5], [0, 1]]
    assert in_micro_batches(lengths, range(8), 2, 4, tokens=1) == [[2, 3], [6, 7], [4, 5], [0, 1]]
    assert in_micro_batches(lengths, [], 2, 4) == []


def test_a_prompt_with_more_samples_than_fit_is_cut():
    assert in_micro_batches([1] * 6, range(6), 6, 4, tokens=3) == [[0, 1, 2, 3], [4, 5]]
