"""Try a pretrained model on a few tokens before anything is trained.

The stages read a model in several ways: whole rows, packed rows, token by token with a cache. All
of them must give the same numbers, and no token may change what comes before it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from data.groups import make_rows
from stages.models.families import off_the_gpu, ordinary_ids
from stages.models.forward import head_is_linear, response_logprobs
from stages.models.packing import can_pack
from stages.models.soft_prompts import without_soft_prompt
from stages.rollouts.lanes import Lane, PackedLane, lane_for

CHANGED = 1e-3  # share of a hidden state's norm; rounding in float32 changes some 1e-6 of it
ROW_LENGTH = 64  # tokens; a model whose attention window is shorter does not pack
CACHE = "log-probs token by token, with its cache and padding on the left,"
TOLERANCE = {"rtol": 1e-3, "atol": 1e-3}  # of log-probabilities, in nats


@torch.no_grad()
def reading_problem(model: nn.Module, pad_id: int) -> str | None:
    """Return why a causal model cannot be read as the stages read it; None if it can.

    The trial compares the trunk's hidden states of rows with different ends, and of rows padded on
    the right; log-probabilities of rows that are padded on the left, grow token by token with the
    cache, and leave it when they end; and those of packed rows and their cache, if the model packs.

    Args:
        model: A transformers model in eval mode, in float32.
        pad_id: The id that pads rows.

    Returns:
        What is wrong, in a few words.
    """
    if model.base_model is model:
        return f"{type(model).__name__} names no trunk (base_model_prefix)"
    ids = ordinary_ids(model.config, 12)
    prompts, responses = [ids[:5], ids[5:7], ids[3:6]], [ids[7:11], ids[8:10], ids[9:12]]
    try:
        with off_the_gpu(model):
            if problem := states_problem(model, ids, pad_id):
                return problem
            expected = response_logprobs(model, make_rows(prompts, responses, pad_id))
            if problem := cache_problem(model, prompts, responses, expected, pad_id):
                return problem
            return packing_problem(model, prompts, responses, expected, pad_id)
    except Exception as error:  # a model's own code may raise anything
        return in_few_words(error)


def in_few_words(error: Exception) -> str:
    """Return an exception as a short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def states_problem(model: nn.Module, ids: list[int], pad_id: int) -> str | None:
    """Return what is wrong with the trunk's hidden states of rows padded on the right.

    Args:
        model: The model.
        ids: 12 ordinary tokens.
        pad_id: The id that pads rows.
    """
    row, other_end, short = ids[:6], [*ids[:5], ids[11]], ids[:3]
    batch = torch.tensor([row, other_end, short + [pad_id] * 3], device=model.device)
    hidden = model.base_model(input_ids=batch, use_cache=False).last_hidden_state
    if hidden.shape[:2] != batch.shape:
        return f"its hidden states have shape {tuple(hidden.shape)}; expected (rows, tokens, width)"
    if change(hidden[0, :5], hidden[1, :5]) > CHANGED:
        return f"{type(model).__name__} reads in both directions: not a causal language model"
    if change(hidden[0, :3], hidden[2, :3]) > CHANGED:
        return "padding after a row changes its hidden states"
    return None


def change(one: Tensor, other: Tensor) -> float:
    """Return the largest difference of two states (T, d) over their norm; infinity for NaN."""
    share = (one - other).norm(dim=-1) / one.norm(dim=-1).clamp(min=1e-12)
    return share.nan_to_num(nan=torch.inf).max().item()


def cache_problem(
    model: nn.Module, prompts: list[list[int]], responses: list[list[int]], expected: Tensor, pad_id: int
) -> str | None:
    """Return what is wrong with rows that grow token by token, in a line that starts with CACHE.

    Args:
        model: The model.
        prompts, responses: Token ids.
        expected: (B, R) log-probabilities of the responses in whole rows.
        pad_id: The id that pads rows.
    """
    try:
        by_steps = logprobs_by_steps(model, lane_for(model, packed=False), prompts, responses, pad_id)
    except Exception as error:  # a model's own code may raise anything
        return f"{CACHE} cannot be computed ({in_few_words(error)})"
    if not torch.allclose(by_steps, expected, **TOLERANCE):
        return f"{CACHE} are not those of a whole row"
    return None


def packing_problem(
    model: nn.Module, prompts: list[list[int]], responses: list[list[int]], expected: Tensor, pad_id: int
) -> str | None:
    """Return what is wrong with packed rows, if the model packs; its attention is left as it was.

    Args:
        model: The model.
        prompts, responses: Token ids.
        expected: (B, R) log-probabilities of the responses in whole rows.
        pad_id: The id that pads rows.
    """
    attention = model.config._attn_implementation
    if not can_pack(model, ROW_LENGTH):
        return None
    try:
        packed = response_logprobs(model, make_rows(prompts, responses, pad_id, packed=True))
        if not torch.allclose(packed, expected, **TOLERANCE):
            return "log-probs of packed rows are not those of separate rows"
        if head_is_linear(model):
            by_steps = logprobs_by_steps(model, PackedLane, prompts, responses, pad_id)
            if not torch.allclose(by_steps, expected, **TOLERANCE):
                return "log-probs token by token, from packed prompts, are not those of a whole row"
    finally:
        model.set_attn_implementation(attention)
    return None


def logprobs_by_steps(
    model: nn.Module,
    make_lane: Callable[..., Lane],
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    pad_id: int,
) -> Tensor:
    """Return log-probabilities (B, R) of given responses as the sampler computes them.

    Responses grow token by token, and leave the lane when they end.

    Args:
        model: The model.
        make_lane: The class of lane to try.
        prompts, responses: Token ids.
        pad_id: The id that pads rows.
    """
    width = max(map(len, responses))
    logprobs = torch.zeros(len(prompts), width, device=model.device)
    lane, rows = make_lane(model, prompts, width, pad_id), list(range(len(prompts)))
    logits = lane.start()
    for t in range(width):
        # a row that has ended, but is still in the lane, repeats its last token
        tokens = torch.tensor([responses[i][min(t, len(responses[i]) - 1)] for i in rows], device=model.device)
        logits = without_soft_prompt(model, logits)
        of_tokens = logits.float().log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        for at, i in enumerate(rows):
            if t < len(responses[i]):
                logprobs[i, t] = of_tokens[at]
        unfinished = [at for at, i in enumerate(rows) if t + 1 < len(responses[i])]
        if not unfinished:
            break
        if len(unfinished) < len(rows):
            kept = torch.tensor(unfinished, device=model.device)
            if lane.keep(kept):
                rows, tokens = [rows[at] for at in unfinished], tokens[kept]
        logits = lane.step(tokens)
    return logprobs
