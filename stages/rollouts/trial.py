"""A pretrained model, tried on a few tokens before anything is trained: do the ways in which stages read it give the
same numbers, and does it read forwards alone?"""

import torch
from torch import Tensor

from data.groups import make_rows
from stages.models.families import off_the_gpu, ordinary_ids
from stages.models.forward import head_is_linear, response_logprobs
from stages.models.packing import can_pack
from stages.rollouts.lanes import PackedLane, lane_for

FORWARDS = 1e-3  # of a state's norm: what a later token may change of it; float32 rounds to some 1e-6
OTHER_LENGTHS = 64  # tokens: windows of attention that are shorter keep a model from packing
CACHE = "log-probs token by token, with its cache and padding on the left,"
TOLERANCE = {"rtol": 1e-3, "atol": 1e-3}  # of log-probs, in nats


@torch.no_grad()
def reading_problem(model, pad_id: int) -> str | None:
    """Why a causal model cannot be read as the stages read it; None if it can.

    Tried are its trunk's hidden states; that no token changes what comes before it; rows padded on the right; rows
    padded on the left that grow token by token with the cache, and leave it when they end; and, where it packs, packed
    rows and their cache.

    Args:
        model: a transformers model in eval mode, in float32.
        pad_id: the id that pads rows.

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
            at_once = response_logprobs(model, make_rows(prompts, responses, pad_id))
            if problem := cache_problem(model, prompts, responses, at_once, pad_id):
                return problem
            return packing_problem(model, prompts, responses, at_once, pad_id)
    except Exception as error:  # code of any kind
        return told(error)


def told(error: Exception) -> str:
    """An exception in a few words."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def cache_problem(model, prompts, responses, at_once: Tensor, pad_id: int) -> str | None:
    """What is wrong with rows that grow token by token, a line that begins with CACHE."""
    try:
        by_steps = logprobs_by_steps(model, lane_for(model, packed=False), prompts, responses, pad_id)
    except Exception as error:  # code of any kind
        return f"{CACHE} cannot be had ({told(error)})"
    if not torch.allclose(by_steps, at_once, **TOLERANCE):
        return f"{CACHE} are not those of a whole row"
    return None


def states_problem(model, ids: list[int], pad_id: int) -> str | None:
    """What is wrong with the trunk's states of rows padded on the right. ids: 12 ordinary tokens."""
    row, other, short = ids[:6], [*ids[:5], ids[11]], ids[:3]
    batch = torch.tensor([row, other, short + [pad_id] * 3], device=model.device)
    hidden = model.base_model(input_ids=batch, use_cache=False).last_hidden_state
    if hidden.shape[:2] != batch.shape:
        return f"its hidden states come as {tuple(hidden.shape)}, and should as (rows, tokens, width)"
    if changed(hidden[0, :5], hidden[1, :5]) > FORWARDS:
        return f"{type(model).__name__} reads in both directions: not a causal language model"
    if changed(hidden[0, :3], hidden[2, :3]) > FORWARDS:
        return "what stands behind a row, padding, changes its hidden states"
    return None


def changed(one: Tensor, other: Tensor) -> float:
    """The largest difference of two states (T, d), as a share of their norm. NaN counts as different."""
    share = (one - other).norm(dim=-1) / one.norm(dim=-1).clamp(min=1e-12)
    return share.nan_to_num(nan=torch.inf).max().item()


def packing_problem(model, prompts, responses, at_once: Tensor, pad_id: int) -> str | None:
    """What is wrong with packed rows, of a model that packs; the model is left as it was."""
    attention = model.config._attn_implementation
    if not can_pack(model, OTHER_LENGTHS):
        return None
    try:
        packed = response_logprobs(model, make_rows(prompts, responses, pad_id, packed=True))
        if not torch.allclose(packed, at_once, **TOLERANCE):
            return "log-probs of packed rows are not those of rows apart"
        if head_is_linear(model):
            by_steps = logprobs_by_steps(model, PackedLane, prompts, responses, pad_id)
            if not torch.allclose(by_steps, at_once, **TOLERANCE):
                return "log-probs token by token, from packed prompts, are not those of a whole row"
    finally:
        model.set_attn_implementation(attention)
    return None


def logprobs_by_steps(model, make_lane, prompts, responses, pad_id: int) -> Tensor:
    """Log-probs (B, R) of given responses as the sampler has them: token by token, rows leaving as they end."""
    width = max(map(len, responses))
    found = torch.zeros(len(prompts), width, device=model.device)
    lane, at = make_lane(model, prompts, width, pad_id), list(range(len(prompts)))
    logits = lane.start()
    for t in range(width):
        tokens = torch.tensor([responses[i][min(t, len(responses[i]) - 1)] for i in at], device=model.device)
        logprobs = logits.float().log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        for place, i in enumerate(at):
            if t < len(responses[i]):
                found[i, t] = logprobs[place]
        going = [place for place, i in enumerate(at) if t + 1 < len(responses[i])]
        if not going:
            break
        if len(going) < len(at):
            kept = torch.tensor(going, device=model.device)
            if lane.keep(kept):
                at, tokens = [at[place] for place in going], tokens[kept]
        logits = lane.step(tokens)
    return found
