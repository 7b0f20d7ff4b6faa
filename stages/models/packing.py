"""Let models read packed rows: no padding, and each prompt computed once for all its responses.

Everything in a transformer but attention treats tokens one by one, so it runs on the packed tokens
as they are. Attention is computed in one of two ways. On a CPU it goes prompt by prompt and
response by response (`span_by_span`): no padding and no masked work. On a GPU, and for spans too
short to pay for a call each, it gathers queries, keys and values into one row per response, plain
causal, and takes each token's output back (`in_rows`): one kernel. Gradients are autograd's.

It enters a model through transformers' public AttentionInterface. Calls without a layout use
transformers' own sdpa.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.groups import Rows, make_rows
from stages.models.adapters import unwrapped
from stages.models.context_parallel import Part, part_attention
from stages.models.ensemble import Ensemble
from stages.models.families import cache_name
from stages.models.prefix import WORKS_WITH, before, seen_behind

NAME = "packed_rows"
CAUSAL = "causal"  # in place of a Packing: rows without padding, each causal
# Tokens per span. Below, a call per span costs a CPU more than the padding of one call for all.
SHORT = 32


@dataclass(frozen=True)
class Packing:
    """The layout of a packed row: which tokens attend to which, as in `Rows`."""

    spans: tuple[tuple[int, tuple[int, ...]], ...]
    """Lengths in the row: (prompt, its responses), one prompt after another; () if attention is
    to be computed in rows."""
    sequences: Tensor
    """(B, W): the tokens of each response's prompt and response, as indices into the row."""
    home: Tensor
    """(T,): which of the B·W entries holds each token."""
    masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """(response, prompt) lengths: a mask, made once for all layers."""

    @cached_property
    def short(self) -> bool:
        """Return whether spans are short on average, and rows would not be mostly padding."""
        spans = sum(1 if len(responses) == 1 else 1 + len(responses) for _, responses in self.spans)
        return self.home.numel() < SHORT * spans and self.sequences.numel() <= 4 * self.home.numel()

    def behind(self, prompt: int, response: int, device: torch.device) -> Tensor:
        """Return the attention mask of a response that follows its prompt.

        Args:
            prompt: Prompt tokens P.
            response: Response tokens R.
            device: Of the mask.

        Returns:
            (R, P + R), True where a token of the response may attend: its prompt, and the response
            so far.
        """
        if (prompt, response) not in self.masks:
            whole = torch.ones(response, prompt + response, dtype=torch.bool, device=device)
            self.masks[prompt, response] = whole.tril(prompt)
        return self.masks[prompt, response]


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    packing: Packing | Part | Tensor | str | None = None,
    **options: Any,
) -> tuple[Tensor, Any]:
    """Compute attention over packed tokens, as transformers' AttentionInterface calls it.

    Args:
        module: The attention layer.
        query: (1, H, T, D).
        key: (1, H_kv, T, D).
        value: (1, H_kv, T, D).
        attention_mask: Used for ordinary calls only.
        scaling: Factor on the products of queries and keys; None: 1/√D.
        packing: A Packing; a Part of rows that several processes compute; in a step of the sampler
            a bias (B, 1, 1, T) over a cache, with B sequences in place of 1; CAUSAL for plain rows
            without a mask; None for an ordinary call.
        options: More of the layer's.

    Returns:
        (1, T, H, D), and None in place of attention weights.

    Raises:
        ValueError: The layer does something that is not implemented here.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    front = before(module, key)
    if isinstance(packing, str):
        packing = attention_mask = None
    if packing is None:
        if front is not None:
            attention_mask = seen_behind(attention_mask, query, key, front[0].shape[2])
            key, value = behind(front, key, value)
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    if options.get("softcap") is not None or options.get("position_bias") is not None:
        raise ValueError("packed attention supports neither softcap nor position biases")
    window = options.get("sliding_window")
    if isinstance(packing, Part):
        if front is not None or (window is not None and window < packing.mask.shape[-1]):
            raise ValueError("rows in parts have neither a prefix nor a sliding window")
        return part_attention(query, key, value, packing, scaling), None
    if isinstance(packing, Tensor):
        if front is not None:
            packing = F.pad(packing, (front[0].shape[2], 0))
            key, value = behind(front, key, value)
        return one_token_attention(query, key, value, packing, scaling), None
    if window is not None and window < packing.sequences.shape[1]:
        raise ValueError(f"packed attention has no sliding window, and this layer's is {window} tokens")
    in_spans = query.device.type == "cpu" and packing.spans and not packing.short
    compute = span_by_span if in_spans else in_rows
    return compute(query, key, value, packing, scaling, front), None


def behind(front: tuple[Tensor, Tensor], key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return a prefix's keys and values with those of the text behind them, (B, H_kv, n + T, D)."""
    return torch.cat([front[0], key], dim=2), torch.cat([front[1], value], dim=2)


def span_by_span(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    scaling: float | None,
    front: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Compute attention with one or two kernel calls per span.

    A prompt attends to itself; each of its responses to the prompt and itself. A prompt with a
    single response is one causal span.

    Args:
        query: (1, H, T, D).
        key: (1, H_kv, T, D).
        value: (1, H_kv, T, D).
        packing: The layout.
        scaling: As of `packed_attention`.
        front: Keys and values (1, H_kv, n, D) of a prefix that every token attends to; or None.

    Returns:
        (1, T, H, D).
    """
    ahead = 0 if front is None else front[0].shape[2]
    options = {"scale": scaling, "enable_gqa": key.shape[1] != query.shape[1]}
    lengths = [n for p, rs in packing.spans for n in ((p + rs[0],) if len(rs) == 1 else (p, *rs))]
    # One split instead of slices: its backward pass is one concatenation instead of a sum of padded
    # gradients.
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    out = []
    for prompt, responses in packing.spans:
        q, k, v = next(parts)
        if front is None:
            out.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, **options))
        else:
            mask = packing.behind(ahead, q.shape[2], q.device)
            k, v = behind(front, k, v)
            out.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options))
        for length in responses if len(responses) > 1 else ():
            own_q, own_k, own_v = next(parts)
            if length:
                keys, values = torch.cat([k, own_k], dim=2), torch.cat([v, own_v], dim=2)
                mask = packing.behind(ahead + prompt, length, q.device)
                out.append(F.scaled_dot_product_attention(own_q, keys, values, attn_mask=mask, **options))
    return torch.cat(out, dim=2).transpose(1, 2)


def in_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    scaling: float | None,
    front: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Compute attention in one kernel call over a padded row per response.

    Each row is a copy of the prompt and the response. It is causal, so padding on the right is
    never attended to. Arguments and result are those of `span_by_span`.
    """
    count, width = packing.sequences.shape
    index = packing.sequences.flatten()

    def gather(x: Tensor) -> Tensor:
        """Gather packed heads (1, H, T, D) into rows (B, H, W, D)."""
        return x[0].transpose(0, 1).index_select(0, index).unflatten(0, (count, width)).transpose(1, 2)

    q, k, v = gather(query), gather(key), gather(value)
    options = {"scale": scaling, "enable_gqa": k.shape[1] != q.shape[1]}
    if front is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
    else:
        mask = packing.behind(front[0].shape[2], width, q.device)
        k, v = behind((front[0].expand(count, -1, -1, -1), front[1].expand(count, -1, -1, -1)), k, v)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)
    # Each token's output is read from one of the rows that hold it; the others' copies are dropped.
    return out.transpose(1, 2).flatten(0, 1).index_select(0, packing.home).unsqueeze(0)


def one_token_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float | None) -> Tensor:
    """Compute attention of one new token per sequence against a cache.

    The heads that share a key head become its queries, so keys and values are never repeated.

    Args:
        query: (B, H, 1, D).
        key: (B, H_kv, T, D).
        value: (B, H_kv, T, D).
        bias: (B, 1, 1, T), −∞ where nothing is cached.
        scaling: As of `packed_attention`.

    Returns:
        (B, 1, H, D).
    """
    B, H, _, D = query.shape
    shared = query.reshape(B, key.shape[1], H // key.shape[1], D)
    out = F.scaled_dot_product_attention(shared, key, value, attn_mask=bias, scale=scaling)
    return out.reshape(B, 1, H, -1)  # the heads of values may be narrower than those of keys


def trunk_options(rows: Rows, in_rows: bool = False) -> dict:
    """Return what a model's forward takes for these rows, beside input_ids.

    Args:
        rows: The rows.
        in_rows: Whether attention over packed rows is computed by `in_rows` on a CPU too: the same
            operations whatever the lengths are, as compiled layers need.
    """
    if rows.sequences is None:  # padded: position ids are the default, from 0 in each row
        return {"use_cache": False}
    packing = Packing(() if in_rows else rows.spans, rows.sequences, rows.home)
    return _packed_options(rows.position_ids, packing) | {"use_cache": False}


def causal_options(model: nn.Module, ids: Tensor) -> dict:
    """Return what a model's forward takes for rows without padding, beside input_ids.

    Without a mask transformers would look at the position ids whether rows are packed, and wait for
    the device.

    Args:
        model: A transformers model, adapted or not.
        ids: (N, T).
    """
    if not reads_packed_rows(model) or has_short_window(unwrapped(model).config, ids.shape[1]):
        return {"use_cache": False}
    return {"attention_mask": no_mask(ids.device), "use_cache": False, "packing": CAUSAL}


def no_mask(device: torch.device) -> Tensor:
    """Return a mask that says nothing.

    One of four dimensions is final to transformers: it builds no (T, T) mask, unused here.
    """
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def rows_end_to_end(ids: Tensor, lengths: Sequence[int]) -> dict[str, Any]:
    """Return what a model's forward takes for rows of text that lie end to end, each by itself.

    Args:
        ids: (1, T): the B rows, one after another.
        lengths: Tokens of each of them (B).
    """
    sizes = torch.tensor(lengths, device=ids.device).unsqueeze(-1)
    steps = torch.arange(max(lengths), device=ids.device)
    sequences = sizes.cumsum(0) - sizes + torch.minimum(steps, sizes - 1)  # the remainder repeats the last column
    is_token = steps < sizes
    packing = Packing(tuple((n, (0,)) for n in lengths), sequences, is_token.flatten().nonzero().squeeze(-1))
    positions = steps.expand_as(is_token)[is_token].unsqueeze(0)
    return {"input_ids": ids, **_packed_options(positions, packing)}


def _packed_options(position_ids: Tensor | None, packing: Packing) -> dict[str, Any]:
    """Return the arguments of a forward pass that say how its packed row is laid out."""
    return {"position_ids": position_ids, "attention_mask": no_mask(packing.home.device), "packing": packing}


def can_pack(model: nn.Module, max_length: int) -> bool:
    """Make a model read packed rows if it can, and return whether it can.

    It is tried on a few tokens: a model that does not use the AttentionInterface, adds something to
    its attention, or carries a state from token to token gives other hidden states. A model is left
    as it is if a sliding window is shorter than `max_length`, or if its attention is not sdpa.

    Args:
        model: A transformers model, adapted or not, or an Ensemble.
        max_length: Longest row, in tokens.
    """
    if isinstance(model, Ensemble):
        return all([can_pack(member, max_length) for member in model.members])
    inner = unwrapped(model)
    if has_short_window(inner.config, max_length):
        return False
    if reads_packed_rows(model):
        return True
    kernel = getattr(inner.config, "_attn_implementation", None)
    if kernel not in WORKS_WITH or getattr(inner, "_cannot_pack", False):
        return False
    try:
        register(inner)
        works = _same_hidden_states(inner)
    except (ValueError, RuntimeError, TypeError, IndexError, KeyError, AttributeError):
        works = False
    if not works:
        inner.set_attn_implementation(kernel)
        inner._cannot_pack = True  # not to be tried again when its weights are cast or sharded
    return works


def has_short_window(config: Any, length: int) -> bool:
    """Return whether attention in some layer reaches back fewer than `length` tokens."""
    config = config.get_text_config()
    names = ["attention_chunk_size", "keep_window_size", "index_topk"]
    names += ["sliding_window"] * bool(getattr(config, "use_sliding_window", True))
    return any((getattr(config, name, None) or length) < length for name in names)


def register(inner: nn.Module, name: str = NAME) -> None:
    """Make a transformers model use `packed_attention`, under a name of transformers' interface."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, packed_attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    inner.set_attn_implementation(name)


def reads_packed_rows(model: nn.Module) -> bool:
    """Return whether `can_pack` has made the model read packed rows."""
    return getattr(unwrapped(model).config, "_attn_implementation", None) == NAME


@torch.no_grad()
def _same_hidden_states(model: nn.Module) -> bool:
    """Return whether the model gives the same hidden states for packed as for padded rows."""
    from transformers import DynamicCache

    device, training = next(model.parameters()).device, model.training
    model.eval()
    prompts, responses = [[3, 1, 2], [3, 1, 2], [2, 3]], [[2, 1], [1, 3, 2], [1]]
    states = []
    for packed in (False, True):
        rows = make_rows(prompts, responses, 0, packed=packed).to(device)
        options = trunk_options(rows)
        if packed:  # the sampler's first pass fills a cache, which some trunks do not take
            name = cache_name(model.base_model) or "past_key_values"  # a trunk may pass it on by **kwargs
            options |= {name: DynamicCache(), "use_cache": True}
        hidden = model.base_model(input_ids=rows.input_ids, **options).last_hidden_state.flatten(0, 1)
        states.append(hidden.index_select(0, torch.cat([rows.before[rows.response_mask], rows.last])))
    model.train(training)
    return torch.allclose(*states, rtol=1e-2, atol=1e-2 * states[0].abs().mean().item())
