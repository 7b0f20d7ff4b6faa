"""Drop out what the layers of a model add to its residual stream, as GPT-2's resid_pdrop does.

Models are loaded with their own dropout off (`without_dropout`), since rollouts and updates must
agree; many families have no dropout at all. Here, hooks on the two modules of each layer whose
output is added to the stream do it for all families, in training mode only. Whether these are the
right modules is tried: with both outputs set to 0, every layer must return its input.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import UserError
from stages.models.adapters import unwrapped
from stages.models.sharding import decoder_layers

ATTENTION = ("self_attn", "attn", "attention", "self_attention", "linear_attn", "mamba", "temporal_block", "conv")
MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "mlp_block", "fc2")
ADDED = (  # pairs of children of a layer; the first pair that it has both of is taken
    ("post_self_attn_layernorm", "post_mlp_layernorm"),  # the norms of GLM-4 come before the sum
    ("post_attention_layernorm", "post_feedforward_layernorm"),  # so do those of Gemma 2 and OLMo 2
    *itertools.product(ATTENTION, MLP),
)


@contextmanager
def residual_dropout(model: nn.Module, p: float | None) -> Iterator[None]:
    """Train a model with residual dropout inside the block; without any if p is None.

    Args:
        model: The model, with its adapter or without.
        p: The probability that a number is dropped.
    """
    with hooked([] if p is None else modules_that_add(unwrapped(model)), partial(dropped, p or 0.0)):
        yield


def modules_that_add(inner: nn.Module) -> list[nn.Module]:
    """Return the modules whose output is added to the residual stream, in order.

    Args:
        inner: The model itself.

    Raises:
        UserError: Its layers have no such modules by names that are known here.
    """
    found = []
    for layer in layers_of(inner):
        pair = next((pair for pair in ADDED if all(hasattr(layer, name) for name in pair)), None)
        if pair is None:
            raise UserError(cannot(inner, f"its {type(layer).__name__} has no attention and MLP by a known name"))
        found += [getattr(layer, name) for name in pair]
    return found


def layers_of(inner: nn.Module) -> list[nn.Module]:
    """Return the decoder layers of a model.

    Raises:
        UserError: transformers does not name them.
    """
    try:
        return decoder_layers(inner)
    except UserError:
        raise UserError(cannot(inner, "transformers does not name its layers")) from None


def check_residual_dropout(model: nn.Module) -> None:
    """Check that what is dropped is all that the layers add to the residual stream.

    Args:
        model: The model on a device, whole.

    Raises:
        UserError: A layer changes its input otherwise.
    """
    inner = unwrapped(model)
    changed: list[str] = []

    def compare(layer: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        if not torch.equal(given, first(out)):
            changed.append(type(layer).__name__)

    ids = torch.tensor([[1, 2, 3]], device=next(inner.parameters()).device)
    training = inner.training
    inner.eval()
    watches = [layer.register_forward_hook(compare, with_kwargs=True) for layer in layers_of(inner)]
    try:
        with torch.no_grad(), hooked(modules_that_add(inner), torch.zeros_like, always=True):
            inner(input_ids=ids, use_cache=False)
    finally:
        for watch in watches:
            watch.remove()
        inner.train(training)
    if changed:
        raise UserError(cannot(inner, f"its {changed[0]} adds more to the residual stream than attention and MLP"))


@contextmanager
def hooked(modules: list[nn.Module], change: Callable[[Tensor], Tensor], always: bool = False) -> Iterator[None]:
    """Change what modules return, inside the block.

    Args:
        modules: The modules.
        change: Returns the changed output.
        always: In evaluation mode too.
    """

    def hook(module: nn.Module, args: tuple, out: Any) -> Any:
        if not (module.training or always):
            return out
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def dropped(p: float, x: Tensor) -> Tensor:
    """Return x with each number dropped with probability p, and the others divided by 1 − p."""
    return F.dropout(x, p)


def first(out: Any) -> Tensor:
    """Return the hidden states that a layer returns, alone or before other outputs."""
    return out[0] if isinstance(out, tuple) else out


def cannot(inner: nn.Module, why: str) -> str:
    """Return the error line for a model that cannot be trained with residual dropout.

    Args:
        inner: The model.
        why: The reason.
    """
    return f"sft.dropout: a {type(inner).__name__} cannot be trained with residual dropout here ({why}); set it to null"
