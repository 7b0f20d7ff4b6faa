"""Keep activations in the CPU's memory between the forward and the backward pass."""

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from stages.models.adapters import unwrapped

SMALLEST = 4096
"""Bytes below which a tensor stays on the device: the copies would take longer than they save."""


def to_host(x: Tensor) -> Tensor:
    """Return a copy of a tensor in the CPU's memory, pinned if it comes from a GPU."""
    held = torch.empty_like(x, device="cpu", pin_memory=x.device.type == "cuda")
    # Without waiting: what reads the copy runs later on the same stream.
    return held.copy_(x, non_blocking=True)


@dataclass(frozen=True)
class Waiting:
    """A saved tensor that waits in the CPU's memory."""

    device: torch.device
    """The device that it came from."""
    copy: Tensor
    """Its copy."""


class ActivationOffload:
    """Send what the layers of a model save for the backward pass to the CPU's memory.

    These are forward hooks of the trunk: the head is left out, as its backward pass follows at
    once. They go around gradient checkpointing, which then sends the input of each layer. Weights
    stay where they are. Copies are exact, so results are the same to the bit.
    """

    def __init__(self, trunk: nn.Module, keep: Callable[[Tensor], Tensor] = to_host) -> None:
        """Prepare for a model.

        Args:
            trunk: The model without its head.
            keep: Copies a tensor to where it waits.
        """
        self.trunk, self.keep = trunk, keep
        self.running: list[saved_tensors_hooks] = []
        self.handles: list[Any] = []
        # By storage, as long as it lives: several operations save the same tensor.
        self.copies: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def attach(self) -> None:
        """Register the hooks."""
        self.handles = [
            self.trunk.register_forward_pre_hook(self.before),
            self.trunk.register_forward_hook(self.after, always_call=True),
        ]

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()

    def __deepcopy__(self, memo: dict) -> "ActivationOffload":
        """Return hooks for the copy of the model."""
        return ActivationOffload(copy.deepcopy(self.trunk, memo), self.keep)

    def before(self, module: nn.Module, args: tuple) -> None:
        """Begin to offload, in a pass that a backward pass will follow."""
        if torch.is_grad_enabled():
            hooks = saved_tensors_hooks(self.pack, self.unpack)
            hooks.__enter__()
            self.running.append(hooks)

    def after(self, module: nn.Module, args: tuple, result: Any) -> None:
        """End it; also where the pass has failed."""
        if self.running:
            self.running.pop().__exit__(None, None, None)

    def pack(self, x: Tensor) -> Tensor | Waiting:
        """Return what is kept in place of a saved tensor."""
        if x.nbytes < SMALLEST or is_weight(x):
            return x
        copies = self.copies.setdefault(x.untyped_storage(), {})
        key = (x.dtype, x.shape, x.stride(), x.storage_offset(), x._version)  # in-place changes count it up
        if key not in copies:
            copies[key] = self.keep(x)
        return Waiting(x.device, copies[key])

    def unpack(self, kept: Tensor | Waiting) -> Tensor:
        """Return the saved tensor, on its device."""
        return kept if isinstance(kept, Tensor) else kept.copy.to(kept.device, non_blocking=True)


def is_weight(x: Tensor) -> bool:
    """Return whether a tensor is a weight, a view of one, or another leaf that trains."""
    base = x if x._base is None else x._base
    return isinstance(base, nn.Parameter) or (base.is_leaf and base.requires_grad)


def offload_activations(model: nn.Module, keep: Callable[[Tensor], Tensor] = to_host) -> ActivationOffload:
    """Let a model's activations wait in the CPU's memory, as long as it trains.

    Args:
        model: The model, with its adapter; of an ensemble, one member.
        keep: Copies a tensor to where it waits.
    """
    offload = ActivationOffload(unwrapped(model).base_model, keep)
    offload.attach()
    return offload


@contextmanager
def offloading(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Let a model's activations wait in the CPU's memory while the context lasts.

    Args:
        model: The model.
        wanted: Whether to do so; otherwise nothing changes.
    """
    offload = offload_activations(model) if wanted else None
    try:
        yield
    finally:
        if offload is not None:
            offload.detach()
