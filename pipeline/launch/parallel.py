"""Run data-parallel: every rank holds the same state and computes a share of the rows.

All ranks read the same data and take the same decisions. They differ only in the rows that they put
through the models (`rows_of_this_rank`, `compute_and_all_gather`). Gradients and figures are sums
over rows, so that their sum over the ranks equals what one process computes, up to the order of
summation (`all_reduce_gradients`, `all_reduce_figures`). With one process, these functions change
nothing, bit for bit.

With launch.tensor_parallel or launch.context_parallel, `arrange` puts the ranks into groups. The
ranks of a group read the same rows and are one rank in all of this: they hold shares of one model
(tensor), or compute shares of each row (context).

The functions that communicate are collective: every rank must call them, in the same order, or all
of them wait for each other until `launch.timeout`.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from pipeline.errors import UserError
from pipeline.launch import devices

Item = TypeVar("Item")
Result = TypeVar("Result")

BUCKET = 16 * 2**20  # elements that are summed in one all-reduce


@dataclass(frozen=True)
class Arrangement:
    """Hold how the ranks of a run are divided into groups that read the same rows.

    A group has tensor × context successive ranks; those of one share of a row come first.
    """

    tensor: int = 1
    """Ranks that hold a model together (launch.tensor_parallel)."""
    context: int = 1
    """Ranks that compute a row together (launch.context_parallel)."""
    fsdp: bool = True
    """Whether models that are sharded are sharded among the groups too (launch.strategy fsdp2)."""
    weights: Any = None
    """torch's device mesh ("data", "tensor"), for weights; None if `tensor` is 1."""
    rows: Any = None
    """torch's device mesh ("rows", "context", "tensor"); None if every rank is a group."""

    @property
    def together(self) -> int:
        """Return the ranks of a group."""
        return self.tensor * self.context


_arranged = [Arrangement()]  # of this process, as torch's default process group is


def arrange(tensor: int = 1, context: int = 1, fsdp: bool = True, device: str = "cpu") -> None:
    """Put the ranks into groups, once, after they have met.

    Args:
        tensor: ranks that hold a model together.
        context: ranks that compute a row together.
        fsdp: whether models that are sharded are sharded among the groups too.
        device: "cpu" or "cuda", where the models are.

    Raises:
        UserError: the ranks do not divide into such groups.
    """
    size = rank_and_world_size()[1]
    if tensor * context == 1:
        _arranged[0] = Arrangement()
        return
    if size % (tensor * context):
        key = "launch.tensor_parallel" if tensor > 1 else "launch.context_parallel"
        groups = f"groups of {tensor * context} (tensor_parallel {tensor} × context_parallel {context})"
        raise UserError(f"{key}: {size} process(es) do not divide into {groups}; set launch.processes to a multiple")
    shape = (size // (tensor * context), context, tensor)
    rows = dist.init_device_mesh(device, shape, mesh_dim_names=("rows", "context", "tensor"))
    weights = None
    if tensor > 1:
        weights = dist.init_device_mesh(device, (size // tensor, tensor), mesh_dim_names=("data", "tensor"))
    # It warns that sums over two axes are two sums.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    _arranged[0] = Arrangement(tensor, context, fsdp, weights, rows)


def arrange_as(launch: Any) -> None:
    """Put the ranks into the groups that the section `launch` of a config asks for.

    Raises:
        UserError: the ranks do not divide into such groups.
    """
    sizes = (launch.tensor_parallel or 1, launch.context_parallel or 1)
    # Not merely where there is a GPU: launch.device may ask for the CPU.
    arrange(*sizes, fsdp=launch.strategy == "fsdp2", device=devices.kind_of(launch.device))


def for_sum(loss: Tensor) -> Tensor:
    """Return what of a loss this rank's backward pass takes, so that the sum over ranks is right.

    All ranks that compute a row together have the loss of the whole row.
    """
    return loss if arrangement().context == 1 else loss / arrangement().context


def arrangement() -> Arrangement:
    """Return how the ranks are arranged."""
    return _arranged[0]


def rank_and_world_size() -> tuple[int, int]:
    """Return this process's rank and the number of processes; (0, 1) if there is only one."""
    initialized = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if initialized else (0, 1)


def data_rank_and_size() -> tuple[int, int]:
    """Return the index of this rank's group and the number of groups, among which rows are shared.

    Without tensor or context parallelism every rank is a group.
    """
    rank, size = rank_and_world_size()
    return rank // arrangement().together, size // arrangement().together


def is_first_of_group() -> bool:
    """Return whether this rank is the first of those that read the same rows."""
    return rank_and_world_size()[0] % arrangement().together == 0


def is_rank_zero() -> bool:
    """Return whether this is rank 0, the process that saves and publishes."""
    return rank_and_world_size()[0] == 0


def split_by_cost(costs: Sequence[float], parts: int) -> list[list[int]]:
    """Divide items into parts of about equal cost.

    Greedy: the most expensive item first, each to the part with the lowest sum so far. The result
    depends on nothing but the arguments, so that every rank computes the same division without
    communication.

    Args:
        costs: the cost of each item, in any unit.
        parts: the number of parts.

    Returns:
        The indices of each part's items, in ascending order.
    """
    shares: list[list[int]] = [[] for _ in range(parts)]
    sums = [0.0] * parts
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        smallest = min(range(parts), key=lambda part: (sums[part], len(shares[part])))
        shares[smallest].append(i)
        sums[smallest] += costs[i]
    return [sorted(share) for share in shares]


def rows_of_this_rank(items: Sequence[Item], costs: Sequence[float]) -> list[Item]:
    """Return this rank's share of the items.

    Args:
        items: all items, the same on every rank.
        costs: the cost of each.
    """
    rank, size = data_rank_and_size()
    return list(items) if size == 1 else [items[i] for i in split_by_cost(costs, size)[rank]]


def compute_and_all_gather(
    items: Sequence[Item],
    costs: Sequence[float],
    compute: Callable[[list[Item]], Sequence[Result]],
    idle: bool = False,
    alone: bool = False,
) -> list[Result]:
    """Compute a result per item, each rank for its own share, and all-gather the results.

    Args:
        items: all items, the same on every rank.
        costs: the cost of each.
        compute: returns a result per item of a share, in their order.
        idle: whether `compute` is also called on a rank with an empty share. With sharded weights
            it must be: a forward pass needs all ranks.
        alone: whether each rank computes without the others of its group, and so gets a share of
            its own.

    Returns:
        The results of all items in their order, on every rank.
    """
    rank, size = rank_and_world_size() if alone else data_rank_and_size()
    if size == 1 and arrangement().together == 1:
        return list(compute(list(items)))
    shares = split_by_cost(costs, size)
    local = list(compute([items[i] for i in shares[rank]])) if shares[rank] or idle else []
    ordered: list[Any] = [None] * len(items)
    # all-gather returns the lists in the order of the ranks, which is the order of the shares
    gathered = all_gather(local) if alone else one_of_each_group(all_gather(local))
    for share, results in zip(shares, gathered, strict=True):
        for i, result in zip(share, results, strict=True):
            ordered[i] = result
    return ordered


def padded_micro_batches(batches: Sequence[Item], filler: Item | None) -> Iterator[tuple[Item, bool]]:
    """Yield this rank's micro-batches, then fillers until every rank has had equally many.

    A forward or backward pass through sharded weights needs all ranks, so that a rank with fewer
    micro-batches has to run extra passes whose results are thrown away.

    Args:
        batches: this rank's micro-batches.
        filler: the micro-batch for the extra passes; None if weights are not sharded, and none are
            needed.

    Yields:
        (micro-batch, whether it counts).
    """
    passes = len(batches) if filler is None else max(all_gather(len(batches)))
    yield from ((batch, True) for batch in batches)
    if filler is not None:
        yield from ((filler, False) for _ in range(passes - len(batches)))


def all_gather(value: Result) -> list[Result]:
    """Return the value of every rank, in the order of the ranks. Tensors must be on the CPU."""
    size = rank_and_world_size()[1]
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    dist.all_gather_object(values, value)
    return values


def one_of_each_group(values: list[Result]) -> list[Result]:
    """Return the values of the first rank of each group, of a list of all ranks' values.

    Ranks that read the same rows have equal values up to the last bits; taking those of one makes
    all ranks decide alike.
    """
    return values[:: arrangement().together]


def from_rank_zero(compute: Callable[[], Result]) -> Result:
    """Compute a value on rank 0 only and broadcast it.

    Args:
        compute: called on rank 0.

    Returns:
        Its result, on every rank.

    Raises:
        UserError: `compute` raised it. It is raised on every rank, or the others would wait for
            ever.
    """
    if rank_and_world_size()[1] == 1:
        return compute()
    message: list[Any] = [None]
    if is_rank_zero():
        try:
            message = [compute()]
        except UserError as error:
            message = [error]
    dist.broadcast_object_list(message, src=0)
    if isinstance(message[0], UserError):
        raise message[0]
    return message[0]


def all_reduce_figures(figures: dict[str, float]) -> dict[str, float]:
    """Return the sum over the ranks of each figure, by name. A rank may lack some of the names.

    The sum is taken in the order of the ranks, so that every rank gets the same bits.
    """
    if rank_and_world_size()[1] == 1:
        return figures
    sums: dict[str, float] = {}
    for figures_of_rank in one_of_each_group(all_gather(figures)):
        for name, value in figures_of_rank.items():
            sums[name] = sums.get(name, 0.0) + value
    return sums


@torch.no_grad()
def all_reduce_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its sum over the ranks.

    A parameter that has no gradient on any rank keeps None, so that optimizers skip it as they do
    with one process. Gradients of parameters that fsdp2 shards are left alone: it has summed them
    already. Those that every process holds whole beside them are DTensors too, but unknown to it.
    Those of tensor parallelism are summed over the ranks that hold the same share.

    Args:
        parameters: the same parameters on every rank, in the same order.
    """
    parameters = [p for p in parameters if not is_summed_by_fsdp(p)]
    group = None if arrangement().weights is None else arrangement().weights.get_group("data")
    if rank_and_world_size()[1] == arrangement().tensor or not parameters:
        return
    counts = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32)
    dist.all_reduce(counts, group=group)
    gradients = []
    for p, count in zip(parameters, counts.tolist(), strict=True):
        if count:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            gradients.append(p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad)
    _all_reduce_buckets(gradients, group)


def is_summed_by_fsdp(parameter: Tensor) -> bool:
    """Return whether fsdp2 sums the gradient of a parameter, which it shards over the ranks."""
    if not isinstance(parameter, DTensor) or all(x.is_replicate() for x in parameter.placements):
        return False
    return arrangement().weights is None or parameter.device_mesh.mesh_dim_names != ("tensor",)


@torch.no_grad()
def all_reduce_tensors(tensors: Sequence[Tensor]) -> None:
    """Replace tensors, in place, by their sums over the ranks; a group counts once.

    Args:
        tensors: of the same shapes and dtypes on every rank, in the same order.
    """
    if data_rank_and_size()[1] == 1:
        return
    _all_reduce_buckets(tensors, None if arrangement().rows is None else arrangement().rows.get_group("rows"))


def _all_reduce_buckets(tensors: Sequence[Tensor], group: Any) -> None:
    """Replace tensors, in place, by their sums over the ranks of a process group; None: all."""
    # one call per bucket instead of one per tensor: each call costs a round trip between all ranks
    for bucket in buckets(tensors):
        flat = torch.cat([x.flatten() for x in bucket])
        dist.all_reduce(flat, group=group)
        for x, part in zip(bucket, flat.split([x.numel() for x in bucket]), strict=True):
            x.copy_(part.view_as(x))


def buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Group consecutive tensors of the same dtype, up to BUCKET elements per group."""
    groups: list[list[Tensor]] = []
    room = 0
    for x in tensors:
        if not groups or groups[-1][0].dtype != x.dtype or x.numel() > room:
            groups.append([])
            room = BUCKET
        groups[-1].append(x)
        room -= x.numel()
    return groups
