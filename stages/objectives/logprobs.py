"""Log-probabilities and entropies of tokens under logits."""

import torch
from torch import Tensor


def token_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """log softmax(logits)[ids]: logits (…, V) in any dtype, ids (…) → (…) in fp32."""
    logits = logits.float()
    return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def entropy(logits: Tensor) -> Tensor:
    """−Σ p log p in nats: (…, V) → (…) in fp32."""
    logp = logits.float().log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def sequence_logps(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Σ over a response's tokens: (B, R) → (B,)."""
    return torch.where(mask, logprobs, 0.0).sum(-1)
