"""Compute a row on several processes, each its part of the tokens (context parallelism).

Everything in a transformer but attention treats tokens one by one. In attention, a process has the
queries of its own tokens, and gathers the keys and values of all: with grouped heads they are a
fraction of what a layer computes, and any mask works, so also packed rows (Llama 3 trained so).
torch's own ring attention (torch.distributed.tensor.experimental.context_parallel) serves the three
CUDA kernels only, and takes no mask.

Each process of a group computes the loss of the same rows, from results that each computes for its
own tokens and that are then summed. The loss is divided by the size of the group before the
backward pass (`parallel.for_sum`), and gradients are summed over all processes. So every operation
here has the gradient of a sum over processes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist

from data.groups import Rows
from pipeline.launch.parallel import arrangement
from stages.models.adapters import unwrapped

FLAG = "cuts_rows"  # in the __dict__ of a model that computes rows in parts (`runtime.cut_rows_of`)


@dataclass(frozen=True)
class Part:
    """The part of some rows that this process computes: tokens `start` to `stop` of each."""

    start: int
    """Index of its first token, in the row."""
    stop: int
    """Index after its last token; the row may end before."""
    mask: Tensor
    """(1, 1, stop − start, T'): which of all tokens a token attends to; T' has padding."""


def compute_whole_rows(model: nn.Module) -> None:
    """Let a model compute whole rows again, for work that other processes do not follow."""
    unwrapped(model).__dict__.pop(FLAG, None)


def cuts_rows(model: nn.Module) -> bool:
    """Return whether a model computes rows in parts."""
    return FLAG in unwrapped(model).__dict__


# -- the sums over a group -----------------------------------------------------------------------


class _GatherTokens(torch.autograd.Function):
    """Concatenate the tokens (dimension 2) of all processes; a gradient goes back to its token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group, ctx.size = group, dist.get_world_size(group)
        own = x.movedim(2, 0).contiguous()
        whole = own.new_empty((ctx.size * own.shape[0], *own.shape[1:]))
        dist.all_gather_single(whole, own, group=group)
        return whole.movedim(0, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        whole = grad.movedim(2, 0).contiguous()
        own = whole.new_empty((whole.shape[0] // ctx.size, *whole.shape[1:]))
        dist.reduce_scatter_single(own, whole, group=ctx.group)
        return own.movedim(0, 2), None


class _SumOverGroup(torch.autograd.Function):
    """Sum a tensor over the processes of a group; so is its gradient, which all of them have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def sum_over_group(x: Tensor) -> Tensor:
    """Return the sum of a tensor over the processes that compute a row together."""
    return _SumOverGroup.apply(x, arrangement().rows.get_group("context"))


# -- attention -----------------------------------------------------------------------------------


def part_attention(query: Tensor, key: Tensor, value: Tensor, part: Part, scaling: float | None) -> Tensor:
    """Compute attention of this process's tokens to all of their rows.

    Args:
        query: (B, H, t, D), of its own tokens.
        key: (B, H_kv, t, D), of its own tokens.
        value: (B, H_kv, t, D'), of its own tokens.
        part: Which tokens they are.
        scaling: Factor on the products; None: 1/√D.

    Returns:
        (B, t, H, D').
    """
    # One call for both: each costs a round trip between all processes.
    both = _GatherTokens.apply(torch.cat([key, value], dim=-1), arrangement().rows.get_group("context"))
    key, value = both.split([key.shape[-1], value.shape[-1]], dim=-1)
    grouped = key.shape[1] != query.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=part.mask, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2)


# -- rows ----------------------------------------------------------------------------------------


def own_part(ids: Tensor, position_ids: Tensor | None, spans: Any = None) -> tuple[Part, dict[str, Any]]:
    """Return this process's part of some rows, and what a model's forward takes for it.

    Args:
        ids: (B, T), the same on all processes of the group; padded on the right.
        position_ids: (1, T) of packed rows; None: 0 to T − 1 in each row.
        spans: The prompts and responses of a packed row, as in `Rows`; None: each row is causal.
    """
    size, index = arrangement().context, arrangement().rows.get_local_rank("context")
    length = ids.shape[1]
    width = -(-length // size)
    part_start, padding = index * width, size * width - length
    ids = F.pad(ids, (0, padding))[:, part_start : part_start + width]
    if position_ids is None:
        positions = torch.arange(part_start, part_start + width, device=ids.device).unsqueeze(0)
    else:
        positions = F.pad(position_ids, (0, padding))[:, part_start : part_start + width]
    mask = attention_mask(part_start, width, size * width, spans, ids.device)
    part = Part(part_start, part_start + width, mask)
    # A mask of four dimensions is final to transformers: it builds none of its own.
    no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)
    options = {"input_ids": ids, "position_ids": positions, "attention_mask": no_mask, "use_cache": False}
    return part, options | {"packing": part}


def attention_mask(start: int, width: int, length: int, spans: Any, device: torch.device) -> Tensor:
    """Return which tokens of a row the tokens of a part attend to, (1, 1, width, length).

    Args:
        start: Index of the part's first token.
        width: Tokens of the part.
        length: Tokens of the row, padded.
        spans: As of `own_part`.
        device: Of the mask.
    """
    places = torch.arange(length, device=device)
    own = places[start : start + width].unsqueeze(1)
    mask = places <= own
    if spans is not None:
        prompts, responses = owners(spans, length)
        prompts, responses = prompts.to(device), responses.to(device)
        of_part = slice(start, start + width)
        mask &= prompts == prompts[of_part].unsqueeze(1)
        mask &= (responses == 0) | (responses == responses[of_part].unsqueeze(1))
    return mask[None, None]


def owners(spans: Any, length: int) -> tuple[Tensor, Tensor]:
    """Return the prompt of each token of a packed row, and its response: 0 in the prompt itself.

    Args:
        spans: Lengths in the row: (prompt, its responses), one prompt after another.
        length: Tokens of the row, padded; the padding belongs to no prompt (−1).
    """
    prompts, responses = torch.full((length,), -1), torch.zeros(length, dtype=torch.long)
    place = 0
    for number, (prompt, lengths) in enumerate(spans):
        end = place + prompt + sum(lengths)
        prompts[place:end] = number
        place += prompt
        for which, count in enumerate(lengths, 1):
            responses[place : place + count] = which
            place += count
    return prompts, responses


def over_parts(
    trunk: Callable[..., Any], rows: Rows, index: Tensor, compute: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """Compute numbers at some places of rows, each on the process that has the place.

    Args:
        trunk: The model's trunk.
        rows: The rows.
        index: (n,): the places, as indices into the flattened rows.
        compute: Hidden states (m, d), and which of the n places they are (m,) → tensors (m,).

    Returns:
        Tensors (n,), on all processes of the group.
    """
    spans = None if rows.sequences is None else rows.spans
    part, options = own_part(rows.input_ids, None if spans is None else rows.position_ids, spans)
    hidden = trunk(**options).last_hidden_state
    length, width = rows.input_ids.shape[1], part.stop - part.start
    row, place = index // length, index % length
    chosen = ((place >= part.start) & (place < part.stop)).nonzero().squeeze(-1)
    local = row[chosen] * width + place[chosen] - part.start
    # An empty choice still depends on `hidden`: its backward pass joins in the collectives.
    found = compute(hidden.flatten(0, 1).index_select(0, local), chosen)
    return tuple(sum_over_group(x.new_zeros(len(index)).index_copy(0, chosen, x)) for x in found)
