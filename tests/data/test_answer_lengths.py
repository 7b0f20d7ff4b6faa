"""Estimate from 21 quantiles how many answers a limit cuts."""

import random

import pytest

from data.answer_lengths import STEPS, describe, quantiles, share_over, warning


def test_quantiles_are_lengths_that_so_many_do_not_exceed():
    assert quantiles([]) == [] and quantiles([7]) == [7] * (STEPS + 1)
    marks = quantiles(range(1, 101))
    assert marks == [1, *range(5, 101, 5)]


@pytest.mark.parametrize("limit", [1, 20, 44, 48, 100, 119, 120, 500])
def test_the_share_over_a_limit_is_near_the_counted_one(limit):
    draw = random.Random(0)
    lengths = [min(120, int(draw.lognormvariate(3.8, 0.5))) for _ in range(2000)]
    counted = sum(length > limit for length in lengths) / len(lengths)
    assert share_over(quantiles(lengths), limit) == pytest.approx(counted, abs=0.03)


def test_few_lengths_and_equal_ones():
    assert share_over(quantiles([5, 5, 5]), 5) == 0.0 and share_over(quantiles([5, 5, 5]), 4) == 1.0
    assert share_over([], 4) == 0.0


def test_a_warning_where_more_than_a_tenth_would_be_cut():
    """Use answers of 44 tokens in the median, with which PPO once learned not to finish."""
    marks = quantiles([20, 30, 40, 44, 44, 50, 60, 80, 100, 120])
    line = warning(marks, 48)
    assert "44 tokens in the median" in line and "are over 48, ppo.response_length" in line
    assert "raise it to 120" in line
    assert warning(marks, 119) is None and warning(marks, 120) is None and warning([], 1) is None
    assert describe(marks, 120).endswith("none is over 120")
