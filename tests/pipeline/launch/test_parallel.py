"""Test data parallelism: the division of rows, and collective operations."""

import os
import random
import subprocess
import sys

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing as mp

from pipeline.config.sections import LaunchSettings
from pipeline.errors import PeerLost
from pipeline.launch import parallel
from pipeline.launch.processes import detect_lost_peers
from stages.settings.training import batch_of_each


@pytest.mark.parametrize("hands", [1, 2, 3, 8])
def test_every_item_is_in_one_part_and_parts_are_balanced(hands):
    """For 64 rows of 25 to 100 % of the length, no part costs over 5 % more than the mean."""
    for seed in range(20):
        costs = [random.Random(seed).randint(32, 128) for _ in range(64)]
        parts = parallel.split_by_cost(costs, hands)
        assert sorted(i for part in parts for i in part) == list(range(64))
        assert all(part == sorted(part) for part in parts)
        sums = [sum(costs[i] for i in part) for part in parts]
        assert max(sums) <= 1.05 * sum(sums) / hands


def test_fewer_items_than_parts():
    assert sorted(map(len, parallel.split_by_cost([5, 5], 4))) == [0, 0, 1, 1]
    assert parallel.split_by_cost([], 2) == [[], []]


def test_one_process_changes_nothing():
    items = [object() for _ in range(5)]
    assert parallel.rows_of_this_rank(items, [3, 1, 4, 1, 5]) == items
    assert parallel.compute_and_all_gather(items, [1] * 5, lambda own: own) == items
    assert parallel.rank_and_world_size() == (0, 1) and parallel.is_rank_zero()
    figures = {"loss": 1.0}
    assert parallel.all_reduce_figures(figures) is figures
    weight = torch.nn.Parameter(torch.ones(2))
    parallel.all_reduce_gradients([weight])
    assert weight.grad is None


def test_buckets_hold_consecutive_tensors_of_one_dtype(monkeypatch):
    monkeypatch.setattr(parallel, "BUCKET", 10)
    tensors = [torch.zeros(4), torch.zeros(6), torch.zeros(1), torch.zeros(2, dtype=torch.float64), torch.zeros(30)]
    found = parallel.buckets(tensors)
    assert [[x.numel() for x in bucket] for bucket in found] == [[4, 6], [1], [2], [30]]


def worker(rank: int, port: int, queue):
    """Record what one of two processes gets from each collective operation."""
    store = dist.TCPStore("127.0.0.1", port, 2, rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    seen: dict = {}
    # 1 results come back in the order of the items, also if a rank has none
    seen["spread"] = parallel.compute_and_all_gather([10, 20, 30], [1, 5, 1], lambda own: [x + rank for x in own])
    seen["one item"] = parallel.compute_and_all_gather(["only"], [1], lambda own: own)
    seen["share"] = parallel.rows_of_this_rank([10, 20, 30], [1, 5, 1])
    # 2 sums by name, whichever rank has the name
    seen["total"] = parallel.all_reduce_figures({"a": 1.0, "b": 2.0} if rank == 0 else {"a": 0.5, "c": 4.0})
    seen["first"] = parallel.from_rank_zero(lambda: rank)
    # 3 gradients on both ranks, on one, on none; an embedding's is not contiguous
    both, one, none = (torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(3))
    both.grad = torch.full((3, 2), rank + 1.0).T
    if rank:
        one.grad = torch.ones(2, 3)
    parallel.all_reduce_gradients([both, one, none])
    seen["gradients"] = [None if p.grad is None else p.grad.tolist() for p in (both, one, none)]
    # 4 the other process is gone
    if rank == 0:
        try:
            with detect_lost_peers(object()):
                parallel.all_reduce_figures({"a": 1.0})
        except PeerLost:
            seen["lost"] = True
    queue.put((rank, seen))
    queue.close()
    queue.join_thread()
    dist.destroy_process_group()  # its threads must not outlive the interpreter


def test_collective_operations_of_two_processes():
    port = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False).port
    queue = mp.get_context("spawn").Queue()
    mp.spawn(worker, (port, queue), nprocs=2, join=True)
    seen = dict(queue.get(timeout=60) for _ in range(2))
    assert seen[0]["spread"] == seen[1]["spread"]
    assert sorted(x - y for x, y in zip(seen[0]["spread"], [10, 20, 30], strict=True)) in ([0, 0, 1], [0, 1, 1])
    assert seen[0]["one item"] == seen[1]["one item"] == ["only"]
    assert sorted(seen[0]["share"] + seen[1]["share"]) == [10, 20, 30]
    assert seen[0]["total"] == seen[1]["total"] == {"a": 1.5, "b": 2.0, "c": 4.0}
    assert seen[0]["first"] == seen[1]["first"] == 0
    assert seen[0]["gradients"] == seen[1]["gradients"] == [[[3.0] * 3] * 2, [[1.0] * 3] * 2, None]
    assert seen[0]["lost"]


ENDING = """
import torch
from torch import distributed as dist

from pipeline.launch.processes import exit_process

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
tensors = [torch.ones(10) for _ in range(20000)]
while tensors:  # gloo's threads have the last ones when this process ends
    dist.all_reduce(tensors.pop(), async_op=True)
print("said")
exit_process(75)
"""


def test_unfinished_sums_do_not_change_the_exit_code():
    together = os.environ | {"WORLD_SIZE": "2"}
    ended = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True, env=together)
    assert (ended.returncode, ended.stdout) == (75, "said\n"), ended.stderr


def test_the_batch_does_not_depend_on_the_number_of_processes():
    for size, accumulated, processes in ((4, 2, 2), (4, 3, 2), (4, 4, 8), (2, 2, 4), (3, 5, 1)):
        rows, times = batch_of_each(size, accumulated, processes)
        assert rows * times * processes == size * accumulated
    with pytest.raises(ValueError, match="3 × 5 rows cannot be split evenly among 2 processes"):
        batch_of_each(3, 5, 2)


def test_groups_meet_where_the_models_are(monkeypatch):
    """With launch.device: cpu on a machine that has a GPU, that is the CPU."""
    meshes = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(parallel, "rank_and_world_size", lambda: (0, 2))
    monkeypatch.setattr(dist, "init_device_mesh", lambda device, *args, **more: meshes.append(device))
    for device in ("cpu", "auto"):
        parallel.arrange_as(LaunchSettings(device=device, processes=2, context_parallel=2))
    parallel.arrange()
    assert meshes == ["cpu", "cuda"]
