"""Compute log-probabilities of tokens from hidden states without a (tokens × vocabulary) tensor.

The head works on chunks of rows. For the gradient, the log-softmax of each chunk is kept as long as
all of them fit in `KEPT` numbers; otherwise it is computed again in the backward pass. Memory does
not grow with B · R · V.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits at a time. On a CPU 24 MB: from 32 MB on, malloc maps new pages for each allocation.
CHUNK = {"cpu": 6 * 2**20, "cuda": 2**26, "mps": 2**26}
KEPT = 2**26  # log-probabilities kept for the backward pass: 256 MB
EXCLUDED = -1e9  # logit of a token left out: its probability is exactly 0, and its product with the logarithm too


def head_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    temperature: float = 1.0,
    with_entropy: bool = False,
    chunk: int | None = None,
    kept: int = KEPT,
    excluded: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return log softmax(hidden · weightᵀ / temperature)[ids] and the entropy of that softmax.

    Args:
        hidden: Hidden states, (n, d).
        weight: The unembedding, (V, d).
        ids: Tokens, (n,).
        temperature: Divides the logits.
        with_entropy: Whether to compute the entropy; it has no gradient.
        chunk: Logits at a time; None: what suits the device.
        kept: Log-probabilities that may be kept for the backward pass.
        excluded: Tokens (m,) that are left out of the softmax; None: none.

    Returns:
        Log-probabilities and entropies (or None), (n,) each, in fp32; products are in autocast's
        dtype.
    """
    return _HeadLogprobs.apply(hidden, weight, ids, temperature, with_entropy, chunk, kept, excluded)


class _HeadLogprobs(torch.autograd.Function):
    """Compute `head_logprobs` with a backward pass that needs no logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        ids: Tensor,
        temperature: float,
        with_entropy: bool,
        chunk: int | None,
        kept: int,
        excluded: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        else:
            dtype = torch.promote_types(hidden.dtype, weight.dtype)
        h, w = hidden.to(dtype), weight.to(dtype)
        size = max(1, (chunk or CHUNK.get(device, CHUNK["cuda"])) // weight.shape[0])
        keep = any(ctx.needs_input_grad[:2]) and len(h) * weight.shape[0] <= kept
        logprobs = h.new_empty(len(h), dtype=torch.float32)
        entropy = torch.empty_like(logprobs) if with_entropy else None
        pieces = []
        for start in range(0, len(h), size):
            rows = slice(start, start + size)
            logp = _log_softmax(h[rows], w, temperature, excluded)
            logprobs[rows] = logp.gather(-1, ids[rows].unsqueeze(-1)).squeeze(-1)
            if with_entropy:
                entropy[rows] = -dot(logp, logp.exp())
            if keep:
                pieces.append(logp)
        ctx.save_for_backward(h, w, ids, *pieces)
        ctx.temperature, ctx.size, ctx.dtypes = temperature, size, (hidden.dtype, weight.dtype)
        ctx.excluded = excluded
        if with_entropy:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple:
        """Return the gradients, by ∂ log p_id / ∂ logits = onehot(id) − p."""
        h, w, ids, *pieces = ctx.saved_tensors
        grad_h = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        grad_w = torch.zeros_like(w, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for i, start in enumerate(range(0, len(h), ctx.size)):
            rows = slice(start, start + ctx.size)
            logp = pieces[i] if pieces else _log_softmax(h[rows], w, ctx.temperature, ctx.excluded)
            g = (grad[rows] / ctx.temperature).unsqueeze(-1)
            slope = logp.exp().mul_(-g)
            slope.scatter_add_(-1, ids[rows].unsqueeze(-1), g)
            slope = slope.to(h.dtype)
            if grad_h is not None:
                torch.mm(slope, w, out=grad_h[rows])
            if grad_w is not None and h.dtype == torch.float32:
                grad_w.addmm_(slope.T, h[rows])
            elif grad_w is not None:
                grad_w += slope.T @ h[rows]
        hidden, weight = ctx.dtypes
        return (
            None if grad_h is None else grad_h.to(hidden),
            None if grad_w is None else grad_w.to(weight),
            *[None] * 6,
        )


def _log_softmax(h: Tensor, w: Tensor, temperature: float, excluded: Tensor | None) -> Tensor:
    """Return log softmax(h · wᵀ / temperature) in fp32, (rows, V)."""
    logits = (h @ w.T).float()
    if excluded is not None:
        logits.index_fill_(-1, excluded, EXCLUDED)
    if temperature != 1.0:
        logits /= temperature
    return logits.log_softmax(-1)


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Return Σ x y over the last dimension of two (n, V) tensors, in fp32 even under autocast.

    The product x · y is never in memory.
    """
    with torch.autocast(x.device.type, enabled=False):
        return torch.bmm(x.unsqueeze(-2), y.unsqueeze(-1)).flatten()
