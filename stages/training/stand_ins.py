"""Let an optimizer step stand-ins of a model's weights: on the CPU, or only this process's rows.

AdamW keeps moments of what it steps, beside it. With `launch.offload: optimizer` it steps copies in
the CPU's memory: before a step gradients and weights are copied there, after it the weights are
copied back. With `launch.shard: optimizer` (ZeRO-1) it steps this process's rows of each weight,
which share the weight's memory, and after it the processes all-gather the weights. Rows are
DTensors, sharded as fully_shard does it, so checkpoints are gathered and loaded in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor, Shard

from stages.models.adalora import AdaLora, Triplets
from stages.models.sharding import local_shard

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from stages.models.layout import Layout


@dataclass(frozen=True)
class StandIns:
    """The parameters of a model, and what the optimizer steps in place of each."""

    pairs: list[tuple[nn.Parameter, nn.Parameter]]
    """(a parameter, its stand-in)."""
    mesh: DeviceMesh | None
    """The processes that share out the rows of each weight; None: whole weights are stepped."""
    on_cpu: bool
    """Whether stand-ins are copies in the CPU's memory; else they share the weights' memory."""

    def rows(self, x: Tensor) -> Tensor:
        """Return the part of a tensor that this process steps; it shares the tensor's memory."""
        return x if self.mesh is None or x.dim() == 0 else own_rows(x, self.mesh)

    @torch.no_grad()
    def before_step(self) -> None:
        """Give the stand-ins the gradients and, if they are copies, the weights."""
        for p, held in self.pairs:
            if p.grad is None:
                continue
            gradient = self.rows(p.grad)
            # Each time: between steps, a checkpoint or the best weights may have been loaded.
            copy_unless_shared(self.rows(p), held)
            held.grad = copied_to_host(gradient) if self.on_cpu else gradient

    @torch.no_grad()
    def after_step(self) -> None:
        """Give the weights what was stepped, and drop the stand-ins' gradients."""
        for p, held in self.pairs:
            if held.grad is None:
                continue
            held.grad = None
            part = self.rows(p)
            copy_unless_shared(held, part)
            if isinstance(part, DTensor) and not isinstance(p, DTensor):
                p.copy_(part.full_tensor())


def own_rows(x: Tensor, mesh: DeviceMesh) -> DTensor:
    """Return this process's rows of a tensor that every process has whole, sharing its memory.

    Args:
        x: At least one dimension; the same shape in every process.
        mesh: The processes.
    """
    each = -(-x.shape[0] // mesh.size())
    first = min(mesh.get_local_rank() * each, x.shape[0])
    rows = x.detach()[first : first + each]
    return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=x.shape, stride=x.stride())


def copy_unless_shared(source: Tensor, target: Tensor) -> None:
    """Copy this process's part of a tensor to another one, unless both are the same memory.

    A trainer may have given a weight other memory since the optimizer was made.
    """
    mine, theirs = local_shard(source), local_shard(target)
    if mine.data_ptr() != theirs.data_ptr():
        theirs.copy_(mine)


def copied_to_host(x: Tensor) -> Tensor:
    """Return a copy of a tensor in the CPU's memory, pinned if it comes from a GPU."""
    held = torch.empty_like(x, device="cpu", pin_memory=x.device.type == "cuda")
    local_shard(held).copy_(local_shard(x))
    return held


@torch.no_grad()
def stand_in(optimizer: torch.optim.Optimizer, layout: Layout) -> StandIns | None:
    """Put stand-ins in place of an optimizer's parameters, if the layout asks for them.

    Args:
        optimizer: The optimizer, before its first step; changed.
        layout: What is sharded, and what lies in the CPU's memory.

    Returns:
        The stand-ins; None if the optimizer steps the weights themselves.
    """
    if not layout.has_stand_ins:
        return None
    assert not optimizer.state, "an optimizer that has taken a step keeps its parameters"
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    mesh = None
    if layout.splits_step:
        mesh = dist.init_device_mesh(parameters[0].device.type, (dist.get_world_size(),))
    stand_ins = StandIns([], mesh, layout.offload == "optimizer")
    by_parameter: dict[nn.Parameter, nn.Parameter] = {}
    for p in parameters:
        part = stand_ins.rows(p.detach())
        held = nn.Parameter(copied_to_host(part) if stand_ins.on_cpu else part)
        by_parameter[p] = held
        stand_ins.pairs.append((p, held))
    for group in optimizer.param_groups:
        group["params"] = [by_parameter[p] for p in group["params"]]
    if isinstance(optimizer, AdaLora):  # it reads and masks weights of triplets by itself
        optimizer.triplets = [Triplets(*(by_parameter[p] for p in t)) for t in optimizer.triplets]
    return stand_ins
