"""Measure rankings a second against trl 1.16, in one optimizer step on prompts with K responses.

    python tests/benchmarks/rm.py|dpo.py [--only 4.7M/k9 …] [--pairs 5] [--minutes 60] [--quick]

Prints one JSON line for each row as soon as it is measured and keeps it in results/rm.jsonl or
dpo.jsonl (one line a key, replaced by each run). Two long-lived workers, preferences_ours.py and
preferences_peer.py, take the same step in turns (pairs.py) with the same weights, rankings, threads
and dtype. The peer trains on pairs, so it gets all C(K,2) pairs of each ranking, without
checkpointing, in the fastest of three micro-batches tried in this run (once for each model).
`ratio` is our rankings a second over the peer's. Before it is measured, both sides compute loss and
gradients of a few rankings, and must agree to 1e-3 in every tensor. In DPO the reference's forward
pass is part of the step on both sides.

`growth` is our time for each prompt at K = 9 over that at K = 2, to compare with (P + 9R)/(P + 2R).

If torch sees a GPU there are also rows on it (--only gpu): bfloat16 products on both sides, fp32
weights, more prompts a step, and the 1.3B model of the PPO benchmark as well as 135M. The equality
of both sides is checked in fp32. Our side takes all prompts of a step in one forward pass. Each
step is taken twice and the second time counts, because a GPU's memory is given back between turns.
All other rows stay on the CPU.
"""

import os
import random
import statistics
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from pairs import NO_GPU, Clock, Worker, medians, ratio, run_bench, run_pairs, stamp
from ppo_models import FIRST_WORD, SHAPES, parameters

HERE = Path(__file__).resolve().parent
KEY = ("bench", "measure", "model", "k", "p_to_r", "lengths", "loss", "dtype", "peer", "mode")
SIDES = ("ours", "peer")
LIMIT = 1e-3
"""Largest relative error for which a ratio is printed."""
ON_GPU = {"gpu-135M": "135M", "gpu-1.3B": "1.3B"}
"""Model of `plan` that runs on the GPU → its shape."""
PROMPTS = {"cpu": {2: 8, 4: 2, 9: 1}, "cuda": {2: 32, 4: 16, 9: 8}}
"""Device → K → prompts of a step."""
MICRO = {"cpu": (2, 4, 12), "cuda": (24, 48, 96)}
"""Device → micro-batches to try for the peer, in pairs."""
GROWTH = 4
"""Prompts of a step for measuring the growth with K."""
LENGTHS = {"1:1": (128, 128), "4:1": (512, 128), "1:4": (128, 512)}
"""Ratio → maximum tokens of a prompt and of a response."""
THREADS = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}


def shape_of(model: str) -> str:
    """Return the name in SHAPES of a model of `plan`."""
    return ON_GPU.get(model, model)


@dataclass(frozen=True)
class Row:
    """Describe what one line measures."""

    bench: str
    """rm or dpo."""
    model: str
    """A name of SHAPES or ON_GPU."""
    k: int = 9
    """Responses of each prompt."""
    p_to_r: str = "1:1"
    """Length of prompts to that of responses; a key of LENGTHS."""
    lengths: str = "variable"
    """fixed or variable."""
    measure: str = "step"
    """step or growth."""
    law: bool = False
    """Whether this is a growth law, which is skipped when the time is up."""

    @property
    def name(self) -> str:
        """Return the name of the row for --only and messages."""
        return f"{self.model}/{self.measure}/k{self.k}/{self.p_to_r}/{self.lengths}"

    @property
    def device(self) -> str:
        """Return the device that the row runs on."""
        return "cuda" if self.model in ON_GPU else "cpu"

    @property
    def dtype(self) -> str:
        """Return the data type of products."""
        return {"cpu": "float32", "cuda": "bfloat16"}[self.device]

    @property
    def shape(self) -> str:
        """Return the name in SHAPES."""
        return shape_of(self.model)

    @property
    def prompts(self) -> int:
        """Return the number of prompts of a step."""
        return PROMPTS[self.device][self.k]

    def rankings(self, seed: int, prompts: int | None = None) -> list[dict]:
        """Draw random rankings.

        Args:
            seed: Seed of the random numbers.
            prompts: Number of prompts; None: as many as in a step.

        Returns:
            {"prompt", "responses", "ranks"} of each prompt, as token ids. Variable lengths are
            uniform from a quarter of the maximum.
        """
        draw = random.Random(f"{self.name} {seed}")
        vocabulary = SHAPES[self.shape]["vocab_size"]

        def text(longest: int) -> list[int]:
            size = longest if self.lengths == "fixed" else draw.randint(longest // 4, longest)
            return [draw.randrange(FIRST_WORD, vocabulary) for _ in range(size)]

        prompt, response = (n // 8 if self.model == "quick" else n for n in LENGTHS[self.p_to_r])
        return [
            {
                "prompt": text(prompt),
                "responses": [text(response) for _ in range(self.k)],
                "ranks": draw.sample(range(1, self.k + 1), self.k),
            }
            for _ in range(prompts or self.prompts)
        ]


def plan(bench: str, models: list[str]) -> list[Row]:
    """Return the rows of each model: its ratios, then its growth law."""
    shapes = {
        "rm": [(9, "1:1", "fixed"), (9, "1:1", "variable"), (9, "4:1", "variable"), (9, "1:4", "variable"),
               (4, "1:1", "variable"), (4, "4:1", "variable"), (2, "1:1", "variable"), (2, "4:1", "variable")],
        "dpo": [(2, "1:1", "fixed"), (2, "1:1", "variable"), (2, "4:1", "variable"), (9, "1:1", "variable")],
    }[bench]  # fmt: skip
    rows = []
    for model in models:
        rows += [Row(bench, model, *shape) for shape in shapes]
        rows.append(Row(bench, model, lengths="fixed", measure="growth", law=True))
    return rows


def tokens(rankings: list[dict]) -> int:
    """Count the tokens of the rankings, each prompt once."""
    return sum(len(r["prompt"]) + sum(map(len, r["responses"])) for r in rankings)


def necessary_flops(bench: str, shape: dict, rankings: list[dict]) -> float:
    """Count the FLOPs of a step that cannot be avoided.

    Only real tokens count, each prompt counts once, and attention is causal. Forward and backward
    together take three times a forward pass. DPO also needs logits at response tokens and the
    reference's forward pass.

    Args:
        bench: "rm" or "dpo".
        shape: Shape of the model.
        rankings: The rankings of the step.

    Returns:
        FLOPs.
    """
    weights, passes = parameters(shape), 4 if bench == "dpo" else 3
    flops_per_attended = 4 * shape["hidden_size"] * shape["num_hidden_layers"]
    trunk = head = 0.0
    for r in rankings:
        prompt, responses = len(r["prompt"]), [len(x) for x in r["responses"]]
        attended = prompt * (prompt + 1) / 2 + sum(n * prompt + n * (n + 1) / 2 for n in responses)
        trunk += 2 * weights["trunk"] * (prompt + sum(responses)) + flops_per_attended * attended
        if bench == "dpo":
            head += 2 * weights["unembedding"] * sum(responses)
    return passes * (trunk + head)


class Session:
    """Hold both workers with one model loaded, and what this run has learnt about it."""

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
        self.micro: int | None = None
        self.tuned_for: Row | None = None
        self.tried: dict[str, float] = {}
        self.errors: dict[int, dict] = {}

    def start(self, dtype: str = "float32") -> None:
        """Load the initial weights in both workers; `dtype` is the data type of products."""
        for side in SIDES:
            if side not in self.workers:
                command = [sys.executable, "-W", "ignore", str(HERE / f"preferences_{side}.py"), self.bench]
                env = THREADS if self.model in ON_GPU else THREADS | NO_GPU
                self.workers[side] = Worker(side, command, self.folder / f"{side}.log", env)
                self.versions[side] = self.workers[side].ask("hello")
        if not (self.folder / "value_model").is_dir():
            models = self.workers["ours"].ask("craft", model=shape_of(self.model), folder=str(self.folder))
            self.clock.say(f"{self.model}: {models['parameters']:,} parameters")
        for worker in self.workers.values():
            worker.ask("load", folder=str(self.folder), dtype=dtype)

    def stop(self) -> None:
        """End both workers."""
        for worker in self.workers.values():
            worker.close()
        self.workers = {}

    def expected_minutes(self, row: Row, pairs: int) -> float:
        """Return 0: rows are short, so none is skipped in advance."""
        return 0.0

    def check(self, row: Row) -> dict:
        """Check that both sides compute the same on a few rankings, once for each K.

        Args:
            row: The row to measure.

        Returns:
            The largest relative error, its tensor, and the number of tensors.

        Raises:
            ValueError: An error is above LIMIT.
        """
        if row.k not in self.errors:
            self.start()
            few = [
                {**r, "prompt": r["prompt"][:24], "responses": [x[:16] for x in r["responses"]]}
                for r in row.rankings(1, 1 if row.k == 9 else 2)
            ]
            file = str(self.folder / "peer.safetensors")
            answer = self.workers["peer"].ask("numbers", rankings=few, file=file)
            errors = self.workers["ours"].ask("compare", rankings=few, file=file, loss=answer["loss"])
            Path(file).unlink()
            worst = max(errors, key=errors.get)
            self.errors[row.k] = {
                "max_rel_err": float(f"{errors[worst]:.3g}"), "tensor": worst, "tensors": len(errors)
            }  # fmt: skip
            self.clock.say(f"K = {row.k}: equal to {errors[worst]:.2g} in {len(errors)} tensors (worst: {worst})")
        if not self.errors[row.k]["max_rel_err"] <= LIMIT:
            raise ValueError(f"the two sides do not compute the same ({self.errors[row.k]}): no ratio")
        return self.errors[row.k]

    def tune(self, row: Row) -> int:
        """Find the peer's fastest micro-batch of three, by the second of two steps each.

        The steps are of K = 4; this is done once for each model, on a GPU once for each ratio of
        lengths.

        Args:
            row: The row to measure.

        Returns:
            The micro-batch for this row: the largest up to the fastest that divides its pairs and
            has no more tokens than were tried.
        """
        plain = Row(self.bench, self.model, 4)
        if row.model in ON_GPU:
            plain = replace(plain, p_to_r=row.p_to_r)
        if self.tuned_for != plain:
            self.tuned_for, self.micro, self.tried = plain, None, {}
        if self.micro is None:
            for micro in MICRO[row.device]:
                for seed in (2, 3):
                    self.tried[str(micro)] = round(self.peer_step(plain.rankings(seed), micro)["seconds"], 2)
            self.micro = int(min(self.tried, key=self.tried.get))
            self.clock.say(f"{self.model}: the peer's seconds by micro-batch: {self.tried}")
        pairs = row.prompts * row.k * (row.k - 1) // 2
        wider = sum(LENGTHS[row.p_to_r]) / sum(LENGTHS[plain.p_to_r])
        largest = max(MICRO[row.device])
        return max(m for m in range(1, self.micro + 1) if pairs % m == 0 and (m == 1 or m * wider <= largest))

    def our_step(self, rankings: list[dict]) -> dict:
        """Take one step of ours."""
        return self.workers["ours"].ask("step", rankings=rankings)

    def peer_step(self, rankings: list[dict], micro: int) -> dict:
        """Take one step of the peer."""
        return self.workers["peer"].ask("step", rankings=rankings, micro=micro)


def measure_step(session: Session, row: Row, pairs: int) -> dict:
    """Measure the rankings a second of both sides in turns; return the figures of the line."""
    equal = session.check(row)
    session.start(row.dtype)
    micro = session.tune(row)
    session.our_step(row.rankings(4))  # warm-up of both: memory, kernels, optimizer states
    session.peer_step(row.rankings(4), micro)
    peak_flops = session.workers["ours"].ask("ceilings")["flops"]
    ours, peer = run_pairs(
        lambda pair: session.our_step(row.rankings(100 + pair)),
        lambda pair: session.peer_step(row.rankings(100 + pair), micro),
        pairs,
        lambda pair, side, answer: session.clock.say(
            f"{row.name}: pair {pair + 1} of {pairs}, {SIDES[side]} {answer['seconds']:.2f} s"
        ),
    )
    sides = list(zip(SIDES, (ours, peer), strict=True))
    needed = [necessary_flops(row.bench, SHAPES[row.shape], row.rankings(100 + pair)) for pair in range(pairs)]
    return {
        "ratio": ratio([b["seconds"] / a["seconds"] for a, b in zip(ours, peer, strict=True)]),
        "equal_math": equal,
        "seconds": {side: round(statistics.median(x["seconds"] for x in answers), 3) for side, answers in sides},
        "phases_s": {side: medians([x["phases"] for x in answers]) for side, answers in sides},
        "tokens": {
            "real": round(statistics.median(tokens(row.rankings(100 + pair)) for pair in range(pairs))),
            "processed": {side: round(statistics.median(x["tokens"] for x in answers)) for side, answers in sides},
        },
        "ceiling_fraction": round(
            statistics.median(n / x["seconds"] / peak_flops for n, x in zip(needed, ours, strict=True)), 4
        ),
        "matmul_gflops": round(peak_flops / 1e9, 1),
        "peak_bytes": {side: max(x["peak_bytes"] for x in answers) for side, answers in sides},
        "our_config": session.workers["ours"].ask("config"),
        "peer_config": session.workers["peer"].ask("config") | {"micro_batches_tried_s": session.tried},
    }


def measure_growth(session: Session, row: Row, pairs: int) -> dict:
    """Measure our time for a prompt at K = 9 over K = 2, in turns, on equally many prompts."""
    session.start(row.dtype)

    def step(k: int, seed: int) -> dict:
        rankings = Row(row.bench, row.model, k, row.p_to_r, row.lengths).rankings(seed, GROWTH)
        return session.our_step(rankings)

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
        "peer": f"trl {session.versions['peer']['trl']}",
        "mode": "tuned",
        **figures,
        "threads": session.versions["ours"]["threads"],
        "versions": session.versions,
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
