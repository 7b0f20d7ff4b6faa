"""Sampling with a transformers model and its key-value cache.

Every row draws from its own seed: token t is the inverse of the distribution function at the row's t-th uniform
number. So a response depends on its prompt, its seed and the weights, not on its place in a batch.
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.models.forward import head_is_linear
from stages.models.head import dot
from stages.models.packing import packs
from stages.rollouts.lanes import lane_for

BLOCK = 128  # tokens of the vocabulary whose probabilities are summed before one of them is looked for
LEAVE = 0.75  # finished rows leave the cache once no more than this share of its rows goes on
FOURS = 4  # in a steady lane the cache's rows stay a multiple: a product with 13 rows takes longer than one with 16


@dataclass(frozen=True)
class Sampled:
    """Responses: ids up to and including EOS; logprobs, entropy (B, R) of their tokens as sampled, 0 behind the end."""

    responses: list[list[int]]
    logprobs: Tensor
    entropy: Tensor


def sample(model, prompts, seeds, **options) -> list[list[int]]:
    """One response a prompt; see `sample_with_logprobs`."""
    return sample_with_logprobs(model, prompts, seeds, **options).responses


@torch.no_grad()
def sample_with_logprobs(
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
    poll: Callable[[], None] | None = None,
) -> Sampled:
    """One response of at most `response_length` tokens a prompt. A prompt that stands several times in succession is
    read once, if the model packs (`can_pack`).

    seeds: one a row. poll() is called before each token: what it raises ends the sampling (a request to stop).
    logprobs and entropy are those of softmax(logits / temperature), whatever top_p.
    """
    model.eval()  # activation checkpointing, where it is on, would drop the cache in training mode
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # like lengths together: little padding
    responses: list[list[int]] = [[] for _ in prompts]
    logprobs = torch.zeros(len(prompts), response_length, device=model.device)
    entropy = torch.zeros_like(logprobs)
    make_lane = lane_for(model, packs(model) and head_is_linear(model))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        uniforms = torch.stack(
            [torch.rand(response_length, generator=torch.Generator().manual_seed(seeds[i])) for i in chosen]
        ).to(model.device)
        lane = make_lane(model, [prompts[i] for i in chosen], response_length, pad_id)
        with cast_once(model):
            tokens, logp, spread = _decode(lane, uniforms, eos_id, temperature, top_p, poll or (lambda: None))
        at = torch.tensor(chosen, device=model.device)
        logprobs[at, : logp.shape[1]], entropy[at, : logp.shape[1]] = logp, spread
        for i, response in zip(chosen, tokens.tolist(), strict=True):
            responses[i] = response[: response.index(eos_id) + 1] if eos_id in response else response
    width = max(map(len, responses))
    return Sampled(responses, logprobs[:, :width], entropy[:, :width])


@contextmanager
def cast_once(model):
    """Inside, autocast keeps its cast of every weight: it does so for those that require a gradient alone, and would
    cast the frozen base of an adapter anew at each step."""
    casts = torch.is_autocast_enabled(model.device.type)
    frozen = [p for p in model.parameters() if casts and not p.requires_grad and p.is_floating_point()]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


def _decode(
    lane, uniforms: Tensor, eos_id: int, temperature: float, top_p: float, poll: Callable[[], None]
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (B, R), EOS from the end of each row on; their log-probs and entropies, 0 behind the end."""
    rows, width = uniforms.shape
    drawn = torch.full((rows, width), eos_id, device=uniforms.device)
    logprobs = torch.zeros(rows, width, device=uniforms.device)
    entropy = torch.zeros_like(logprobs)
    at = torch.arange(rows, device=uniforms.device)  # the rows that the lane holds
    going = torch.ones_like(at, dtype=torch.bool)  # those of them that have not ended
    logits = lane.start()
    for t in range(width):
        poll()
        logits = logits.float()
        logp = (logits if temperature == 1.0 else logits / temperature).log_softmax(-1)
        probs = logp.exp()
        tokens = torch.where(going, pick(nucleus(probs, top_p), uniforms[at, t]), eos_id)
        drawn[at, t] = tokens
        logprobs[at, t] = torch.where(going, logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), 0.0)
        spread = -dot(probs, logp.clamp(min=-1e30))
        entropy[at, t] = torch.where(going, spread, 0.0)
        going &= tokens != eos_id
        alive = int(going.sum())
        if alive == 0 or t + 1 == width:
            return drawn[:, : t + 1], logprobs[:, : t + 1], entropy[:, : t + 1]
        rows = rows_to_keep(alive, len(at), lane.steady)
        if rows < len(at):  # those that go on, and as many finished ones as fill up
            kept = going.logical_not().argsort(stable=True)[:rows]
            if lane.keep(kept):
                at, going, tokens = at[kept], going[kept], tokens[kept]
        logits = lane.step(tokens)


def rows_to_keep(alive: int, held: int, steady: bool) -> int:
    """How many of the `held` rows of a cache stay, `alive` of which go on. Leaving takes a copy of the cache."""
    if not steady:
        return alive if alive <= LEAVE * held else held
    rows = -(-alive // FOURS) * FOURS
    return rows if 2 * rows <= held else held


def draw(logits: Tensor, uniform: Tensor, top_p: float = 1.0) -> Tensor:
    """Tokens (B,) at the given quantiles (B,) of softmax(logits) (B, V), cut to the nucleus if top_p < 1."""
    return pick(nucleus(logits.softmax(-1), top_p), uniform)


def nucleus(probs: Tensor, top_p: float) -> Tensor:
    """probs (B, V) with all but the smallest set of most probable tokens that reaches `top_p` set to 0."""
    if top_p >= 1.0:
        return probs
    ordered, index = probs.sort(-1, descending=True)
    ordered = torch.where(ordered.cumsum(-1) - ordered < top_p, ordered, 0.0)
    return torch.zeros_like(probs).scatter(-1, index, ordered)


def pick(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first token whose cumulative weight exceeds uniform · total: weights (B, V) ≥ 0, uniform (B,) in [0, 1).

    In two steps, a block of the vocabulary and a token of it: cumulative sums are slow, and need double precision.
    """
    B, V = weights.shape
    blocks = F.pad(weights, (0, -V % BLOCK)).view(B, -1, BLOCK)
    sums = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    target = uniform.double().unsqueeze(-1) * sums[:, -1:]
    block = _first_above(sums, target)
    below = torch.where(block > 0, sums.gather(-1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks[torch.arange(B, device=block.device), block.squeeze(-1)].double().cumsum(-1)
    token = _first_above(inside, target - below)
    return (block * BLOCK + token).squeeze(-1).clamp(max=V - 1)


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """(B, 1): the first index whose cumulative sum (B, n) exceeds the target; rounding finds no empty place. Sums that
    are not finite give the last index: the token's log-prob tells, and the episode is refused for it."""
    target = torch.minimum(target, cumulative[:, -1:] * (1 - 1e-15))
    return torch.searchsorted(cumulative, target, right=True).clamp(max=cumulative.shape[-1] - 1)
