"""Sums, means and whitening over the places where a mask is True; what stands elsewhere, NaN included, is unseen."""

import torch
from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Σ of x where mask; a scalar. `where` and not a product: 0 · NaN is NaN."""
    return torch.where(mask, x, 0.0).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Σ of x where mask, over the number of True places; of none: 0."""
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """(x − mean) / √(variance + eps) over the mask (biased variance); the mean is added back if not `shift_mean`.

    Whole batches only: a micro-batch has another mean. 0 outside the mask.
    """
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    white = (x - mean) * torch.rsqrt(variance + eps)
    return torch.where(mask, white if shift_mean else white + mean, 0.0)
