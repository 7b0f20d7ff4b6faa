"""Data parallelism: every process holds the same state and computes some of the rows.

All ranks read the same data and take the same decisions; they differ only in the rows that go through the models
(`rows_of_this_rank`, `compute_and_all_gather`). Gradients and figures are sums over rows, so the sum over ranks equals
what one process computes, up to the order of summation (`all_reduce_gradients`, `all_reduce_figures`). With one process,
nothing here changes a bit.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from pipeline.errors import UserError

Item, Found = TypeVar("Item"), TypeVar("Found")

BUCKET = 16 * 2**20  # elements that are summed at a time


def rank_and_world_size() -> tuple[int, int]:
    """(which process this is, how many there are)."""
    together = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)


def is_rank_zero() -> bool:
    """Whether this process is the one that saves and publishes."""
    return rank_and_world_size()[0] == 0


def split_by_cost(costs: Sequence[float], hands: int) -> list[list[int]]:
    """Places 0 … len(costs) − 1 in `hands` parts of about equal cost: the dearest first, each to the part that has
    least. Within a part in their order."""
    parts: list[list[int]] = [[] for _ in range(hands)]
    sums = [0.0] * hands
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        least = min(range(hands), key=lambda h: (sums[h], len(parts[h])))
        parts[least].append(i)
        sums[least] += costs[i]
    return [sorted(part) for part in parts]


def rows_of_this_rank(items: Sequence[Item], costs: Sequence[float]) -> list[Item]:
    """The items that are this process's to compute."""
    rank, size = rank_and_world_size()
    return list(items) if size == 1 else [items[i] for i in split_by_cost(costs, size)[rank]]


def compute_and_all_gather(
    items: Sequence[Item], costs: Sequence[float], compute: Callable[[list[Item]], Sequence[Found]], idle: bool = False
) -> list[Found]:
    """compute(this process's share) → a result an item; → the results of all items, in their order, everywhere. idle:
    compute is also called for a share of nothing."""
    rank, size = rank_and_world_size()
    if size == 1:
        return list(compute(list(items)))
    parts = split_by_cost(costs, size)
    own = list(compute([items[i] for i in parts[rank]])) if parts[rank] or idle else []
    found: list = [None] * len(items)
    for part, results in zip(parts, all_gather(own), strict=True):
        for i, result in zip(part, results, strict=True):
            found[i] = result
    return found


def padded_micro_batches(parts: Sequence[Item], spare: Item | None) -> Iterator[tuple[Item, bool]]:
    """(part, True) of each of this process's parts; and, if `spare` is given, (spare, False) behind them until all
    processes have had as many: a forward through sharded weights takes all of them."""
    most = len(parts) if spare is None else max(all_gather(len(parts)))
    yield from ((part, True) for part in parts)
    yield from ((spare, False) for _ in range(most - len(parts)))


def all_gather(own: Found) -> list[Found]:
    """What each process has here, in their order (tensors: on the CPU)."""
    size = rank_and_world_size()[1]
    if size == 1:
        return [own]
    found: list = [None] * size
    dist.all_gather_object(found, own)
    return found


def from_rank_zero(decide: Callable[[], Found]) -> Found:
    """What the first process finds, on all of them; a UserError, too."""
    if rank_and_world_size()[1] == 1:
        return decide()
    found: list = [None]
    if is_rank_zero():
        try:
            found = [decide()]
        except UserError as error:
            found = [error]
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], UserError):
        raise found[0]
    return found[0]


def all_reduce_figures(figures: dict[str, float]) -> dict[str, float]:
    """Sums, by name, over the processes; the same bits on all of them."""
    if rank_and_world_size()[1] == 1:
        return figures
    sums: dict[str, float] = {}
    for own in all_gather(figures):
        for name, value in own.items():
            sums[name] = sums.get(name, 0.0) + value
    return sums


@torch.no_grad()
def all_reduce_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Each parameter's gradient becomes the sum over the processes; None where none of them has one. Those of sharded
    weights are sums already."""
    parameters = [p for p in parameters if not isinstance(p, DTensor)]
    if rank_and_world_size()[1] == 1 or not parameters:
        return
    has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32)
    dist.all_reduce(has)
    wanted = [p for p, count in zip(parameters, has.tolist(), strict=True) if count]
    for p in wanted:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    all_reduce_tensors([p.grad for p in wanted])


@torch.no_grad()
def all_reduce_tensors(tensors: Sequence[Tensor]) -> None:
    """In place, over the processes. Shapes and kinds are the same on all of them."""
    if rank_and_world_size()[1] == 1:
        return
    for bucket in buckets(tensors):
        flat = torch.cat([x.flatten() for x in bucket])
        dist.all_reduce(flat)
        for x, part in zip(bucket, flat.split([x.numel() for x in bucket]), strict=True):
            x.copy_(part.view_as(x))


def buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Neighbours of one kind, up to BUCKET elements together."""
    found: list[list[Tensor]] = []
    room = 0
    for x in tensors:
        if not found or found[-1][0].dtype != x.dtype or x.numel() > room:
            found.append([])
            room = BUCKET
        found[-1].append(x)
        room -= x.numel()
    return found
