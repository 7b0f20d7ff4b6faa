"""A model's weights, adapters folded in, under the names that its files have for them."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from stages.models.adapters import is_tuned, plain
from stages.models.quantized import Quantized, dequantize
from stages.models.sharding import is_sharded, parts_of


@torch.no_grad()
def file_tensors(model) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) for each weight; a head that is the embedding comes under its own name too, which files leave out.
    The model stays as it is: a layer with an adapter is copied for it. Of a sharded model, which all processes call
    this for, one decoder layer at a time is whole."""
    inner = plain(model)
    names = {module: name for name, module in inner.named_modules()}
    parts = parts_of(inner) or [inner]
    for part in parts:
        if is_sharded(model):
            part.unshard()
        for module in own_modules(part, set(parts) - {part}):
            for name, x in held(as_in_file(module)).items():
                yield f"{names[module]}.{name}".lstrip("."), x
        if is_sharded(model):
            part.reshard()


def own_modules(module: nn.Module, others: set[nn.Module]) -> Iterator[nn.Module]:
    """The module and those below it, but not what is in an adapter, or in one of `others`."""
    yield module
    if not is_tuned(module):
        for child in module.children():
            if child not in others:
                yield from own_modules(child, others)


def as_in_file(module: nn.Module) -> nn.Module:
    """The module itself; or of a layer that peft or `quantize` changed, a plain one with what was learned."""
    if is_tuned(module) or isinstance(module, Quantized):
        holder = nn.ModuleList([copy.deepcopy(module)])
        dequantize(holder)
        module = holder[0]
    if is_tuned(module):
        module.merge()
        module = module.get_base_layer()
    return module


def held(module: nn.Module) -> dict[str, Tensor]:
    """Its own weights, and buffers that files hold."""
    passing = module._non_persistent_buffers_set
    buffers = {name: x for name, x in module.named_buffers(recurse=False) if name not in passing}
    return dict(module.named_parameters(recurse=False)) | buffers


def tied_head(model) -> str | None:
    """The name of the head's weight where that is the embedding's."""
    inner = plain(model)
    embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        return None
    return next(f"{name}.weight" for name, module in inner.named_modules() if module is head)
