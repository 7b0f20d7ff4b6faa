"""Rows → numbers of each role: log-probs of response tokens, values before them, scores at the last of them.

Simple and right: one row a response. Only the response's positions pay for the unembedding.
"""

import torch
from torch import Tensor

from data.groups import Rows
from stages.models.adapters import plain
from stages.models.loading import score_head
from stages.objectives.logprobs import entropy, token_logprobs


def response_logits(model, rows: Rows, temperature: float = 1.0) -> Tensor:
    """Logits (B, R, V) that predict each response token, divided by the sampling temperature."""
    width = rows.input_ids.shape[1] - rows.prompt_width
    set_mode(model)
    logits = model(
        input_ids=rows.input_ids,
        attention_mask=rows.attention_mask,
        position_ids=rows.position_ids,
        logits_to_keep=width + 1,
        use_cache=False,
    ).logits[:, :-1]
    return logits.float() / temperature


def response_logprobs(model, rows: Rows, temperature: float = 1.0, with_entropy: bool = False):
    """log π(token | before) of each response token, (B, R); with the entropy (B, R), no gradient, if asked for.

    What stands where rows.response_mask is False is without meaning.
    """
    logits = response_logits(model, rows, temperature)
    logprobs = token_logprobs(logits, rows.responses)
    if not with_entropy:
        return logprobs
    with torch.no_grad():
        return logprobs, entropy(logits)


def response_values(model, rows: Rows) -> Tensor:
    """V of the state before each response token, (B, R); reward_bias subtracted as from scores."""
    return _head(model, _hidden(model, rows)[:, rows.prompt_width - 1 : -1])


def response_scores(model, rows: Rows) -> Tensor:
    """r(x, y) − reward_bias, (B,), read at the last real token of each row, wherever its padding stands."""
    last = rows.prompt_width + rows.response_mask.sum(-1) - 1
    hidden = _hidden(model, rows)[torch.arange(len(last), device=last.device), last]
    return _head(model, hidden)


def set_mode(model) -> None:
    """Training mode where gradients are wanted: activation checkpointing works in it alone. Dropout is off in both."""
    model.train(torch.is_grad_enabled())


def _hidden(model, rows: Rows) -> Tensor:
    """Last hidden states (B, P + R, d) of a scalar model's trunk."""
    set_mode(model)
    return (
        plain(model)
        .base_model(
            input_ids=rows.input_ids,
            attention_mask=rows.attention_mask,
            position_ids=rows.position_ids,
            use_cache=False,
        )
        .last_hidden_state
    )


def _head(model, hidden: Tensor) -> Tensor:
    bias = getattr(plain(model).config, "reward_bias", None) or 0.0
    return score_head(plain(model))(hidden).squeeze(-1).float() - bias
