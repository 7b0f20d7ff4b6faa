"""Compile the decoder layers of models that train or score, each as one graph for all shapes.

Between its matrix products a layer moves far more bytes than they need: norms, rotations,
activations and residual sums read and write the hidden states one after the other. torch.compile
fuses them. The layers are compiled in place (`nn.Module.compile`), so names of weights, checkpoints
and published folders stay as they are. Whether a layer is one graph is tried on a few tokens.

Only forward passes over rows use the compiled layers. Samplers decode with other shapes and record
graphs of their own, so they run within `as_written`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data.groups import make_rows
from pipeline.errors import UserError
from stages.models.adapters import unwrapped
from stages.models.ensemble import members
from stages.models.packing import reads_packed_rows, trunk_options
from stages.models.sharding import decoder_layers, is_sharded

FLAG = "has_compiled_layers"  # in the __dict__ of a model whose layers are compiled
GRAPHS = 64
"""Graphs of one function: models of a family share them, with and without gradients, packed or
not, with rows of one or several responses. torch's own limit of 8 would be reached without a
word."""
TRIED = ([[3, 1, 2], [3, 1, 2], [2, 3]], [[2, 1], [1, 3, 2], [1]])  # prompts and responses to try


@dataclass(frozen=True)
class Compiling:
    """Say that decoder layers are to be compiled, and what happens where they cannot."""

    is_asked_for: bool
    """Whether the settings ask for it (model.compile: true); otherwise it is tried."""
    say: Callable[[str], None]
    """Prints a line."""
    backend: str = "inductor"
    """torch.compile's."""

    def apply(self, model: nn.Module, autocast: Callable[[], Any]) -> None:
        """Compile the layers of a model on its device.

        Args:
            model: A model or an Ensemble.
            autocast: Returns the context in which it computes.

        Raises:
            UserError: They have to be compiled, and cannot.
        """
        problem = compile_layers(model, autocast, self.backend)
        if problem is None:
            return
        if self.is_asked_for:
            raise UserError(f"model.compile: true, and the layers cannot be compiled ({problem}); set it to false")
        self.say(f"layers run as they are written, since they cannot be compiled here ({problem})")


def is_compiled(model: nn.Module) -> bool:
    """Return whether the decoder layers of a model are compiled."""
    return FLAG in unwrapped(model).__dict__


def as_written(model: nn.Module) -> AbstractContextManager:
    """Return a context in which the layers of a model run as they are written."""
    # Without compiled layers torch's compiler is not even imported, which takes a second.
    return torch.compiler.set_stance("force_eager") if is_compiled(model) else nullcontext()


def forget_compiled(model: nn.Module) -> None:
    """Let the layers of a model run as they are written from now on.

    Args:
        model: A model or an Ensemble; one that is not compiled is left as it is.
    """
    for member in members(model):
        if is_compiled(member):
            _undo(decoder_layers(unwrapped(member)))
            unwrapped(member).__dict__.pop(FLAG)


def compile_layers(model: nn.Module, autocast: Callable[[], Any], backend: str = "inductor") -> str | None:
    """Compile the decoder layers of a model that reads packed rows, on its device.

    Args:
        model: A model or an Ensemble; changed if it can be compiled.
        autocast: Returns the context in which it computes.
        backend: torch.compile's.

    Returns:
        Why it cannot be compiled, and is left as it was; or None.
    """
    for member in members(model):
        inner = unwrapped(member)
        if not reads_packed_rows(member):
            return f"a {type(inner).__name__} does not read packed rows here, or its attention is not sdpa"
        try:
            layers = decoder_layers(inner)
        except UserError:
            return f"transformers names no layers of a {type(inner).__name__}"
        if is_sharded(member):
            return "its weights are sharded, and hooks that gather them have kept layers from being one graph"
        with autocast():
            expected = _hidden_states(member)
            inner.__dict__[FLAG] = True
            try:
                # The first pass only looks whether a layer is one graph.
                _compile(layers, backend="eager", fullgraph=True)
                found = [_hidden_states(member)]
                _undo(layers)
                _compile(layers, backend=backend)
                found.append(_hidden_states(member))
            except Exception as error:  # of torch's compiler, which raises many kinds
                problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            else:
                close = {"rtol": 1e-2, "atol": 1e-2 * expected.abs().mean().item()}
                same = all(torch.allclose(x, expected, **close) for x in found)
                problem = None if same else f"the compiled layers of a {type(inner).__name__} compute something else"
        if problem is not None:
            forget_compiled(member)
            return problem
    return None


def _compile(layers: list[nn.Module], **options: Any) -> None:
    """Compile layers in place, as one graph for all shapes.

    Args:
        layers: The layers.
        options: Of torch.compile.
    """
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    for layer in layers:
        layer.compile(dynamic=True, **options)


def _undo(layers: list[nn.Module]) -> None:
    """Let layers run as they are written again."""
    for layer in layers:
        layer._compiled_call_impl = None


@torch.no_grad()
def _hidden_states(model: nn.Module) -> Tensor:
    """Return what a model's trunk says of a few packed tokens."""
    inner, training = unwrapped(model), model.training
    model.eval()
    rows = make_rows(*TRIED, 0, packed=True).to(next(inner.parameters()).device)
    options = trunk_options(rows, in_rows=is_compiled(model))
    states = inner.base_model(input_ids=rows.input_ids, **options).last_hidden_state
    model.train(training)
    return states.float()
