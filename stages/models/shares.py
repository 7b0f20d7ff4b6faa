"""Copy what this process stores of a tensor, and read what it holds of a stored one.

A tensor that processes share is a DTensor: a device mesh, and for each of its dimensions whether
the tensor is cut or repeated along it. Nothing here sends anything to other processes.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from pipeline.launch import parallel
from pipeline.store.shares import Runs, Share, StoredTensor, split_runs, whole_runs


def own_share(x: Tensor) -> Share | None:
    """Copy to the CPU what this process stores of a tensor; None: others store all of it.

    Of processes that hold the same elements, the first does.

    Args:
        x: The tensor, in shares or whole on every process.
    """
    if not _is_first_holder(x):
        return None
    is_cut = isinstance(x, DTensor) and x.numel() > 0
    local = x.to_local() if isinstance(x, DTensor) else x
    runs = own_runs(x) if is_cut else whole_runs(x.shape)
    blocks = []
    for offset, place in split_runs(runs):
        block = local.detach()[place]
        if block.numel() or not is_cut:
            # A copy: training changes the tensor while it is written.
            copied = torch.empty(block.shape, dtype=block.dtype, device="cpu")
            blocks.append((offset, copied.copy_(block)))
    return Share(tuple(x.shape), blocks)


def own_bytes(x: Tensor) -> int:
    """Return how many bytes this process stores of a tensor."""
    if not _is_first_holder(x):
        return 0
    return (x.to_local() if isinstance(x, DTensor) else x).nbytes


def _is_first_holder(x: Tensor) -> bool:
    """Return whether no process of a lower rank holds the same elements of a tensor."""
    if not isinstance(x, DTensor) or x.numel() == 0:
        return parallel.is_rank_zero()
    mesh = x.device_mesh
    # Several groups of processes may hold a model each: rank 0's group stores it.
    if not bool((mesh.mesh == 0).any()):
        return False
    return all(mesh.get_local_rank(i) == 0 for i, placed in enumerate(x.placements) if placed.is_replicate())


def own_runs(x: DTensor) -> Runs:
    """Return which indices of each dimension of a tensor this process holds.

    torch is asked, by distributing the indices as the tensor is, so that this holds for uneven cuts
    and for a dimension that is cut twice.
    """
    runs: list[list[tuple[int, int]]] = []
    for dim, size in enumerate(x.shape):
        placements = [_along_first(placed) if _cuts(placed, dim) else Replicate() for placed in x.placements]
        if all(placed.is_replicate() for placed in placements):
            runs.append([(0, size)])
            continue
        indices = distribute_tensor(torch.arange(size), x.device_mesh, placements, src_data_rank=None)
        runs.append(_ranges(indices.to_local().tolist()))
    return runs


def _cuts(placed: Placement, dim: int) -> bool:
    """Return whether a tensor is cut along one of its dimensions."""
    # Not `is_shard`, which is False of the private class for a dimension that is cut twice.
    return not placed.is_replicate() and placed.dim == dim


def _along_first(placed: Placement) -> Placement:
    """Return a way to cut a dimension, for a tensor that has only this one."""
    split = getattr(placed, "split_factor", None)
    return Shard(0) if split is None else type(placed)(0, split_factor=split)


def _ranges(indices: list[int]) -> list[tuple[int, int]]:
    """Return ascending indices as ranges (start, stop)."""
    ranges: list[tuple[int, int]] = []
    for i in indices:
        if ranges and ranges[-1][1] == i:
            ranges[-1] = (ranges[-1][0], i + 1)
        else:
            ranges.append((i, i + 1))
    return ranges


def read_like(like: Tensor, stored: StoredTensor) -> Tensor:
    """Read a stored tensor in shares as another one is; whole, to the CPU, if that is whole.

    Args:
        like: The other tensor, of the same shape.
        stored: The stored one. Of a tensor in shares only this process's is read.
    """
    if not isinstance(like, DTensor) or stored.shape != tuple(like.shape):
        return stored.read()
    local = stored.read(own_runs(like))
    mesh = like.device_mesh
    x = DTensor.from_local(
        local.to(mesh.device_type), mesh, like.placements, run_check=False, shape=like.shape, stride=_stride(like)
    )
    return x.to(like.device)  # an offloaded one lies elsewhere than its mesh


def _stride(x: Tensor) -> tuple[int, ...]:
    """Return the stride of a contiguous tensor of the same shape."""
    return torch.empty(x.shape, device="meta").stride()
