"""Sampling with a transformers model and its key-value cache.

Every row draws from its own seed: token t is the inverse of the distribution function at the row's t-th uniform
number. So a response depends on its prompt, its seed and the weights, not on its place in a batch.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


@torch.no_grad()
def sample(
    model,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    *,
    response_length: int,
    eos_id: int,
    pad_id: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 64,
    after_batch: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """One response a prompt: ids up to and including EOS, at most `response_length`.

    seeds: one a row. after_batch(rows done) is called between batches (progress, a request to stop).
    """
    model.eval()  # activation checkpointing, where it is on, would drop the cache in training mode
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # like lengths together: little padding
    responses: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        uniforms = torch.stack(
            [torch.rand(response_length, generator=torch.Generator().manual_seed(seeds[i])) for i in chosen]
        )
        batch = _sample_batch(model, [prompts[i] for i in chosen], uniforms, eos_id, pad_id, temperature, top_p)
        for i, response in zip(chosen, batch, strict=True):
            responses[i] = response
        if after_batch is not None:
            after_batch(start + len(chosen))
    return responses


def _sample_batch(
    model, prompts, uniforms: Tensor, eos_id: int, pad_id: int, temperature: float, top_p: float
) -> list[list[int]]:
    from transformers import DynamicCache

    device = model.device
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts], device=device)
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    uniforms = uniforms.to(device)
    cache = DynamicCache(config=model.config)
    alive = torch.arange(len(prompts), device=device)
    responses: list[list[int]] = [[] for _ in prompts]
    for t in range(uniforms.shape[1]):
        logits = (
            model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            .logits[:, -1]
            .float()
            / temperature
        )
        tokens = draw(logits, uniforms[alive, t], top_p)
        for row, token in zip(alive.tolist(), tokens.tolist(), strict=True):
            responses[row].append(token)
        going = tokens != eos_id
        if not going.any():
            break
        if not going.all():  # finished rows leave the batch
            keep = going.nonzero().squeeze(-1)
            cache.batch_select_indices(keep)
            alive, tokens, mask, positions = alive[keep], tokens[keep], mask[keep], positions[keep]
        ids = tokens.unsqueeze(-1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
        positions = positions[:, -1:] + 1
    return responses


def draw(logits: Tensor, uniform: Tensor, top_p: float = 1.0) -> Tensor:
    """Tokens (B,) at the given quantiles (B,) of softmax(logits) (B, V), cut to the nucleus if top_p < 1."""
    probs = logits.softmax(-1)
    if top_p < 1.0:
        ordered, index = probs.sort(-1, descending=True)
        ordered = torch.where(ordered.cumsum(-1) - ordered < top_p, ordered, 0.0)
        probs = torch.zeros_like(probs).scatter(-1, index, ordered)
    cumulative = probs.double().cumsum(-1)
    chosen = torch.searchsorted(cumulative, uniform.double().unsqueeze(-1) * cumulative[:, -1:], right=True)
    return chosen.squeeze(-1).clamp(max=logits.shape[-1] - 1)
