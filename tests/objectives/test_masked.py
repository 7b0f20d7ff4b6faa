"""Test sums, means and whitening over a mask against numpy."""

import numpy as np
import pytest
import torch

from stages.objectives.masked import masked_mean, masked_sum, masked_whiten


@pytest.fixture
def x():
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3 + 2


@pytest.fixture
def mask(prefix_mask):
    return prefix_mask([6, 1, 3, 4], 6)


def picked(x, mask):
    return x.numpy()[mask.numpy()]


def test_sum_and_mean_are_numpys_over_the_masked_places(x, mask):
    assert masked_sum(x, mask).item() == pytest.approx(picked(x, mask).sum(), rel=1e-14)
    assert masked_mean(x, mask).item() == pytest.approx(picked(x, mask).mean(), rel=1e-14)


def test_mean_over_nothing_is_zero(x):
    assert masked_mean(x, torch.zeros_like(x, dtype=torch.bool)).item() == 0.0


def test_whitening_is_numpys_with_the_biased_variance(x, mask):
    flat = picked(x, mask)
    white = (flat - flat.mean()) / np.sqrt(flat.var() + 1e-8)  # np.var divides by n
    np.testing.assert_allclose(picked(masked_whiten(x, mask), mask), white, rtol=1e-12)
    np.testing.assert_allclose(picked(masked_whiten(x, mask, shift_mean=False), mask), white + flat.mean(), rtol=1e-12)


def test_whitening_gives_zero_outside_the_mask(x, mask):
    for shift in (True, False):
        assert (masked_whiten(x, mask, shift_mean=shift)[~mask] == 0).all()


def test_whitening_of_equal_numbers_is_finite(mask):
    """A constant reward has no spread; the result is 0, not NaN."""
    assert masked_whiten(torch.full((4, 6), 5.0), mask).abs().max() == 0


def test_nan_under_the_mask_is_unseen(x, mask):
    poisoned = torch.where(mask, x, torch.nan)
    for function in (masked_sum, masked_mean, masked_whiten):
        torch.testing.assert_close(function(poisoned, mask), function(x, mask), rtol=0, atol=0)
