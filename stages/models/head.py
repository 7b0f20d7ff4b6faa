"""Hidden states → log-probabilities of given tokens, through the unembedding, without (tokens × vocabulary) in between.

The head works in chunks of rows. For the gradient each chunk's log-softmax is kept while all of them fit in
`KEPT` numbers, and computed again in the backward pass where they do not: memory does not grow with B · R · V.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = {"cpu": 6 * 2**20, "cuda": 2**26}  # logits at a time; on a CPU 24 MB: from 32 MB on an allocation is new pages
KEPT = 2**26  # log-probabilities kept for the backward pass: 256 MB


def head_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    temperature: float = 1.0,
    with_entropy: bool = False,
    chunk: int | None = None,
    kept: int = KEPT,
) -> tuple[Tensor, Tensor | None]:
    """hidden (n, d), weight (V, d), ids (n,) → log softmax(hidden weightᵀ / temperature)[ids], (n,), and its entropy.

    Both fp32, products in the autocast dtype. The entropy carries no gradient; None if it is not asked for.
    chunk: logits at a time, by default as many as suit the device; kept: log-probs kept for the backward pass.
    """
    return _HeadLogprobs.apply(hidden, weight, ids, temperature, with_entropy, chunk, kept)


class _HeadLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, ids, temperature, with_entropy, chunk, kept):
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
            logp = _log_softmax(h[rows], w, temperature)
            logprobs[rows] = logp.gather(-1, ids[rows].unsqueeze(-1)).squeeze(-1)
            if with_entropy:
                entropy[rows] = -dot(logp, logp.exp())
            if keep:
                pieces.append(logp)
        ctx.save_for_backward(h, w, ids, *pieces)
        ctx.temperature, ctx.size, ctx.dtypes = temperature, size, (hidden.dtype, weight.dtype)
        if with_entropy:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        """∂ log p_id / ∂ logits = onehot(id) − p."""
        h, w, ids, *pieces = ctx.saved_tensors
        grad_h = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        grad_w = torch.zeros_like(w, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for i, start in enumerate(range(0, len(h), ctx.size)):
            rows = slice(start, start + ctx.size)
            logp = pieces[i] if pieces else _log_softmax(h[rows], w, ctx.temperature)
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
            *[None] * 5,
        )


def _log_softmax(h: Tensor, w: Tensor, temperature: float) -> Tensor:
    logits = (h @ w.T).float()
    if temperature != 1.0:
        logits /= temperature
    return logits.log_softmax(-1)


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Σ x y over the last dimension of (n, V) in fp32, also under autocast, without their product in memory."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.bmm(x.unsqueeze(-2), y.unsqueeze(-1)).flatten()
