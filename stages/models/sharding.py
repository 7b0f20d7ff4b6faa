"""Models in parts: each process holds a share of every weight, its gradient and its moments (torch's FSDP2; ZeRO-3).

A forward pass through a sharded model gathers one decoder layer after the other, in all processes at once: they must
take as many passes as each other (`parallel.padded_micro_batches`). The sampler, whose passes nobody can count before, reads a copy
that is gathered whole (`whole`). Only the first process reads models whole: it makes them (`made_by_first`)
and hands out the parts (`shard`).
"""

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from pipeline.errors import UserError
from pipeline.launch.parallel import from_rank_zero, is_rank_zero, rank_and_world_size
from stages.models.adapters import plain
from stages.models.ensemble import members
from stages.models.packing import packs, register
from stages.models.precision import castable, uncast

Found = TypeVar("Found")


def made_by_first(make: Callable[[], nn.Module]) -> nn.Module:
    """make() in the first process; in the others that model as it then is, buffers and all, but without its weights,
    which `shard` hands out. Whatever make() learns by trying the model (can it pack? is its head linear?) is thereby
    known to every process; a UserError in make() is raised everywhere."""
    made: list[nn.Module] = []

    def described() -> bytes | None:
        made.append(make())
        try:
            return pickle.dumps(skeleton_of(made[0]))
        except (pickle.PicklingError, AttributeError, TypeError):
            return None

    sent = from_rank_zero(described)
    if not made:
        made.append(_unpacked(sent) or make())
    return made[0]


def _unpacked(sent: bytes | None) -> nn.Module | None:
    """None where a model cannot be described to another process, as code that came with its weights (trust_remote_code)
    may not be known there: then it is read whole."""
    try:
        model = pickle.loads(sent or b"")
    except (EOFError, ImportError, AttributeError):
        return None
    inner = plain(model)
    if packs(model):  # attention is named in the configuration, and known by that name in a process that has set it
        register(inner)
    else:
        inner.set_attn_implementation(inner.config._attn_implementation)
    return model


def shard(model, device: torch.device, *, mean: bool = False) -> None:
    """Leave to this process its share of each weight, on `device`; all processes call it with the same model, whose
    weights are those in the first process. One alone keeps the whole. Gradients become sums over the processes (mean:
    means)."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if rank_and_world_size()[1] == 1:
        model.to(device)
        return
    mesh = dist.init_device_mesh(device.type, (rank_and_world_size()[1],))
    for member in members(model):
        inner = plain(member)
        member.__dict__["skeleton"] = skeleton_of(member).to(device)  # not a submodule
        for layer in layers_of(inner):
            _hand_over(layer, device)
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        _hand_over(inner, device)
        fully_shard(inner, mesh=mesh, reshard_after_forward=True)  # else old weights would outlive a load
        inner.__dict__["compute"] = lambda function: function()
        register_fsdp_forward_method(inner, "compute")
        if not mean:
            for module in parts_of(inner):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)


@torch.no_grad()
def _hand_over(module: nn.Module, device: torch.device) -> None:
    """The weights of `module` that are not in parts yet go from the first process to all, whatever those hold."""
    weights = [p for p in module.parameters() if not isinstance(p, DTensor)]
    kinds = from_rank_zero(lambda: [(p.shape, p.dtype) for p in weights])
    for p, (shape, dtype) in zip(weights, kinds, strict=True):
        x = p.data.to(device).contiguous() if is_rank_zero() else torch.empty(shape, dtype=dtype, device=device)
        dist.broadcast(x, src=0)
        p.data = x


def is_sharded(model) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(plain(member), FSDPModule) for member in members(model))


def layers_of(inner) -> list[nn.Module]:
    """The decoder layers of a transformers model; a UserError where it does not name them."""
    names = set(inner._no_split_modules or ())
    found = {name: module for name, module in inner.named_modules() if type(module).__name__ in names}
    if not found:
        raise UserError(
            f"launch.strategy: fsdp2 shares out layer by layer, and transformers names no layers of a "
            f"{inner.config.model_type} model; use ddp"
        )
    parents = lambda name: (name[:i] for i, c in enumerate(name) if c == ".")  # noqa: E731
    return [module for name, module in found.items() if not any(p in found for p in parents(name))]


def parts_of(inner) -> list[nn.Module]:
    """What is gathered at a time in a pass: its layers, and itself for the rest; nothing if it is not sharded."""
    from torch.distributed.fsdp import FSDPModule

    return [module for module in inner.modules() if isinstance(module, FSDPModule)]


def compute(model, function: Callable[[], Found]) -> Found:
    """function(), which reads weights of `model` outside the forward of it or of a layer: a sharded model's are
    gathered for it, and their gradients shared out after its backward pass."""
    if not is_sharded(model):
        return function()
    with casting_anew(next(model.parameters()).device.type):
        return plain(model).compute(function)


def casting_anew(device: str) -> torch.autocast:
    """Autocast as it is, without its cache: that would keep a cast of every layer that was gathered."""
    casts, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return torch.autocast(device, dtype=dtype, enabled=casts, cache_enabled=False)


def skeleton_of(model) -> nn.Module:
    """A copy of the model without its weights; it shares its configuration."""
    inner = plain(model)
    known = {id(p): nn.Parameter(p.new_empty(0), requires_grad=p.requires_grad) for p in model.parameters()}
    copied = copy.deepcopy(model, known | {id(inner.config): inner.config})
    for module in (copied, plain(copied)):
        module.__dict__.pop("forward", None)  # trl's, which reads the model that it was made for
    return copied


@contextmanager
def whole(model) -> Iterator[nn.Module]:
    """The model with all its weights in this process, for work that other processes do not follow; inside, nothing
    trains. A sharded one is gathered by all of them into a copy, its linear layers in the dtype of autocast."""
    if not is_sharded(model):
        yield model
        return
    inside = model.skeleton
    try:
        _fill(inside, model, keep=True)
        yield inside
    finally:
        for p in inside.parameters():
            p.data = p.new_empty(0)


def publishable(model, again: Callable[[], nn.Module] | None = None) -> nn.Module:
    """In the first process: the model on the CPU, with all its weights in float32; a sharded one is gathered by all
    processes into a copy. again() → what the model was made from, where frozen weights may be cast."""
    if is_sharded(model):
        inside = copy.deepcopy(model.skeleton).cpu()
        _fill(inside, model, keep=is_rank_zero())
        model = inside
    if is_rank_zero():
        model.cpu()
        if again is not None:
            uncast(model, again)
    return model


@torch.no_grad()
def _fill(inside, model, keep: bool) -> None:
    device = next(inside.parameters()).device
    casts = torch.is_autocast_enabled(device.type)
    linear = set(map(id, castable(inside))) if casts else set()
    for empty, p in zip(inside.parameters(), model.parameters(), strict=True):
        full = p.full_tensor()
        if keep:
            dtype = torch.get_autocast_dtype(device.type) if id(empty) in linear else full.dtype
            empty.data = full.to(device, dtype)


@torch.no_grad()
def full(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of sharded weights made whole on the CPU, by all processes, one at a time; others as they are. Processes
    that do not save get empty ones."""
    found = {}
    for name, x in tensors.items():
        if isinstance(x, DTensor):
            x = x.full_tensor()
            x = x.cpu() if is_rank_zero() else x.new_empty(0)
        found[name] = x
    return found


def like(parameter: Tensor, x: Tensor) -> Tensor:
    """A whole tensor as `parameter` is held: sharded if that is; else on its device."""
    if not isinstance(parameter, DTensor) or isinstance(x, DTensor):
        return x.to(parameter.device)
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(x.to(parameter.device), mesh, placements, src_data_rank=None)


def number(x) -> float:
    """A scalar tensor, also one that is held by several processes."""
    return float(x.full_tensor() if isinstance(x, DTensor) else x)


def part(x: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x
