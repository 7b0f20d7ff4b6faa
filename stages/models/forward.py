"""Compute what each role says of rows: log-probabilities, values and scores.

Only the positions that are needed go through a head: response tokens for log-probabilities and
values, the last token for scores.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from data.groups import Rows, make_rows
from pipeline.launch.parallel import padded_micro_batches
from stages.models.adapters import unwrapped
from stages.models.compiled import is_compiled
from stages.models.context_parallel import cuts_rows, over_parts
from stages.models.ensemble import Ensemble
from stages.models.families import off_the_gpu
from stages.models.head import CHUNK, head_logprobs
from stages.models.loading import score_head
from stages.models.packing import causal_options, trunk_options
from stages.models.sharding import compute_gathered, is_sharded
from stages.models.soft_prompts import after_soft_prompt, excluded_ids, without_soft_prompt
from stages.models.tensor_parallel import whole_weight
from stages.objectives.logprobs import entropy, token_logprobs

LARGE = 200.0  # a logit that every cap changes (usual caps are 30 and 50)


def response_logprobs(model: nn.Module, rows: Rows, temperature: float = 1.0, with_entropy: bool = False) -> Any:
    """Return log π(token | before) of each response token, and its entropy if asked for.

    Args:
        model: A causal language model.
        rows: B responses with their prompts, padded or packed.
        temperature: Divides the logits, as in sampling.
        with_entropy: Whether to return the entropies too; they have no gradient.

    Returns:
        Log-probabilities (B, R), or a pair of them and the entropies (B, R); 0 off the response
        mask.
    """
    index, ids = rows.before.flatten()[rows.real], rows.responses.flatten()[rows.real]
    if head_is_linear(model):

        def at_places(hidden: Tensor, chosen: Tensor) -> tuple[Tensor, ...]:
            weight = whole_weight(unwrapped(model).get_output_embeddings().weight)
            excluded = excluded_ids(model, ids.device)
            found = head_logprobs(hidden, weight, ids[chosen], temperature, with_entropy, excluded=excluded)
            return found if with_entropy else found[:1]

        def compute_logprobs() -> tuple[Tensor, Tensor | None]:
            if cuts_rows(model):
                set_mode(model)
                found = over_parts(unwrapped(model).base_model, rows, index, at_places)
                return found if with_entropy else (found[0], None)
            hidden = _hidden(model, rows).index_select(0, index)
            weight = whole_weight(unwrapped(model).get_output_embeddings().weight)
            excluded = excluded_ids(model, ids.device)
            return head_logprobs(hidden, weight, ids, temperature, with_entropy, excluded=excluded)

        logprobs, entropies = compute_gathered(model, compute_logprobs)
    elif not with_entropy and in_chunks(model, len(ids)):
        logprobs = _chunked_logprobs(model, _hidden(model, rows).index_select(0, index), ids, temperature)
    else:
        assert not cuts_rows(model)  # `place_model` refuses such a head
        set_mode(model)
        logits = model(input_ids=rows.input_ids, **options_of(model, rows)).logits.flatten(0, 1)
        logits = without_soft_prompt(model, logits.index_select(0, index).float() / temperature)
        logprobs = token_logprobs(logits, ids)
        entropies = entropy(logits.detach()) if with_entropy else None
    return (_spread(logprobs, rows), _spread(entropies, rows)) if with_entropy else _spread(logprobs, rows)


def text_logprobs(model: nn.Module, ids: Tensor) -> Tensor:
    """Return log π(token | before) of all tokens of packed pretraining rows but the first.

    Args:
        model: A causal language model. If it has a soft prompt, it reads that before each row.
        ids: (N, T), without padding.

    Returns:
        (N, T − 1).
    """
    (inputs, before), targets = after_soft_prompt(model, ids[:, :-1]), ids[:, 1:]
    set_mode(model)
    if head_is_linear(model):

        def compute_logprobs() -> Tensor:
            trunk = unwrapped(model).base_model
            hidden = trunk(input_ids=inputs, **causal_options(model, inputs)).last_hidden_state[:, before:]
            weight = whole_weight(unwrapped(model).get_output_embeddings().weight)
            excluded = excluded_ids(model, ids.device)
            return head_logprobs(hidden.flatten(0, 1), weight, targets.flatten(), excluded=excluded)[0]

        return compute_gathered(model, compute_logprobs).view_as(targets)
    if in_chunks(model, targets.numel()):
        hidden = unwrapped(model).base_model(input_ids=inputs, use_cache=False).last_hidden_state[:, before:]
        return _chunked_logprobs(model, hidden.flatten(0, 1), targets.flatten(), 1.0).view_as(targets)
    logits = model(input_ids=inputs, use_cache=False).logits[:, before:]
    return token_logprobs(without_soft_prompt(model, logits), targets)


def in_chunks(model: nn.Module, tokens: int) -> bool:
    """Return whether the logits of a head of the model's own are computed some tokens at a time.

    They are where no gradient is wanted and they are more than `head_logprobs` holds at a time. A
    pass of a sharded model takes all ranks, which may have different numbers of tokens: whole.

    Args:
        model: A causal language model whose head is not linear.
        tokens: How many tokens have logits.
    """
    if torch.is_grad_enabled() or is_sharded(model) or tokens <= _tokens_of_chunk(model):
        return False
    return _head_reads_states(model)


def _tokens_of_chunk(model: nn.Module) -> int:
    """Return how many tokens' logits are computed at a time."""
    inner = unwrapped(model)
    device = next(inner.parameters()).device.type
    return max(1, CHUNK.get(device, CHUNK["cuda"]) // inner.config.get_text_config().vocab_size)


def _head_reads_states(model: nn.Module) -> bool:
    """Return whether a model's head reads nothing but hidden states; tried once per model."""
    inner = unwrapped(model)
    if not hasattr(inner, "_head_reads_states"):
        ids = torch.tensor([[1, 2, 3]], device=next(inner.parameters()).device)
        with off_the_gpu(inner):
            whole = inner(input_ids=ids, use_cache=False).logits[0]
            states = inner.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
            parts = _logits_of(inner, states)
        same = parts.shape == whole.shape and torch.allclose(parts, whole, rtol=1e-2, atol=1e-2)
        inner._head_reads_states = same
    return inner._head_reads_states


def _logits_of(inner: nn.Module, hidden: Tensor) -> Tensor:
    """Return a model's own logits (n, V) of hidden states (n, d).

    The model reads a single token, and its head gets the states in the place of that token's.
    """
    token = torch.ones(1, 1, dtype=torch.long, device=hidden.device)
    hook = inner.base_model.register_forward_hook(partial(_instead, hidden.unsqueeze(0)))
    try:
        return inner(input_ids=token, use_cache=False).logits[0]
    finally:
        hook.remove()


def _instead(hidden: Tensor, trunk: nn.Module, args: tuple, out: Any) -> Any:
    """Put other hidden states in the place of a trunk's, as a forward hook."""
    if hasattr(out, "last_hidden_state"):
        out.last_hidden_state = hidden
    return out


def _chunked_logprobs(model: nn.Module, hidden: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Return log-probabilities (n,) of ids by the model's own head, without all logits at once.

    Args:
        model: A causal language model.
        hidden: Hidden states (n, d) before each token.
        ids: Tokens (n,).
        temperature: Divides the logits.
    """
    inner, size, found = unwrapped(model), _tokens_of_chunk(model), []
    for start in range(0, len(hidden), size):
        some = slice(start, start + size)
        logits = without_soft_prompt(model, _logits_of(inner, hidden[some]).float() / temperature)
        found.append(token_logprobs(logits, ids[some]))
    return torch.cat(found)


def next_logits(model: nn.Module, rows: Rows) -> Tensor:
    """Return the logits (B, V) of the token after each row."""
    set_mode(model)
    if head_is_linear(model):
        inner = unwrapped(model)
        return compute_gathered(
            model, lambda: inner.get_output_embeddings()(_hidden(model, rows).index_select(0, rows.last))
        )
    return model(input_ids=rows.input_ids, **options_of(model, rows)).logits.flatten(0, 1).index_select(0, rows.last)


def response_values(model: nn.Module, rows: Rows) -> Tensor:
    """Return V of the state before each response token, (B, R); 0 off the response mask.

    reward_bias is subtracted, as from scores.
    """
    return _spread(_scalars(model, rows, rows.before.flatten()[rows.real]), rows)


def response_scores(model: nn.Module, rows: Rows) -> Tensor:
    """Return r(x, y) − reward_bias, (B,), read at the last real token of each response."""
    if isinstance(model, Ensemble):
        return model.combine([response_scores(member, rows) for member in model.members])
    return _scalars(model, rows, rows.last)


def _scalars(model: nn.Module, rows: Rows, index: Tensor) -> Tensor:
    """Return what a scalar head says at some places of the flattened rows, (n,)."""
    if not cuts_rows(model):
        return compute_gathered(model, lambda: _head(model, _hidden(model, rows).index_select(0, index)))
    set_mode(model)
    trunk = unwrapped(model).base_model
    return compute_gathered(model, lambda: over_parts(trunk, rows, index, lambda h, _: (_head(model, h),))[0])


@torch.no_grad()
def score_all(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    pad_id: int,
    batch_size: int,
    accelerator: Any,
    packed: bool = False,
) -> Tensor:
    """Score any number of responses; of a sharded model, all ranks call this together.

    Args:
        model: A reward model or an Ensemble.
        prompts: B prompts as ids.
        responses: B responses as ids.
        pad_id: Id that pads rows.
        batch_size: Responses per forward pass; those of similar length go together.
        accelerator: Where and in which dtype to compute.
        packed: Whether to pack the rows.

    Returns:
        Scores (B,) on the CPU.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(responses[i]))
    scores = torch.empty(len(prompts))
    scored: list[tuple[list[int], Tensor]] = []  # read together at the end
    parts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    # A sharded model's pass takes all ranks: one that has scored all of its own repeats a response.
    spare = order[:1] if is_sharded(model) else None
    for part, is_own in padded_micro_batches(parts, spare):
        rows = make_rows([prompts[i] for i in part], [responses[i] for i in part], pad_id, packed=packed)
        with accelerator.autocast():
            found = response_scores(model, rows.to(accelerator.device))
        if is_own:
            scored.append((part, found))
    if scored:
        scores[[i for part, _ in scored for i in part]] = torch.cat([found for _, found in scored]).float().cpu()
    return scores


def set_mode(model: nn.Module) -> None:
    """Set training mode if gradients are wanted, otherwise eval mode.

    Activation checkpointing works in training mode only. Dropout is off in both.
    """
    model.train(torch.is_grad_enabled())


def _spread(x: Tensor, rows: Rows) -> Tensor:
    """Return (n,) numbers at the places of the n response tokens (B, R), and 0 elsewhere."""
    blank = x.new_zeros(rows.responses.numel())
    return blank.index_copy(0, rows.real, x).view(rows.responses.shape)


def options_of(model: nn.Module, rows: Rows) -> dict:
    """Return what a model's forward takes for these rows, beside input_ids."""
    return trunk_options(rows, in_rows=is_compiled(model))


def _hidden(model: nn.Module, rows: Rows) -> Tensor:
    """Return the last hidden states of the model's trunk, (N·T, d)."""
    set_mode(model)
    return (
        unwrapped(model).base_model(input_ids=rows.input_ids, **options_of(model, rows)).last_hidden_state.flatten(0, 1)
    )


@torch.no_grad()
def head_is_linear(model: nn.Module) -> bool:
    """Return whether the logits are the unembedding times the hidden states and nothing more.

    Gemma caps its logits, Granite and Cohere scale them, Phi adds a bias. It is tried once per
    model, on three tokens, with hidden states scaled up so far that a cap shows whatever the
    weights are.
    """
    inner = unwrapped(model)
    if not hasattr(inner, "_head_is_linear"):
        head = inner.get_output_embeddings()
        if type(head) is not torch.nn.Linear or head.bias is not None:
            inner._head_is_linear = False
            return False
        ids = torch.tensor([[1, 2, 3]], device=next(inner.parameters()).device)
        training = inner.training
        inner.eval()
        with off_the_gpu(inner):
            states = inner.base_model(input_ids=ids, use_cache=False).last_hidden_state
            factor = LARGE / head(states).abs().max().clamp(min=1e-6)
            longer = inner.base_model.register_forward_hook(partial(_times, factor))
            try:
                whole = inner(input_ids=ids, use_cache=False).logits
            finally:
                longer.remove()
            parts = head(states * factor)
        inner.train(training)
        same = whole.shape == parts.shape and torch.allclose(whole, parts, rtol=1e-3, atol=1e-3 * LARGE)
        inner._head_is_linear = same
    return inner._head_is_linear


def _times(factor: Tensor, trunk: nn.Module, args: tuple, out: Any) -> Any:
    """Multiply a trunk's hidden states by a factor, as a forward hook.

    A trunk that returns them in another way is left as it is; the comparison then fails.
    """
    if hasattr(out, "last_hidden_state"):
        out.last_hidden_state = out.last_hidden_state * factor
    return out


def _head(model: nn.Module, hidden: Tensor) -> Tensor:
    """Apply the scalar head in fp32, whatever dtype the trunk computes in, and subtract the bias.

    bf16 would round scores around 6 to steps of 0.03.
    """
    bias = getattr(unwrapped(model).config, "reward_bias", None) or 0.0
    with torch.autocast(hidden.device.type, enabled=False):
        return score_head(unwrapped(model))(hidden.float()).squeeze(-1) - bias
