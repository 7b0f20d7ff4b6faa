"""Attention over packed rows: nothing is padded, and a prompt is computed once for all its responses.

Everything in a transformer but attention treats tokens one by one, so it runs on the packed tokens as they are.
Attention gathers queries, keys and values into one row a response (prompt, then response; plain causal attention, no
mask), and takes each token's output back. Gradients are autograd's. It enters a model through transformers' public
AttentionInterface; calls without a layout are transformers' own sdpa.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from data.groups import Rows, make_rows
from stages.models.adapters import plain

NAME = "packed_rows"


def packed_attention(module, query, key, value, attention_mask, scaling=None, packing=None, **options):
    """query (1, H, T, D), key, value (1, H_kv, T, D) of packed tokens → (1, T, H, D).

    packing: (sequences (B, W), home (T,)) of `Rows`; or keys and values of a cache in the making, see
    stages/rollouts/transformers.py; None: sdpa as ever.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    if options.get("softcap") is not None or options.get("position_bias") is not None:
        raise ValueError("packed attention knows neither softcap nor position biases")
    if isinstance(packing, Tensor):
        return one_token_attention(query, key, value, packing, scaling), None
    sequences, home = packing
    count, width = sequences.shape
    spread = lambda x: (  # noqa: E731
        x[0].transpose(0, 1).index_select(0, sequences.flatten()).unflatten(0, (count, width)).transpose(1, 2)
    )
    out = F.scaled_dot_product_attention(
        spread(query),
        spread(key),
        spread(value),
        is_causal=True,
        scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return out.transpose(1, 2).flatten(0, 1).index_select(0, home).unsqueeze(0), None


def one_token_attention(query, key, value, bias, scaling) -> Tensor:
    """One new token a sequence against a cache: query (B, H, 1, D), key, value (B, H_kv, T, D), bias (B, 1, 1, T).

    The heads that share a key head become its queries, so that keys and values are never repeated. → (B, 1, H, D).
    """
    B, H, _, D = query.shape
    shared = query.reshape(B, key.shape[1], H // key.shape[1], D)
    out = F.scaled_dot_product_attention(shared, key, value, attn_mask=bias, scale=scaling)
    return out.reshape(B, 1, H, D)


def trunk_options(rows: Rows) -> dict:
    """What a model's forward takes beside input_ids."""
    if rows.sequences is None:
        return {"position_ids": rows.position_ids, "use_cache": False}
    # four dimensions: transformers takes the mask for finished and makes none, which nobody would read
    no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=rows.input_ids.device)
    packing = (rows.sequences, rows.home)
    return {"position_ids": rows.position_ids, "attention_mask": no_mask, "use_cache": False, "packing": packing}


def can_pack(model, max_length: int) -> bool:
    """Make `model` read packed rows, if it can; → whether it can.

    Tried on a few tokens: a model that does not take attention from the AttentionInterface, adds to it, or keeps a
    state from token to token gives other hidden states. One whose sliding window is shorter than `max_length`, or
    whose attention is not sdpa, is left alone.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    inner = plain(model)
    window = getattr(inner.config, "sliding_window", None)
    if window is not None and window < max_length and getattr(inner.config, "use_sliding_window", True):
        return False
    if packs(model):
        return True
    if getattr(inner.config, "_attn_implementation", None) != "sdpa":
        return False
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    try:
        inner.set_attn_implementation(NAME)
        works = _same_hidden_states(inner)
    except (ValueError, RuntimeError, TypeError, IndexError, KeyError, AttributeError):
        works = False
    if not works:
        inner.set_attn_implementation("sdpa")
    return works


def packs(model) -> bool:
    """Whether `can_pack` has made the model read packed rows."""
    return getattr(plain(model).config, "_attn_implementation", None) == NAME


@torch.no_grad()
def _same_hidden_states(model) -> bool:
    device, training = next(model.parameters()).device, model.training
    model.eval()
    prompts, responses = [[3, 1, 2], [3, 1, 2], [2, 3]], [[2, 1], [1, 3, 2], [1]]
    states = []
    for packed in (False, True):
        rows = make_rows(prompts, responses, 0, packed=packed).to(device)
        hidden = model.base_model(input_ids=rows.input_ids, **trunk_options(rows)).last_hidden_state.flatten(0, 1)
        states.append(hidden.index_select(0, torch.cat([rows.before[rows.response_mask], rows.last])))
    model.train(training)
    return torch.allclose(*states, rtol=1e-2, atol=1e-2 * states[0].abs().mean().item())
