"""Measure a save of sharded weights: whole tensors gathered in rank 0, against shares in threads.

    python tests/benchmarks/shares.py [--millions 40] [--processes 2] [--pairs 3]

Processes on this machine hold a Llama with AdamW's moments by fsdp2, on a CPU with gloo. They save
in turns A B B A: `whole` gathers every tensor and writes it before training goes on, as runs did
until November 2026; `shares` copies and lets threads write. Prints one JSON line and keeps it in
results/shares.jsonl:

    pause_s      seconds until the next step may begin, of the slowest process
    complete_s   seconds until the checkpoint is complete
    grown_mb     the most by which rank 0's resident memory grows meanwhile, in megabytes

Medians over the pairs, each with minimum and maximum. Linux only: /proc/self has the memory.
"""

import argparse
import ctypes
import gc
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, not an installed copy

import torch
from pairs import save_row, stamp
from torch import distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.launch import parallel
from pipeline.stage import StopFlag
from pipeline.store.checkpoints import CheckpointStore
from stages.models.loading import prepare
from stages.models.sharding import shard
from stages.training.checkpoint import TrainingState, save_checkpoint
from stages.training.selection import Best
from stages.training.session import Session
from stages.training.trainee import Trainee, make_trainee, optimizer_step
from tests.together import together

HERE = Path(__file__).resolve().parent


def trained(millions: int) -> Trainee:
    """Return a sharded model of about so many million weights, after one step."""
    width = 256
    layer = 4 * width * width + 3 * width * 4 * width
    config = LlamaConfig(
        vocab_size=1024, hidden_size=width, intermediate_size=4 * width, num_attention_heads=4,
        num_hidden_layers=max(1, millions * 10**6 // layer), tie_word_embeddings=True,
    )  # fmt: skip
    model = prepare(LlamaForCausalLM(config))
    shard(model, torch.device("cpu"))
    trainee = make_trainee("model", model, learning_rate=1e-3, max_grad_norm=1.0)
    for p in trainee.parameters.values():
        p.grad = torch.ones_like(p)
    optimizer_step(trainee, 1e-3, 1)
    return trainee


def resident(name: str) -> int:
    """Return VmRSS (now) or VmHWM (the most since it was reset) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def timed_save(session: Session, training: TrainingState, step: int) -> dict[str, float]:
    """Save once and return what it took."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # or the next save would grow into what the last one left
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before, began = resident("VmRSS"), time.perf_counter()
    save_checkpoint(session, step, 100, training, {})
    pauses = parallel.all_gather(time.perf_counter() - began)
    session.finish_saves()
    dist.barrier()
    seconds = time.perf_counter() - began
    return {"pause_s": max(pauses), "complete_s": seconds, "grown_mb": (resident("VmHWM") - before) / 1e6}


def measure(folder: str, millions: int, pairs: int, results: Any) -> None:
    """Save in turns in one of the processes; rank 0 sends what each save took.

    Args:
        folder: Where the checkpoints go.
        millions: Weights of the model.
        pairs: Saves of either kind.
        results: A connection.
    """
    training = TrainingState([trained(millions)], Best("last", None, False))
    store = CheckpointStore(Path(folder), 1, 1, "run", say=lambda line: None, writes=parallel.is_rank_zero())
    found: dict[str, list[dict[str, float]]] = {"whole": [], "shares": []}
    for i in range(2 * pairs):
        kind = "whole" if i % 4 in (0, 3) else "shares"
        # a session that is not collective gathers, on all ranks, and writes on rank 0
        session = Session("rm", 1, store, SimpleNamespace(), StopFlag(), collective=kind == "shares")
        found[kind].append(timed_save(session, training, i + 1))
    if parallel.is_rank_zero():
        results.send(found)


def main(argv: list[str]) -> None:
    """Measure, and keep a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, default=40, help="weights of the model, in millions")
    parser.add_argument("--processes", type=int, default=2, help="processes that share it")
    parser.add_argument("--pairs", type=int, default=3, help="saves of either kind")
    args = parser.parse_args(argv)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="bench_shares_") as folder:
        together(args.processes, measure, folder, args.millions, args.pairs, sender, seconds=600, patience=300)
    row: dict[str, Any] = {"bench": "shares", "millions": args.millions, "processes": args.processes}
    for kind, saves in receiver.recv().items():
        for name in saves[0]:
            values = [save[name] for save in saves]
            figures = {"median": statistics.median(values), "min": min(values), "max": max(values)}
            row[f"{kind}_{name}"] = {key: round(value, 3) for key, value in figures.items()}
    save_row(row | stamp(), ("bench", "millions", "processes"), HERE / "results" / "shares.jsonl")


if __name__ == "__main__":
    main(sys.argv[1:])
