"""Compute log-probabilities and entropies of tokens from logits."""

import torch
from torch import Tensor


def token_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """Return log softmax(logits)[ids].

    Args:
        logits: (…, V) in any dtype.
        ids: (…).

    Returns:
        (…) in fp32.
    """
    logits = logits.float()
    return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def entropy(logits: Tensor) -> Tensor:
    """Return −Σ p log p in nats: (…, V) → (…) in fp32."""
    logp = logits.float().log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def sequence_logps(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Return the sum of the log-probabilities of each response's tokens: (B, R) → (B,)."""
    return torch.where(mask, logprobs, 0.0).sum(-1)
