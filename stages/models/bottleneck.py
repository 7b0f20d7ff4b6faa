"""Add bottleneck adapters to a model: a few units behind, or beside, the blocks of its layers.

An adapter computes scale · up(f(down(x))) with few units between `down` and `up` (Houlsby 2019,
section 2.1). Its result is added to what the block gives: behind a block x is the block's output
(Houlsby: attention and MLP; Pfeiffer 2020: MLP), beside it x is the block's input (parallel
adapters, He 2022, section 3.2). The nonlinearity keeps it from being merged into weights, so the
modules stay in the model, which is otherwise like any other.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import UserError

NAME = "bottleneck"  # of the adapter inside the block that it belongs to
REDUCTION = 16  # width of the model over that of the bottleneck, unless the settings say otherwise
ATTENTION = ("self_attn", "attn", "attention", "self_attention")
MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


@dataclass(frozen=True)
class Form:
    """Describe one of the forms that the literature has."""

    behind_attention: bool
    """Whether an attention block has an adapter too; an MLP block always has."""
    beside: bool
    """Whether an adapter reads the block's input, not its output."""
    activation: str
    """The nonlinearity unless the settings say otherwise: the one of the paper's own code."""
    scale: float
    """The factor unless the settings say otherwise: the one of the paper."""


FORMS = {
    "houlsby": Form(behind_attention=True, beside=False, activation="gelu", scale=1.0),
    "pfeiffer": Form(behind_attention=False, beside=False, activation="relu", scale=1.0),
    "parallel_adapter": Form(behind_attention=False, beside=True, activation="relu", scale=4.0),
}


@dataclass(frozen=True)
class BottleneckShape:
    """State what adapters a model has, all of them of one shape."""

    method: str
    """A key of FORMS."""
    size: int
    """Units of the bottleneck."""
    activation: str
    """A key of ACTIVATIONS."""
    scale: float
    """The factor of an adapter's output."""


class Bottleneck(nn.Module):
    """Compute scale · up(f(down(x))); 0 until it is trained."""

    def __init__(self, width: int, shape: BottleneckShape) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, shape.size), nn.Linear(shape.size, width)
        self.shape = shape
        nn.init.normal_(self.down.weight, std=0.02)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added to the block's output; x and the result are (B, T, width)."""
        return self.shape.scale * self.up(ACTIVATIONS[self.shape.activation](self.down(x)))


def shape_of(
    model: nn.Module, method: str, size: int | None = None, activation: str | None = None, scale: float | None = None
) -> BottleneckShape:
    """Return the shape of a method's adapters, with defaults where nothing is given.

    Args:
        model: The model that they are for.
        method: A key of FORMS.
        size: Units of the bottleneck; None: the model's width over REDUCTION.
        activation: The nonlinearity; None: the paper's.
        scale: The factor; None: the paper's.
    """
    form = FORMS[method]
    width = model.config.get_text_config().hidden_size
    return BottleneckShape(
        method=method,
        size=size or max(1, width // REDUCTION),
        activation=activation or form.activation,
        scale=form.scale if scale is None else scale,
    )


def add_bottlenecks(model: nn.Module, shape: BottleneckShape) -> None:
    """Add adapters to a model; they change nothing until they are trained.

    Args:
        model: A transformers model without bottlenecks; changed.
        shape: Their shape.

    Raises:
        UserError: The family's layers have no blocks that adapters can be added to.
    """
    form, embedding = FORMS[shape.method], model.get_input_embeddings().weight
    width = model.config.get_text_config().hidden_size
    for block in blocks(model, with_attention=form.behind_attention):
        adapter = Bottleneck(width, shape).to(embedding.device, torch.float32)
        block.add_module(NAME, adapter)
        block.register_forward_hook(_add_beside if form.beside else _add_behind, with_kwargs=True)


def blocks(model: nn.Module, *, with_attention: bool) -> list[nn.Module]:
    """Return the MLP blocks of a model's decoder layers, and the attention blocks if asked for.

    Args:
        model: A transformers model.
        with_attention: Whether attention blocks are returned too.

    Raises:
        UserError: A layer has no such block, or one that adds the residual itself, so that what it
            computes cannot be told apart.
    """
    from stages.models.sharding import decoder_layers

    found = []
    for layer in decoder_layers(model):
        for names in (ATTENTION, MLP) if with_attention else (MLP,):
            block = next((child for name, child in layer.named_children() if name in names), None)
            if block is None or "residual" in inspect.signature(block.forward).parameters:
                what = "an MLP" if names is MLP else "an attention"
                raise UserError(
                    f"model.peft.method: the layers of this {model.config.model_type} model have no module that is "
                    f"{what} block and nothing else, which a bottleneck adapter is added to; use lora"
                )
            found.append(block)
    return found


def bottlenecks(model: nn.Module) -> dict[str, Bottleneck]:
    """Return the bottleneck adapters of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Bottleneck)}


def bottleneck_shape(model: nn.Module) -> BottleneckShape | None:
    """Return the shape of a model's bottleneck adapters; None without any."""
    return next((adapter.shape for adapter in bottlenecks(model).values()), None)


def _add_behind(block: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> Any:
    """Add the adapter's answer to a block's output, as a forward hook."""
    x = out[0] if isinstance(out, tuple) else out
    return _in_place_of(out, x + block.bottleneck(x))


def _add_beside(block: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> Any:
    """Add the adapter's answer to a block's input to its output, as a forward hook."""
    x = args[0] if args else kwargs["hidden_states"]
    return _in_place_of(out, (out[0] if isinstance(out, tuple) else out) + block.bottleneck(x))


def _in_place_of(out: Any, hidden: Tensor) -> Any:
    """Return a block's output with other hidden states; some blocks return more beside them."""
    return (hidden, *out[1:]) if isinstance(out, tuple) else hidden
