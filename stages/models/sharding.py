"""Shard models: each process holds a share of every weight, its gradient and its moments.

This is torch's FSDP2 (ZeRO-3). A forward pass through a sharded model all-gathers one decoder
layer after the other, in all processes at once, so all must make the same number of passes
(`parallel.padded_micro_batches`). With `shard: gradients`, layers stay gathered until their
backward pass; with `offload: all`, shards lie in the CPU's memory, with one process too. The
sampler's number of passes is not known beforehand, so it reads a copy that is gathered whole
(`gathered`). Only rank 0 reads models from disk: it makes them (`make_on_rank_zero`) and sends out
the shards (`shard`).

With launch.tensor_parallel the ranks of a group hold shares of a model that are never gathered in a
pass (tensor_parallel.py); fsdp2 then shards each share among the groups.
"""

import copy
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from pipeline.errors import UserError
from pipeline.launch.parallel import arrangement, from_rank_zero, is_rank_zero, rank_and_world_size
from pipeline.store.shares import StoredTensor
from stages.models import tensor_parallel
from stages.models.adapters import is_adapted, unwrapped
from stages.models.context_parallel import compute_whole_rows
from stages.models.ensemble import members
from stages.models.layout import Layout
from stages.models.packing import NAME as PACKED
from stages.models.packing import register
from stages.models.precision import castable, uncast
from stages.models.prefix import ATTENTION as BEHIND_PREFIX
from stages.models.shares import read_like

Item = TypeVar("Item")
Result = TypeVar("Result")


def make_on_rank_zero(make: Callable[[], nn.Module]) -> nn.Module:
    """Make a model on rank 0, and on the other ranks the same model without its weights.

    Buffers and attributes are sent to the other ranks; `shard` sends the weights. Whatever make()
    finds out by trying the model (can it pack? is its head linear?) is thus known to every process.

    Args:
        make: Returns the model.

    Raises:
        UserError: make() raised it on rank 0; it is raised on all ranks.
    """
    made: list[nn.Module] = []

    def described() -> bytes | None:
        made.append(make())
        try:
            return pickle.dumps(without_weights(made[0]))
        except (pickle.PicklingError, AttributeError, TypeError):
            return None  # each rank then makes the model itself

    sent = from_rank_zero(described)
    if not made:  # a rank other than 0
        made.append(_unpickled(sent) or make())
    return made[0]


def _unpickled(sent: bytes | None) -> nn.Module | None:
    """Return the model that rank 0 described, or None if it cannot be described.

    Code that came with a model (trust_remote_code) may not be importable on this rank; then the
    model is read whole here too.
    """
    try:
        model = pickle.loads(sent or b"")  # without a description, an EOFError
    except (EOFError, ImportError, AttributeError):
        return None
    inner = unwrapped(model)
    # The configuration names the attention function, which each process registers by itself.
    kernel = inner.config._attn_implementation
    if kernel in (PACKED, BEHIND_PREFIX):
        register(inner, kernel)
    else:
        inner.set_attn_implementation(kernel)
    return model


def shard(
    model: nn.Module,
    device: torch.device,
    *,
    mean: bool = False,
    layout: Layout | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Keep this process's share of each weight, on `device`, or in the CPU's memory.

    All processes call it with the same model, whose weights are those on rank 0. With one process
    the model stays whole, unless it is offloaded.

    Args:
        model: Made by `make_on_rank_zero`; changed.
        device: Where the shard goes, and where the model computes.
        mean: Whether gradients are averaged over processes; otherwise they are summed.
        layout: When weights are freed, and whether shards are offloaded; None: as `Layout()` says.
        dtype: What autocast casts to in every pass of the model; the weights of `gathered_cast` are
            gathered in it. None: all are gathered as they are.

    Raises:
        UserError: Tensor parallelism is asked for, and the model cannot be cut.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    layout = layout or Layout()
    offloads = layout.offload == "all"
    if rank_and_world_size()[1] == 1:
        if not offloads:
            model.to(device)
            return
        _meet_alone(device)
    weights = arrangement().weights
    # Tensor parallelism alone may shard, or leave nobody to share with.
    over_data = weights is None or (arrangement().fsdp and weights["data"].size() > 1)
    mesh = dist.init_device_mesh(device.type, (rank_and_world_size()[1],)) if weights is None else weights["data"]
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True}
    # What does not train has no backward pass to wait for.
    keeps_gathered = layout.shard == "gradients" and any(p.requires_grad for p in model.parameters())
    if keeps_gathered:
        options["reshard_after_forward"] = False
    if offloads:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    # Autocast casts the inputs; gradients are summed and kept in float32.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for member in members(model):
        inner = unwrapped(member)
        expected = whole_trial(member)
        styles = {} if weights is None else tensor_parallel.styles_of(inner)
        cast = gathered_cast(member) if dtype is not None and layout.casts_gathers else set()
        # Set in __dict__: as a submodule it would add its parameters to the model's.
        member.__dict__["skeleton"] = without_weights(member).to(device)
        # Layers first: the model's own shard is then of the parameters that no layer has taken.
        # Each is sharded before the next is sent, so a device never holds two whole layers.
        for layer in decoder_layers(inner):
            _broadcast_weights(layer, device)
            if weights is not None:
                tensor_parallel.cut(inner, layer, styles, weights["tensor"])
            if not over_data:
                continue
            # A group has one dtype: these are one, what is left of the layer another.
            if linear := [module for module in layer.modules() if module in cast]:
                fully_shard(linear, mp_policy=policy, **options)
            fully_shard(layer, **options)
        _broadcast_weights(inner, device)
        if weights is not None:
            tensor_parallel.cut(inner, inner, styles, weights["tensor"])
            member.__dict__["is_cut"] = True
        if not over_data:
            check_trial(member, expected)
            continue
        # Resharded too: otherwise gathered weights would survive the loading of others.
        fully_shard(inner, **options)
        # `compute` becomes a forward method to FSDP, which gathers the weights around each call.
        inner.__dict__["compute"] = lambda function: function()
        register_fsdp_forward_method(inner, "compute")
        inner.__dict__["reduces_last"] = layout.reduces_last
        if keeps_gathered:
            for module in fsdp_modules(inner):
                module.register_forward_hook(_free_without_backward)
        if is_adapted(member):
            # peft's AdaLoRA calls the forward method itself, past the hook that gathers weights.
            member.base_model.__dict__["forward"] = inner.__call__
        if not mean:  # losses are divided by the global count already
            for module in _sharded_parts(inner):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        check_trial(member, expected)


def whole_trial(model: nn.Module) -> Tensor | None:
    """Check that a model can be cut for tensor parallelism; return what it computes before.

    All processes call it; only rank 0, which has the weights, gets something.

    Args:
        model: The model.

    Returns:
        Hidden states of a few tokens; None on the other ranks, and without tensor parallelism.

    Raises:
        UserError: It cannot be cut; raised on all ranks.
    """
    if arrangement().weights is None:
        return None

    def compute() -> None:
        tensor_parallel.check_can_be_cut(model, arrangement().tensor)
        found.append(tensor_parallel.trial(model, lambda function: function()))

    found: list[Tensor] = []
    from_rank_zero(compute)
    return found[0] if found else None


def check_trial(model: nn.Module, expected: Tensor | None) -> None:
    """Check that a model computes the same after it was cut, by all processes together.

    Args:
        model: The model.
        expected: As `whole_trial` gave it.

    Raises:
        UserError: It does not; raised on all ranks.
    """
    if arrangement().weights is None:
        return
    found = None
    with suppress(RuntimeError, TypeError, ValueError, AttributeError):
        found = tensor_parallel.trial(model, lambda function: compute_gathered(model, function))
    # None only on other ranks, which compare nothing.
    from_rank_zero(lambda: None if expected is None else tensor_parallel.check_same(expected, found, model))


def _meet_alone(device: torch.device) -> None:
    """Initialize torch.distributed for a single process, as fully_shard needs."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def _free_without_backward(module: nn.Module, args: tuple, result: Any) -> None:
    """Free gathered weights after a forward pass without gradients: no backward pass will do it."""
    if not torch.is_grad_enabled():
        for part in _sharded_parts(module):
            part.reshard()


def gathered_cast(model: nn.Module) -> set[nn.Module]:
    """Return the linear layers whose weights are gathered in the dtype that autocast casts them to.

    A product takes the same numbers as if they were cast after the gather; half the bytes are sent,
    and no second copy is kept for the backward pass. Whatever autocast leaves in float32 (norms,
    embeddings, a scalar head) is gathered in it, and so is what has rules of its own for dtypes:
    peft's adapters, and the head, whose gradient is summed over chunks of rows in float32. Frozen
    layers are cast before they are sharded (`precision.cast_frozen`).

    Args:
        model: Whole.
    """
    if is_adapted(model):
        return set()
    inner = unwrapped(model)
    castables = {id(p) for p in castable(model) if p.requires_grad}
    linear = (module for layer in decoder_layers(inner) for module in layer.modules() if type(module) is nn.Linear)
    return {module for module in linear if all(id(p) in castables for p in module.parameters())}


@torch.no_grad()
def _broadcast_weights(module: nn.Module, device: torch.device) -> None:
    """Broadcast the weights of a module that are not sharded yet from rank 0."""
    weights = [p for p in module.parameters() if not isinstance(p, DTensor)]
    # Shapes and dtypes differ: other ranks have empty weights.
    kinds = from_rank_zero(lambda: [(p.shape, p.dtype) for p in weights])
    for p, (shape, dtype) in zip(weights, kinds, strict=True):
        x = p.data.to(device).contiguous() if is_rank_zero() else torch.empty(shape, dtype=dtype, device=device)
        dist.broadcast(x, src=0)
        p.data = x


def is_sharded(model: nn.Module) -> bool:
    """Return whether a model is sharded."""
    return any(_by_fsdp(member) or "is_cut" in member.__dict__ for member in members(model))


def _by_fsdp(model: nn.Module) -> bool:
    """Return whether fsdp2 shards a model."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(unwrapped(model), FSDPModule)


def decoder_layers(inner: nn.Module) -> list[nn.Module]:
    """Return the decoder layers of a transformers model.

    Raises:
        UserError: transformers does not name them.
    """
    names = set(inner._no_split_modules or ())
    by_name = {name: module for name, module in inner.named_modules() if type(module).__name__ in names}
    if not by_name:
        raise UserError(
            f"launch.strategy: fsdp2 (and launch.offload: all) shards layer by layer, and transformers names no layers "
            f"of a {inner.config.model_type} model; use ddp"
        )

    def is_inside_another(name: str) -> bool:
        return any(name[:i] in by_name for i, character in enumerate(name) if character == ".")

    # A class that transformers names may contain another one: only the outermost are layers.
    return [module for name, module in by_name.items() if not is_inside_another(name)]


def fsdp_modules(inner: nn.Module) -> list[nn.Module]:
    """Return the modules that are all-gathered one at a time in a pass; [] without sharding.

    They are the decoder layers, and the model itself for its remaining weights. The linear layers
    of `gathered_cast` have their layer's place.
    """
    return [module for module in _sharded_parts(inner) if not isinstance(module, nn.Linear)]


def _sharded_parts(module: nn.Module) -> list[Any]:
    """Return the modules below one, itself included, whose own weights fsdp2 shards."""
    from torch.distributed.fsdp import FSDPModule

    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def reducing_last(models: list[nn.Module], passes: Iterable[Item]) -> Iterator[Item]:
    """Yield the micro-batches of an optimizer step, and sum gradients over processes at the last.

    That is for sharded models, and only where launch.reduce says so. Of other models nothing is
    summed in a backward pass (`parallel.all_reduce_gradients` does it once a step).

    Args:
        models: The models that each micro-batch passes through, forward and backward.
        passes: As many micro-batches on every process, each with its passes.
    """
    deferring = [inner for inner in map(unwrapped, models) if inner.__dict__.get("reduces_last")]
    if not deferring:
        yield from passes
        return
    micro_batches = list(passes)
    for i, micro_batch in enumerate(micro_batches, start=1):
        sum_gradients(deferring, i == len(micro_batches))
        yield micro_batch


def sum_gradients(sharded: Iterable[nn.Module], sums: bool) -> None:
    """Set whether backward passes sum gradients over processes, or add them up whole first.

    Args:
        sharded: The transformers models, sharded.
        sums: Whether they do.
    """
    for inner in sharded:
        inner.set_requires_gradient_sync(sums)


def compute_gathered(model: nn.Module, function: Callable[[], Result]) -> Result:
    """Call a function that reads weights of a model outside its forward pass.

    A sharded model's weights are gathered for the call, and their gradients are sharded again after
    its backward pass.

    Args:
        model: Whose weights are read.
        function: Takes no arguments; its result is returned.
    """
    if not is_sharded(model):
        return function()
    inner = unwrapped(model)
    with autocast_without_cache(next(model.skeleton.parameters()).device.type):
        if not _by_fsdp(model):
            return function()
        result = inner.compute(function)
    if not torch.is_grad_enabled():  # it may be of those that stay gathered until a backward pass
        inner.reshard()
    return result


def autocast_without_cache(device: str) -> torch.autocast:
    """Return autocast as it is set, but without its cache.

    The cache would keep a cast copy of every layer that was gathered.
    """
    casts, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return torch.autocast(device, dtype=dtype, enabled=casts, cache_enabled=False)


def without_weights(model: nn.Module) -> nn.Module:
    """Return a copy of a model without its weights; it shares the configuration."""
    inner = unwrapped(model)
    # deepcopy's memo: it takes these for copies that it has made already.
    known = {id(p): nn.Parameter(p.new_empty(0), requires_grad=p.requires_grad) for p in model.parameters()}
    copied = copy.deepcopy(model, known | {id(inner.config): inner.config})
    for module in (copied, unwrapped(copied)):
        module.__dict__.pop("forward", None)  # trl's, which is bound to the original model
    return copied


@contextmanager
def gathered(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the model with all its weights, for work that other processes do not follow.

    A sharded model is gathered into a copy, by all processes together, with linear layers in the
    dtype of autocast. Nothing in it trains.
    """
    if not is_sharded(model):
        yield model
        return
    inside = model.skeleton
    try:
        _gather_into(inside, model, keep=True)
        yield inside
    finally:
        for p in inside.parameters():  # the skeleton itself serves the next call
            p.data = p.new_empty(0)


def publishable(model: nn.Module, reload: Callable[[], nn.Module] | None = None) -> nn.Module:
    """Return the model whole, on the CPU and in float32, on rank 0.

    All processes call it; a sharded model is gathered into a copy. On the other ranks the result
    has no weights (a model that is not sharded is returned as it is).

    Args:
        model: The model.
        reload: Loads the model that it was made from; None: no frozen weights were cast.
    """
    from stages.models.compiled import forget_compiled  # it imports this module

    compute_whole_rows(model)  # rank 0 tries what it publishes, alone
    forget_compiled(model)  # with other rows, which would be compiled for, on the CPU
    if is_sharded(model):
        # On the CPU: a device that needs shards has no room for the whole model.
        inside = copy.deepcopy(model.skeleton).cpu()
        _gather_into(inside, model, keep=is_rank_zero())
        model = inside
    if is_rank_zero():
        model.cpu()
        if reload is not None:
            uncast(model, reload)
    return model


def free_gathered(model: nn.Module) -> None:
    """Free weights that a forward pass without a backward pass has left gathered.

    They would hide the shards from `parameters`, and outlive the loading of others.

    Args:
        model: The model; one that is not sharded is left as it is.
    """
    for member in members(model):
        for module in _sharded_parts(unwrapped(member)):
            module.reshard()


@torch.no_grad()
def _gather_into(inside: nn.Module, model: nn.Module, keep: bool) -> None:
    """Gather the weights of a sharded model into a copy without weights.

    Args:
        inside: The copy; changed.
        model: The sharded model.
        keep: Whether this process keeps them; all take part.
    """
    free_gathered(model)
    device = next(inside.parameters()).device
    # What autocast would cast at every pass is kept in its dtype, at half the memory.
    casts = torch.is_autocast_enabled(device.type)
    linear = set(map(id, castable(inside))) if casts else set()
    for empty, p in zip(inside.parameters(), model.parameters(), strict=True):
        if id(empty) in linear:  # before it is sent
            p = p.to(torch.get_autocast_dtype(device.type))
        full = p.full_tensor()  # a collective: ranks that keep nothing must join in
        if keep:
            empty.data = full.to(device)


@torch.no_grad()
def gather_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gather tensors of sharded weights on the CPU, one at a time, by all processes together.

    Other tensors stay as they are. Ranks that do not save get empty tensors.
    """
    whole = {}
    for name, x in tensors.items():
        if isinstance(x, DTensor):
            x = x.full_tensor()
            # Moved at once, so the device holds one whole tensor at a time.
            x = x.cpu() if is_rank_zero() else x.new_empty(0)
        whole[name] = x
    return whole


def shard_like(parameter: Tensor, x: Tensor | StoredTensor) -> Tensor:
    """Return a whole tensor sharded as `parameter` is; if that is not sharded, on its device.

    Args:
        parameter: A parameter of the same shape.
        x: The tensor, or one of a checkpoint, of which only this rank's shard is read.
    """
    if isinstance(x, StoredTensor):
        x = read_like(parameter, x)
    if not isinstance(parameter, DTensor) or isinstance(x, DTensor):
        return x.to(parameter.device)
    mesh, placements = parameter.device_mesh, parameter.placements
    # No source rank: each cuts its shard from its own copy, and nothing is sent.
    sharded = distribute_tensor(x.to(parameter.device), mesh, placements, src_data_rank=None)
    return sharded.to(parameter.device)  # an offloaded one lies elsewhere than its mesh


def replicate_beside(x: Tensor, model: nn.Module) -> Tensor:
    """Return a small tensor such that an optimizer takes it together with a model's weights.

    Beside a sharded model it is a DTensor too, of which each process holds the whole. Its gradients
    are summed by `parallel.all_reduce_gradients`.

    Args:
        x: The same tensor in every process.
        model: The model.
    """
    parameter = next(model.parameters())
    if not isinstance(parameter, DTensor):
        return x
    mesh = parameter.device_mesh
    return distribute_tensor(x, mesh, [Replicate()] * mesh.ndim, src_data_rank=None)


def whole(x: Tensor) -> Tensor:
    """Return a tensor whole; a sharded one is gathered by all processes together."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def to_float(x: Tensor) -> float:
    """Return a scalar tensor as a float; it may be distributed over processes."""
    return float(whole(x))


def local_shard(x: Tensor) -> Tensor:
    """Return the share of a tensor that this process holds."""
    return x.to_local() if isinstance(x, DTensor) else x
