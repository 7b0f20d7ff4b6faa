"""A model with code of its own, tried on a few tokens: do the ways in which stages read it give the same numbers?"""

import torch

from data.groups import make_rows
from stages.models.forward import response_logprobs
from stages.rollouts.transformers import sample_with_logprobs

PROMPTS = [[3, 1, 2, 4, 1], [2, 3]]


@torch.no_grad()
def reading_problem(model, pad_id: int) -> str | None:
    """What is wrong with how a causal model is read: its trunk's hidden states, padding on either side, its cache.
    None: nothing."""
    trunk = model.base_model
    if trunk is model:
        return f"{type(model).__name__} names no trunk (base_model_prefix)"
    try:
        ids = torch.tensor([[3, 1, 2], [2, 3, 1]], device=model.device)
        positions = torch.arange(3, device=model.device).expand(2, 3)
        hidden = trunk(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        if hidden.shape[:2] != ids.shape:
            return f"its hidden states come as {tuple(hidden.shape)}, and should as (rows, tokens, width)"
        drawn = sample_with_logprobs(model, PROMPTS, [0, 1], response_length=4, eos_id=-1, pad_id=pad_id)
        at_once = response_logprobs(model, make_rows(PROMPTS, drawn.responses, pad_id))
    except Exception as error:  # code of any kind
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if not torch.allclose(drawn.logprobs, at_once, rtol=1e-2, atol=1e-3):
        return "log-probs token by token, with its cache and padding on the left, are not those of a whole row"
    return None
