"""Provide gradients by finite differences, autograd gradients and masks to these tests."""

import pytest
import torch


def _finite_difference(function, x, step=1e-6):
    """Return the central differences of a scalar function at x, without autograd."""
    gradient = torch.zeros_like(x)
    flat, out = x.detach().clone().reshape(-1), gradient.view(-1)
    for i in range(flat.numel()):
        moved = []
        for sign in (1, -1):
            point = flat.clone()
            point[i] += sign * step
            moved.append(float(function(point.view_as(x))))
        out[i] = (moved[0] - moved[1]) / (2 * step)
    return gradient


def _gradient(function, x):
    """Return value and autograd gradient of a scalar function at x."""
    x = x.detach().clone().requires_grad_(True)
    value = function(x)
    (gradient,) = torch.autograd.grad(value, x)
    return value.detach(), gradient


@pytest.fixture
def finite_difference():
    return _finite_difference


@pytest.fixture
def gradient_of():
    return _gradient


@pytest.fixture
def prefix_mask():
    """Return (B, R) masks that are True for the first so many places of each row."""
    return lambda lengths, width: torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]
