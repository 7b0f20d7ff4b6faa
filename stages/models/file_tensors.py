"""Yield a model's weights with adapters merged, under the names that they have in its files."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from stages.models.adapters import has_adapter, unwrapped
from stages.models.quantized import Quantized, dequantize
from stages.models.sharding import fsdp_modules
from stages.models.tensor_parallel import whole_weight

SAVED = ".modules_to_save.default"
"""Part of the names inside a module that trains in full beside an adapter."""


@torch.no_grad()
def file_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, weight) for each weight of a model.

    A head that is tied to the embedding is yielded too, though files leave it out. The model is not
    changed: a layer with an adapter is copied for the merge. All processes call this together for a
    sharded model, of which one decoder layer (of tensor parallelism, one weight) at a time is
    gathered.
    """
    inner = unwrapped(model)
    names = {module: name for name, module in inner.named_modules()}
    by_fsdp = fsdp_modules(inner)
    parts = by_fsdp or [inner]
    for part in parts:
        if by_fsdp:
            part.unshard()
        for module in own_modules(part, set(parts) - {part}):
            for name, x in own_tensors(as_in_file(module)).items():
                yield f"{names[module]}.{name}".lstrip(".").replace(SAVED, ""), whole_weight(x)
        if by_fsdp:
            part.reshard()


def own_modules(module: nn.Module, others: set[nn.Module]) -> Iterator[nn.Module]:
    """Yield a module and its descendants, without those inside adapters or in `others`.

    Args:
        module: Where to start.
        others: Modules to leave out, with all below them.
    """
    if hasattr(module, "modules_to_save"):  # a module that trains in full: its copy in place of the original
        yield from own_modules(module.modules_to_save["default"], others)
        return
    yield module
    if not has_adapter(module):
        for child in module.children():
            if child not in others:
                yield from own_modules(child, others)


def as_in_file(module: nn.Module) -> nn.Module:
    """Return the module itself, or a plain one with what was learned.

    Layers that peft or `quantize` changed are copied, dequantized and merged.
    """
    if has_adapter(module) or isinstance(module, Quantized):
        holder = nn.ModuleList([copy.deepcopy(module)])
        dequantize(holder)
        module = holder[0]
    if has_adapter(module):
        module.merge()
        module = module.get_base_layer()
    return module


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's own weights, and the buffers of it that files contain."""
    passing = module._non_persistent_buffers_set
    buffers = {name: x for name, x in module.named_buffers(recurse=False) if name not in passing}
    return dict(module.named_parameters(recurse=False)) | buffers


def tied_head(model: nn.Module) -> str | None:
    """Return the name of the head's weight if it is the embedding's, otherwise None."""
    inner = unwrapped(model)
    embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        return None
    return next(f"{name}.weight" for name, module in inner.named_modules() if module is head)
