"""Measure rankings a second in one optimizer step on prompts with K responses, against two peers.

    python tests/benchmarks/rm.py|dpo.py [--only 4.7M/step/k9 …] [--pairs 5] [--minutes 60]
                                         [--quick]

Prints one JSON line for each row as soon as it is measured and keeps it in results/rm.jsonl or
dpo.jsonl (one line a key, replaced by each run). Two long-lived workers, preferences_ours.py and a
peer's, take the same step in turns (pairs.py) with the same weights, rankings, threads and dtype.

- trl 1.16 (preferences_peer.py) trains on pairs, so it gets all C(K,2) pairs of each ranking,
  without checkpointing, in the fastest of the micro-batches tried in this run (once for each
  model); on a GPU with Liger's kernels and without, if they are installed.
- K padded rows (preferences_rows.py; rows that end in /rows) is the loop that InstructGPT
  describes: each response once, in the fastest micro-batch tried for each workload.

`ratio` is our rankings a second over the peer's. Before it is measured, both sides compute loss and
gradients of a few rankings, and must agree to 1e-3 in every tensor. After each step, each side must
have read as many tokens as the rankings have: nothing is cut off. In DPO the reference's forward
pass is part of the step on every side. `seconds` is the wall's clock, `cpu_seconds` that of the
process on all its cores. `collections` says how often a step of trl calls gc.collect or
torch.cuda.empty_cache by itself, and what that takes; it is part of its time.

`growth` is our time for each prompt at K = 9 over that at K = 2, to compare with (P + 9R)/(P + 2R).

If torch sees a GPU there are also rows on it (--only gpu): bfloat16 products on all sides, fp32
weights, more prompts a step, and the 1.3B model of the PPO benchmark as well as 135M. The equality
of both sides is checked in fp32. Our side takes all prompts of a step in one forward pass. Each
step is taken twice and the second time counts, because a GPU's memory is given back between turns.
All other rows stay on the CPU.
"""

import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from pairs import NO_GPU, Clock, Worker, medians, ratio, run_bench, run_pairs, stamp
from ppo_models import SHAPES
from preferences_plan import (
    GROWTH,
    LENGTHS,
    MICRO,
    MICRO_OF_ROWS,
    ON_GPU,
    PEERS,
    Row,
    necessary_flops,
    plan,
    shape_of,
    tokens,
    tokens_read,
)

HERE = Path(__file__).resolve().parent
KEY = ("bench", "measure", "model", "k", "p_to_r", "lengths", "loss", "dtype", "peer", "mode")
SIDES = ("ours", "peer")
WORKERS = {"ours": "preferences_ours.py", "pairs": "preferences_peer.py", "rows": "preferences_rows.py"}
LIMIT = 1e-3
"""Largest relative error for which a ratio is printed."""
THREADS = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}


class Session:
    """Hold our worker and one peer's with one model loaded, and what this run has learnt of it."""

    def __init__(self, bench: str, model: str, folder: Path, clock: Clock):
        """Prepare a session; workers start when they are needed.

        Args:
            bench: "rm" or "dpo".
            model: Name of the model in `plan`.
            folder: Scratch folder.
            clock: Prints progress.
        """
        self.bench, self.model, self.folder, self.clock = bench, model, folder, clock
        self.workers: dict[str, Worker] = {}
        self.versions: dict[str, dict] = {}
        self.tuned: dict[Row, tuple[dict, dict[str, float]]] = {}
        self.errors: dict[tuple, dict] = {}

    def start(self, *peers: str, dtype: str = "float32") -> None:
        """Load the initial weights in our worker and a peer's, and end the other peer's.

        Args:
            *peers: A key of PEERS; none: our worker alone.
            dtype: Data type of products.
        """
        for other in [name for name in self.workers if name not in ("ours", *peers)]:
            self.workers.pop(other).close()
        for side in ("ours", *peers):
            if side not in self.workers:
                command = [sys.executable, "-W", "ignore", str(HERE / WORKERS[side]), self.bench]
                env = THREADS if self.model in ON_GPU else THREADS | NO_GPU
                self.workers[side] = Worker(side, command, self.folder / f"{side}.log", env)
                self.versions[side] = self.workers[side].ask("hello")
        if not (self.folder / "value_model").is_dir():
            models = self.workers["ours"].ask("craft", model=shape_of(self.model), folder=str(self.folder))
            self.clock.say(f"{self.model}: {models['parameters']:,} parameters")
        for worker in self.workers.values():
            worker.ask("load", folder=str(self.folder), dtype=dtype)

    def stop(self) -> None:
        """End the workers."""
        for worker in self.workers.values():
            worker.close()
        self.workers = {}

    def expected_minutes(self, row: Row, pairs: int) -> float:
        """Return 0: rows are short, so none is skipped in advance."""
        return 0.0

    def check(self, row: Row, **options: bool) -> dict:
        """Check that both sides compute the same on a few rankings, once for each K and peer.

        Args:
            row: The row to measure.
            **options: The peer's, such as liger=True.

        Returns:
            The largest relative error, its tensor, and the number of tensors.

        Raises:
            ValueError: An error is above LIMIT.
        """
        key = (row.k, row.peer, *options)
        if key not in self.errors:
            self.start(row.peer)
            few = [
                {**r, "prompt": r["prompt"][:24], "responses": [x[:16] for x in r["responses"]]}
                for r in row.rankings(1, 1 if row.k == 9 else 2)
            ]
            file = str(self.folder / "peer.safetensors")
            answer = self.workers[row.peer].ask("numbers", rankings=few, file=file, **options)
            errors = self.workers["ours"].ask("compare", rankings=few, file=file, loss=answer["loss"])
            Path(file).unlink()
            worst = max(errors, key=errors.get)
            self.errors[key] = {
                "max_rel_err": float(f"{errors[worst]:.3g}"), "tensor": worst, "tensors": len(errors)
            }  # fmt: skip
            self.clock.say(f"{row.name}: equal to {errors[worst]:.2g} in {len(errors)} tensors (worst: {worst})")
        if not self.errors[key]["max_rel_err"] <= LIMIT:
            raise ValueError(f"the two sides do not compute the same ({self.errors[key]}): no ratio")
        return self.errors[key]

    def tune(self, row: Row) -> tuple[dict, dict[str, float]]:
        """Return the peer's fastest options for a row, and the seconds of all that were tried."""
        return self.tune_rows(row) if row.peer == "rows" else self.tune_pairs(row)

    def tune_rows(self, row: Row) -> tuple[dict, dict[str, float]]:
        """Find the fastest micro-batch of K padded rows, for each workload."""
        if row not in self.tuned:
            choices = [{"micro": micro} for micro in MICRO_OF_ROWS if row.prompts % micro == 0]
            self.tuned[row] = self.fastest(row, choices)
        return self.tuned[row]

    def tune_pairs(self, row: Row) -> tuple[dict, dict[str, float]]:
        """Find trl's fastest micro-batch, on steps of K = 4.

        This is done once for each model, on a GPU once for each ratio of lengths, there also with
        Liger's kernels.

        Args:
            row: The row to measure.

        Returns:
            The options for this row: the largest micro-batch up to the fastest that divides its
            pairs and has no more tokens than were tried; and what was tried.
        """
        plain = Row(self.bench, self.model, 4)
        if row.model in ON_GPU:
            plain = replace(plain, p_to_r=row.p_to_r)
        if plain not in self.tuned:
            kernels = [{}, {"liger": True}] if self.versions["pairs"]["liger"] else [{}]
            choices = [{"micro": micro, **kernel} for kernel in kernels for micro in MICRO[row.device]]
            self.tuned[plain] = self.fastest(plain, choices)
        best, tried = self.tuned[plain]
        pairs, largest = row.prompts * row.k * (row.k - 1) // 2, max(MICRO[row.device])
        wider = sum(LENGTHS[row.p_to_r]) / sum(LENGTHS[plain.p_to_r])
        fitting = [m for m in range(1, best["micro"] + 1) if pairs % m == 0 and (m == 1 or m * wider <= largest)]
        return best | {"micro": max(fitting)}, tried

    def fastest(self, row: Row, choices: Sequence[dict]) -> tuple[dict, dict[str, float]]:
        """Return the fastest of a peer's options by the second of two steps, and all seconds."""
        if len(choices) == 1:
            return choices[0], {}
        seconds: list[float] = []
        for options in choices:
            for seed in (2, 3):
                answer = self.peer_step(row, row.rankings(seed), options)
            seconds.append(answer["seconds"])
        names = [f"{options['micro']}{' liger' if options.get('liger') else ''}" for options in choices]
        tried = {name: round(taken, 3) for name, taken in zip(names, seconds, strict=True)}
        self.clock.say(f"{row.name}: the peer's seconds by micro-batch: {tried}")
        return choices[seconds.index(min(seconds))], tried

    def our_step(self, row: Row, rankings: list[dict]) -> dict:
        """Take one step of ours."""
        answer = self.workers["ours"].ask("step", rankings=rankings)
        packed = self.workers["ours"].ask("config")["packed"]
        check_tokens("ours", answer, tokens_read("ours", self.bench, rankings, packed))
        return answer

    def peer_step(self, row: Row, rankings: list[dict], options: dict) -> dict:
        """Take one step of the row's peer."""
        answer = self.workers[row.peer].ask("step", rankings=rankings, **options)
        check_tokens(row.peer, answer, tokens_read(row.peer, self.bench, rankings))
        return answer


def check_tokens(side: str, answer: dict, expected: int) -> None:
    """Check that a side has read every token of the rankings.

    Raises:
        ValueError: It has read more or fewer.
    """
    if answer["real"] != expected:
        raise ValueError(f"{side} has read {answer['real']} tokens; the rankings have {expected}: no ratio")


def measure_step(session: Session, row: Row, pairs: int) -> dict:
    """Measure the rankings a second of both sides in turns; return the figures of the line."""
    equal = session.check(row)
    session.start(row.peer, dtype=row.dtype)
    options, tried = session.tune(row)
    if options.get("liger"):
        equal = {"plain": equal, "liger": session.check(row, liger=True)}
        session.start(row.peer, dtype=row.dtype)
    session.our_step(row, row.rankings(4))  # warm-up of both: memory, kernels, optimizer states
    session.peer_step(row, row.rankings(4), options)
    peak_flops = session.workers["ours"].ask("ceilings")["flops"]
    ours, peer = run_pairs(
        lambda pair: session.our_step(row, row.rankings(100 + pair)),
        lambda pair: session.peer_step(row, row.rankings(100 + pair), options),
        pairs,
        lambda pair, side, answer: session.clock.say(
            f"{row.name}: pair {pair + 1} of {pairs}, {SIDES[side]} {answer['seconds']:.2f} s"
        ),
    )
    needed = [necessary_flops(row.bench, SHAPES[row.shape], row.rankings(100 + pair)) for pair in range(pairs)]

    def median(key: Callable[[dict], float], digits: int | None = 3) -> dict:
        sides = zip(SIDES, (ours, peer), strict=True)
        return {side: round(statistics.median(map(key, answers)), digits) for side, answers in sides}

    line = {
        "ratio": ratio([b["seconds"] / a["seconds"] for a, b in zip(ours, peer, strict=True)]),
        "equal_math": equal,
        "seconds": median(lambda x: x["seconds"]),
        "cpu_seconds": median(lambda x: x["cpu_seconds"]),
        "phases_s": {"ours": medians([x["phases"] for x in ours]), "peer": medians([x["phases"] for x in peer])},
        "tokens": {
            "real": round(statistics.median(tokens(row.rankings(100 + pair)) for pair in range(pairs))),
            "processed": median(lambda x: x["tokens"], None),
        },
        "ceiling_fraction": round(
            statistics.median(n / x["seconds"] / peak_flops for n, x in zip(needed, ours, strict=True)), 4
        ),
        "matmul_gflops": round(peak_flops / 1e9, 1),
        "peak_bytes": {"ours": max(x["peak_bytes"] for x in ours), "peer": max(x["peak_bytes"] for x in peer)},
        "our_config": session.workers["ours"].ask("config"),
        "peer_config": session.workers[row.peer].ask("config") | {"micro_batches_tried_s": tried},
    }
    if row.peer == "pairs":
        line["collections"] = medians([x["collections"] for x in peer])
    return line


def measure_growth(session: Session, row: Row, pairs: int) -> dict:
    """Measure our time for a prompt at K = 9 over K = 2, in turns, on equally many prompts."""
    session.start(dtype=row.dtype)

    def step(k: int, seed: int) -> dict:
        rankings = Row(row.bench, row.model, k, row.p_to_r, row.lengths).rankings(seed, GROWTH)
        return session.our_step(row, rankings)

    for k in (9, 2):
        step(k, 4)
    many, few = run_pairs(lambda pair: step(9, 100 + pair), lambda pair: step(2, 100 + pair), 3)
    prompt, response = (n // 8 if row.model == "quick" else n for n in LENGTHS[row.p_to_r])
    time_growth = ratio([a["seconds"] / b["seconds"] for a, b in zip(many, few, strict=True)])
    token_growth = (prompt + 9 * response) / (prompt + 2 * response)
    return {
        "law": {
            "time": time_growth,
            "tokens": round(token_growth, 4),
            "over": round(time_growth["median"] / token_growth, 4),
        }
    }


def measure(session: Session, row: Row, pairs: int) -> dict:
    """Measure a row and return its line."""
    measure_row = measure_growth if row.measure == "growth" else measure_step
    figures = measure_row(session, row, pairs)
    return {
        "bench": row.bench,
        "measure": row.measure,
        "model": row.shape,
        "k": row.k,
        "prompts": GROWTH if row.measure == "growth" else row.prompts,
        "p_to_r": row.p_to_r,
        "lengths": row.lengths,
        "loss": "sigmoid",
        "dtype": row.dtype,
        "peer": PEERS[row.peer] + (f" {version('trl')}" if row.peer == "pairs" else ""),
        "mode": "tuned",
        **figures,
        "threads": session.versions["ours"]["threads"],
        "versions": {"ours": session.versions["ours"], "peer": session.versions.get(row.peer)},
        **stamp(),
    }


def main(bench: str) -> int:
    """Run the benchmark "rm" or "dpo" and return the exit code."""
    models = ["4.7M", "135M"]
    if torch.cuda.is_available():
        models += ON_GPU
    return run_bench(
        bench,
        __doc__,
        models,
        minutes=60.0,
        key=KEY,
        plan=partial(plan, bench),
        open_session=partial(Session, bench),
        measure=measure,
    )
