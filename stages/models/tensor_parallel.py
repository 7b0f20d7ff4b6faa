"""Cut a model among processes by transformers' own plan, for tensor parallelism.

A family's plan (`model.tp_plan`) says which weights are cut by columns and which by rows; its
styles are transformers', on torch's DTensor. Attention heads and the inner width of MLPs are then
local, and each layer has two sums over the processes in each direction. Weights that the plan does
not name stay whole on each process, as replicated DTensors: so all weights of a model have the same
device mesh, and optimizers, norms and checkpoints treat them alike.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

from pipeline.errors import UserError
from stages.models.adapters import is_adapted, unwrapped
from stages.models.precision import CAST

PARTIAL = "replicated_with_grad_allreduce"
TRIED = [[5, 3, 1, 2, 4, 6, 2]]  # tokens of the trial


def check_can_be_cut(model: nn.Module, parts: int) -> None:
    """Check that a whole model can be cut among processes.

    Args:
        model: The model, with its adapter or without.
        parts: How many processes.

    Raises:
        UserError: It has an adapter, transformers has no plan for it, or its heads do not divide.
    """
    inner = unwrapped(model)
    name = type(inner).__name__
    if is_adapted(model):
        raise UserError(
            "launch.tensor_parallel: transformers' plans name the weights of a model without an adapter; set it to 1 "
            "and launch.strategy: fsdp2 to train adapters of a model that does not fit into one device"
        )
    if not _layer_rules(inner):
        raise UserError(
            f"launch.tensor_parallel: transformers has no plan for the layers of a {name}; set it to 1, and "
            f"launch.strategy: fsdp2 where the model does not fit into one device"
        )
    config = inner.config.get_text_config()
    heads = {key: getattr(config, key, None) for key in ("num_attention_heads", "num_key_value_heads")}
    for key, count in heads.items():
        if isinstance(count, int) and count % parts:
            raise UserError(
                f"launch.tensor_parallel: {parts} processes cannot share the {count} heads ({key}) of this {name} "
                f"evenly; take a divisor of {count}"
            )


def _layer_rules(inner: nn.Module) -> dict[str, str]:
    """Return the rules of a model's plan that are about its layers, by names with `*`."""
    plan = getattr(inner, "tp_plan", None) or {}
    return {name: style for name, style in plan.items() if "*" in name}


def styles_of(inner: nn.Module) -> dict[str, str]:
    """Return the plan of a transformers model: module or parameter → name of its style."""
    return inner._expand_parallel_plan(inner.tp_plan)


def cut(inner: nn.Module, part: nn.Module, styles: dict[str, str], mesh: Any) -> None:
    """Keep this process's share of those weights of a part of a model that are still whole.

    Args:
        inner: The transformers model; changed.
        part: A layer of it, or the model itself for all that is left.
        styles: As `styles_of` gives them.
        mesh: The processes that hold the model together, a device mesh of one dimension.
    """
    from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

    names = {id(module): name for name, module in inner.named_modules()}
    shared: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for module in part.modules():
        whole = {key: p for key, p in module._parameters.items() if p is not None and not isinstance(p, DTensor)}
        if not whole and names[id(module)] not in styles:
            continue
        own = names[id(module)]
        style = styles.get(own)
        is_cut = False
        for key, p in whole.items():
            rule = styles.get(f"{own}.{key}" if own else key)
            if rule is not None and rule != PARTIAL:
                ALL_PARALLEL_STYLES[rule].shard_param(module, key, mesh)
            if isinstance(module._parameters[key], DTensor):
                is_cut = True
                module._parameters[key] = _with_own_memory(module._parameters[key])
            else:
                replicated = distribute_tensor(p.data, mesh, [Replicate()], src_data_rank=None)
                module._parameters[key] = nn.Parameter(replicated, requires_grad=p.requires_grad)
            module._parameters[key] = _tied(shared, p, module._parameters[key], inner)
        if style is not None and style != PARTIAL and "forward" not in module.__dict__:
            ALL_PARALLEL_STYLES[style].install_forward(module, mesh)
        elif whole and not is_cut:
            _compute_with_local_weights(module, [Partial()] if style == PARTIAL else None)


def _tied(shared: dict[int, nn.Parameter], whole: Tensor, mine: nn.Parameter, inner: nn.Module) -> nn.Parameter:
    """Return this process's share of a weight: the same one wherever the whole weight is used.

    Args:
        shared: Shares by the identity of the whole weight; added to.
        whole: The whole weight.
        mine: The share.
        inner: The model, for the error line.

    Raises:
        UserError: The plan cuts a tied weight in two ways.
    """
    first = shared.setdefault(id(whole), mine)
    if first.placements != mine.placements:
        raise UserError(
            f"launch.tensor_parallel: transformers' plan cuts a weight that a {type(inner).__name__} uses twice "
            f"(tie_word_embeddings) in two ways; set it to 1"
        )
    return first


def _with_own_memory(p: nn.Parameter) -> nn.Parameter:
    """Return a parameter whose share has memory of its own, so that the whole weight is freed."""
    local = p.data.to_local()
    if local.untyped_storage().nbytes() == local.nbytes:
        return p
    x = DTensor.from_local(
        local.clone(), p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )
    return nn.Parameter(x, requires_grad=p.requires_grad)


def _compute_with_local_weights(module: nn.Module, gradients: list[Partial] | None) -> None:
    """Let a module with replicated weights compute with plain tensors.

    Args:
        module: The module; its forward is replaced.
        gradients: What a gradient is on a process: [Partial()] where it has seen a share of the
            heads only, and the sum is taken; None: it is the same on all.
    """
    forward = module.forward

    def with_local_weights(*args: Any, **kwargs: Any) -> Any:
        held = {key: p for key, p in module._parameters.items() if isinstance(p, DTensor)}
        for key, p in held.items():
            module._parameters[key] = p.to_local(grad_placements=gradients)
        try:
            return forward(*args, **kwargs)
        finally:
            module._parameters.update(held)

    module.forward = with_local_weights


def whole_weight(weight: Tensor) -> Tensor:
    """Return a weight whole, with its gradient; cut weights are gathered by all that share them."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def trial(model: nn.Module, run: Callable[[Callable[[], Tensor]], Tensor]) -> Tensor:
    """Return the hidden states of a few tokens, in float32 on the CPU.

    In training mode, with gradients recorded, where weights train: some code differs only then.

    Args:
        model: The model, whole or cut.
        run: Calls a function that reads weights of the model.
    """
    inner = unwrapped(model)
    device, training = next(inner.parameters()).device, inner.training
    inner.train(any(p.requires_grad for p in inner.parameters()))  # as it will compute; dropout is off
    cast = {p.dtype for p in inner.parameters()} & set(CAST.values())  # frozen linear layers, to one dtype
    context: AbstractContextManager = torch.autocast(device.type, dtype=cast.pop()) if cast else nullcontext()
    ids = torch.tensor(TRIED, device=device)
    with context:
        states = run(lambda: inner.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    inner.train(training)
    return states.detach().float().cpu()


def check_same(expected: Tensor, found: Tensor | None, model: nn.Module) -> None:
    """Check that a model computes the same after it was cut.

    Args:
        expected: `trial` of the whole model.
        found: `trial` of the cut one; None: it failed.
        model: The model, for the error line.

    Raises:
        UserError: It does not.
    """
    rounding = 1e-2 if all(p.dtype == torch.float32 for p in model.parameters()) else 5e-2
    if found is None or not (expected - found).norm() <= rounding * expected.norm():
        raise UserError(
            f"launch.tensor_parallel: cut by transformers' plan, this {type(unwrapped(model)).__name__} computes "
            f"something else or fails; set it to 1, and launch.strategy: fsdp2 for a model too large for one device"
        )
