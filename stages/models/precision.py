"""What does not train of linear layers, in the dtype that it is multiplied in: the same numbers at half the memory.

Under autocast a linear layer casts its weight at each use; where no optimizer adds to it, casting once is enough.
"""

from collections.abc import Callable

import torch
from torch import nn

from stages.models.adapters import is_adapted, plain
from stages.models.ensemble import members


def cast_frozen(model, dtype: torch.dtype) -> None:
    """Casts what would be cast at each use."""
    for member in members(model):
        for p in castable(member):
            if not p.requires_grad:
                p.data = p.data.to(dtype)


def castable(model) -> list[nn.Parameter]:
    """What of a model may be cast where it does not train: linear layers but the scalar head, which computes in
    float32, and a head that is also the embedding; nothing under DoRA, whose norms are those of the float32 weights."""
    if is_adapted(model) and any(getattr(c, "use_dora", False) for c in model.peft_config.values()):
        return []
    inner = plain(model)
    apart = [inner.get_input_embeddings(), getattr(inner, "score", None), getattr(inner, "classifier", None)]
    kept = {id(p) for module in apart if module is not None for p in module.parameters()}
    linear = [module for module in inner.modules() if type(module) is nn.Linear]
    return [p for module in linear for p in module.parameters() if id(p) not in kept]


def uncast(model, again: Callable[[], nn.Module]) -> None:
    """What `cast_frozen` has cast is float32 once more, as in again(), which the model was made from."""
    named = plain(model).named_parameters()
    cast = [(name, p) for name, p in named if p.is_floating_point() and p.dtype != torch.float32]  # not what is packed
    if cast:
        known = {name.replace(".base_layer", ""): p for name, p in plain(again()).named_parameters()}
        for name, p in cast:
            p.data = known[name.replace(".base_layer", "")].data.to(p.device)
