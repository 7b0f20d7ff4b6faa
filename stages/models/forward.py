"""Rows → numbers of each role: log-probs of response tokens, values before them, scores at the last of them.

Only the positions that are read pay for a head: response tokens for log-probs and values, the last token for scores.
"""

import torch
from torch import Tensor

from data.groups import Rows, make_rows, share_prompts
from stages.models.adapters import plain
from stages.models.loading import score_head
from stages.objectives.logprobs import entropy, token_logprobs


def response_logprobs(model, rows: Rows, temperature: float = 1.0, with_entropy: bool = False):
    """log π(token | before) of each response token, (B, R); with the entropy (B, R), no gradient, if asked for.

    temperature divides the logits, as in sampling. 0 where rows.response_mask is False.
    """
    mask = rows.response_mask
    logits = _logits(model, rows, rows.before[mask]).float() / temperature
    logprobs = _spread(token_logprobs(logits, rows.responses[mask]), mask)
    if not with_entropy:
        return logprobs
    with torch.no_grad():
        return logprobs, _spread(entropy(logits), mask)


def response_values(model, rows: Rows) -> Tensor:
    """V of the state before each response token, (B, R); reward_bias subtracted as from scores. 0 off the mask."""
    mask = rows.response_mask
    return _spread(_head(model, _hidden(model, rows).index_select(0, rows.before[mask])), mask)


def response_scores(model, rows: Rows) -> Tensor:
    """r(x, y) − reward_bias, (B,), read at the last real token of each response."""
    return _head(model, _hidden(model, rows).index_select(0, rows.last))


@torch.no_grad()
def score_all(model, prompts, responses, *, pad_id: int, batch_size: int, accelerator) -> Tensor:
    """Scores (B,) of any number of responses, `batch_size` at a time, like lengths together; on the CPU."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(responses[i]))
    scores = torch.empty(len(prompts))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        rows = make_rows([prompts[i] for i in part], [responses[i] for i in part], pad_id).to(accelerator.device)
        with accelerator.autocast():
            scores[part] = response_scores(model, rows).cpu()
    return scores


@torch.no_grad()
def can_share_prompts(model, max_length: int) -> bool:
    """Whether the model reads a prompt and several responses in one row as it reads them one by one.

    Tried on a few tokens: a model whose attention takes no mask of (N, 1, T, T), or keeps a state from token to token,
    gives other hidden states. One whose sliding window is shorter than `max_length` is not asked.
    """
    window = getattr(plain(model).config, "sliding_window", None)
    if window is not None and window < max_length and getattr(plain(model).config, "use_sliding_window", True):
        return False
    prompt, responses = [3, 1, 2], [[2, 1], [1, 3, 2]]
    device = next(model.parameters()).device
    one_by_one = make_rows([prompt] * 2, responses, 0).to(device)
    try:
        shared = share_prompts([(prompt, responses)], 0).to(device)
        there = _hidden(model, shared).index_select(0, shared.before[shared.response_mask])
    except (ValueError, RuntimeError, TypeError, IndexError):
        return False
    here = _hidden(model, one_by_one).index_select(0, one_by_one.before[one_by_one.response_mask])
    return torch.allclose(there, here, rtol=1e-2, atol=1e-2 * here.abs().mean().item())


def set_mode(model) -> None:
    """Training mode where gradients are wanted: activation checkpointing works in it alone. Dropout is off in both."""
    model.train(torch.is_grad_enabled())


def _spread(x: Tensor, mask: Tensor) -> Tensor:
    """(n,) numbers to the n True places of the mask (B, R); 0 elsewhere."""
    return x.new_zeros(mask.shape).masked_scatter(mask, x)


def _hidden(model, rows: Rows) -> Tensor:
    """Last hidden states (N·T, d) of the model's trunk."""
    set_mode(model)
    options = {"attention_mask": rows.attention_mask, "position_ids": rows.position_ids, "use_cache": False}
    return plain(model).base_model(input_ids=rows.input_ids, **options).last_hidden_state.flatten(0, 1)


def _logits(model, rows: Rows, index: Tensor) -> Tensor:
    """Logits (n, V) at `index` of the N·T tokens."""
    if _head_is_linear(model):
        return plain(model).get_output_embeddings()(_hidden(model, rows).index_select(0, index))
    set_mode(model)
    options = {"attention_mask": rows.attention_mask, "position_ids": rows.position_ids, "use_cache": False}
    return model(input_ids=rows.input_ids, **options).logits.flatten(0, 1).index_select(0, index)


@torch.no_grad()
def _head_is_linear(model) -> bool:
    """Whether logits are the output embedding of the trunk's states and nothing more (Gemma caps them, Granite and
    Cohere scale them). Tried once a model, on three tokens."""
    inner = plain(model)
    if not hasattr(inner, "_head_is_linear"):
        ids = torch.tensor([[1, 2, 3]], device=next(inner.parameters()).device)
        training = inner.training
        inner.eval()
        whole = inner(input_ids=ids, use_cache=False).logits
        parts = inner.get_output_embeddings()(inner.base_model(input_ids=ids, use_cache=False).last_hidden_state)
        inner.train(training)
        inner._head_is_linear = whole.shape == parts.shape and torch.allclose(whole, parts, rtol=1e-3, atol=1e-3)
    return inner._head_is_linear


def _head(model, hidden: Tensor) -> Tensor:
    """The scalar head in fp32, whatever the trunk computes in: bf16 would round scores of 6 to steps of 0.03."""
    bias = getattr(plain(model).config, "reward_bias", None) or 0.0
    with torch.autocast(hidden.device.type, enabled=False):
        return score_head(plain(model))(hidden.float()).squeeze(-1) - bias
