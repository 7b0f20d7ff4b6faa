"""Attention over packed rows: nothing is padded, and a prompt is computed once for all its responses.

Everything in a transformer but attention treats tokens one by one, so it runs on the packed tokens as they are.
Attention goes prompt by prompt and response by response (a CPU: no masked work, no padding), or gathers queries, keys
and values into one row a response, plain causal, and takes each token's output back (a GPU, and spans too short to pay
for a call each: one kernel). Gradients are autograd's. It enters a model through transformers' public
AttentionInterface; calls without a layout are its own sdpa.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from data.groups import Rows, make_rows
from stages.models.adapters import plain
from stages.models.ensemble import Ensemble
from stages.models.families import cache_name

NAME = "packed_rows"
SHORT = 32  # tokens a span: below, a call a span costs a CPU more than the padding of one call for all


@dataclass(frozen=True)
class Packing:
    """Who sees whom in a packed row, as `Rows` says it. masks: (response, prompt) lengths → mask, made once for all
    layers."""

    spans: tuple[tuple[int, tuple[int, ...]], ...]
    sequences: Tensor
    home: Tensor
    masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @cached_property
    def short(self) -> bool:
        """Whether the spans have on average fewer than SHORT tokens, and rows would not be mostly padding."""
        spans = sum(1 if len(responses) == 1 else 1 + len(responses) for _, responses in self.spans)
        return self.home.numel() < SHORT * spans and self.sequences.numel() <= 4 * self.home.numel()

    def behind(self, prompt: int, response: int, device) -> Tensor:
        """(response, prompt + response), True where a response's token may look: its prompt, and itself so far."""
        if (prompt, response) not in self.masks:
            whole = torch.ones(response, prompt + response, dtype=torch.bool, device=device)
            self.masks[prompt, response] = whole.tril(prompt)
        return self.masks[prompt, response]


def packed_attention(module, query, key, value, attention_mask, scaling=None, packing=None, **options):
    """query (1, H, T, D), key, value (1, H_kv, T, D) of packed tokens → (1, T, H, D).

    packing: a Packing; or, in a step of the sampler, a bias (B, 1, 1, T) over a cache; None: sdpa as ever.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    if options.get("softcap") is not None or options.get("position_bias") is not None:
        raise ValueError("packed attention knows neither softcap nor position biases")
    if isinstance(packing, Tensor):
        return one_token_attention(query, key, value, packing, scaling), None
    window = options.get("sliding_window")
    if window is not None and window < packing.sequences.shape[1]:
        raise ValueError(f"packed attention keeps no sliding window, and this layer's is {window} tokens")
    attend = in_rows if query.device.type != "cpu" or packing.short else span_by_span
    return attend(query, key, value, packing, scaling), None


def span_by_span(query, key, value, packing: Packing, scaling) -> Tensor:
    """A prompt sees itself, each of its responses the prompt and itself; a prompt with one response is one span."""
    alone = {"scale": scaling, "enable_gqa": key.shape[1] != query.shape[1]}
    lengths = [n for p, rs in packing.spans for n in ((p + rs[0],) if len(rs) == 1 else (p, *rs))]
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    out = []
    for prompt, responses in packing.spans:
        q, k, v = next(parts)
        out.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, **alone))
        for length in responses if len(responses) > 1 else ():
            own_q, own_k, own_v = next(parts)
            if length:
                keys, values = torch.cat([k, own_k], dim=2), torch.cat([v, own_v], dim=2)
                mask = packing.behind(prompt, length, q.device)
                out.append(F.scaled_dot_product_attention(own_q, keys, values, attn_mask=mask, **alone))
    return torch.cat(out, dim=2).transpose(1, 2)


def in_rows(query, key, value, packing: Packing, scaling) -> Tensor:
    """One row a response, its prompt gathered anew for each; causal, so that padding on the right is never seen."""
    count, width = packing.sequences.shape
    index = packing.sequences.flatten()
    spread = lambda x: x[0].transpose(0, 1).index_select(0, index).unflatten(0, (count, width)).transpose(1, 2)  # noqa: E731
    out = F.scaled_dot_product_attention(
        *map(spread, (query, key, value)), is_causal=True, scale=scaling, enable_gqa=key.shape[1] != query.shape[1]
    )
    return out.transpose(1, 2).flatten(0, 1).index_select(0, packing.home).unsqueeze(0)


def one_token_attention(query, key, value, bias, scaling) -> Tensor:
    """One new token a sequence against a cache: query (B, H, 1, D), key, value (B, H_kv, T, D), bias (B, 1, 1, T).

    The heads that share a key head become its queries, so that keys and values are never repeated. → (B, 1, H, D).
    """
    B, H, _, D = query.shape
    shared = query.reshape(B, key.shape[1], H // key.shape[1], D)
    out = F.scaled_dot_product_attention(shared, key, value, attn_mask=bias, scale=scaling)
    return out.reshape(B, 1, H, -1)  # values may be narrower than keys


def trunk_options(rows: Rows) -> dict:
    """What a model's forward takes beside input_ids."""
    if rows.sequences is None:  # each row begins at position 0, as every model has it that is told of none
        return {"use_cache": False}
    # four dimensions: transformers takes the mask for finished and makes none, which nobody would read
    no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=rows.input_ids.device)
    packing = Packing(rows.spans, rows.sequences, rows.home)
    return {"position_ids": rows.position_ids, "attention_mask": no_mask, "use_cache": False, "packing": packing}


def can_pack(model, max_length: int) -> bool:
    """Make `model` read packed rows, if it can; → whether it can.

    Tried on a few tokens: a model that does not take attention from the AttentionInterface, adds to it, or keeps a
    state from token to token gives other hidden states. One whose sliding window is shorter than `max_length`, or
    whose attention is not sdpa, is left alone.
    """
    if isinstance(model, Ensemble):
        return all([can_pack(member, max_length) for member in model.members])
    inner = plain(model)
    if sees_less(inner.config, max_length):
        return False
    if packs(model):
        return True
    if getattr(inner.config, "_attn_implementation", None) != "sdpa" or getattr(inner, "_cannot_pack", False):
        return False
    try:
        register(inner)
        works = _same_hidden_states(inner)
    except (ValueError, RuntimeError, TypeError, IndexError, KeyError, AttributeError):
        works = False
    if not works:
        inner.set_attn_implementation("sdpa")
        inner._cannot_pack = True  # not tried again once its weights are cast or in parts
    return works


def sees_less(config, length: int) -> bool:
    """Whether attention in some layer ends before so many tokens."""
    config = config.get_text_config()
    names = ["attention_chunk_size", "keep_window_size", "index_topk"]
    names += ["sliding_window"] * bool(getattr(config, "use_sliding_window", True))
    return any((getattr(config, name, None) or length) < length for name in names)


def register(inner) -> None:
    """Make a transformers model take its attention from here."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    inner.set_attn_implementation(NAME)


def packs(model) -> bool:
    """Whether `can_pack` has made the model read packed rows."""
    return getattr(plain(model).config, "_attn_implementation", None) == NAME


@torch.no_grad()
def _same_hidden_states(model) -> bool:
    from transformers import DynamicCache

    device, training = next(model.parameters()).device, model.training
    model.eval()
    prompts, responses = [[3, 1, 2], [3, 1, 2], [2, 3]], [[2, 1], [1, 3, 2], [1]]
    states = []
    for packed in (False, True):
        rows = make_rows(prompts, responses, 0, packed=packed).to(device)
        options = trunk_options(rows)
        if packed:  # the sampler's first pass fills a plain cache, which some trunks do not take
            name = cache_name(model.base_model) or "past_key_values"  # a trunk may pass on what it takes
            options |= {name: DynamicCache(), "use_cache": True}
        hidden = model.base_model(input_ids=rows.input_ids, **options).last_hidden_state.flatten(0, 1)
        states.append(hidden.index_select(0, torch.cat([rows.before[rows.response_mask], rows.last])))
    model.train(training)
    return torch.allclose(*states, rtol=1e-2, atol=1e-2 * states[0].abs().mean().item())
