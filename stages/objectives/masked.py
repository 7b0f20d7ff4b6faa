"""Compute sums, means and whitening over the True entries of a mask.

Whatever is outside the mask, NaN included, changes nothing.
"""

import torch
from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Return the sum of x over the mask, a scalar."""
    # `where` and not a product: 0 · NaN is NaN.
    return torch.where(mask, x, 0.0).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of x over the mask, a scalar; 0 if the mask is empty."""
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Return (x − mean) / √(variance + eps) over the mask, with the biased variance.

    Apply it to whole batches only: a micro-batch has another mean.

    Args:
        x: Any shape.
        mask: Of the same shape.
        shift_mean: Whether the mean becomes 0; otherwise it stays as it is.
        eps: Added to the variance.

    Returns:
        A tensor of the same shape; 0 outside the mask.
    """
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    white = (x - mean) * torch.rsqrt(variance + eps)
    return torch.where(mask, white if shift_mean else white + mean, 0.0)
