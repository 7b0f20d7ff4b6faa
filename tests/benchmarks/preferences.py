"""Rankings a second against trl 1.16: one optimizer step on prompts with K ranked responses.

    python tests/benchmarks/rm.py|dpo.py [--only 4.7M/k9 …] [--pairs 5] [--minutes 60] [--quick]

One JSON object a line, printed and kept in results/rm.jsonl or dpo.jsonl as soon as it is measured (one line a key,
rewritten by each run). Two long-lived workers, preferences_ours.py and preferences_peer.py, take the same step in turns
(pairs.py): the same weights, rankings, threads and dtype. The peer has pairs, so it gets all C(K,2) of each ranking,
without checkpointing, in the micro-batch that is the fastest of three tried in this run (once a model). `ratio` is our
rankings a second over the peer's. Before it is measured both sides compute loss and gradients of a few rankings, and
must agree to 1e-3 in every tensor. In DPO the reference's forward pass is part of the step on both sides.

growth: our seconds a prompt at K = 9 over those at K = 2, to be held against (P + 9R)/(P + 2R).

Where torch sees a GPU there are also rows on it (--only gpu): products in bfloat16 on both sides, weights in fp32, more
prompts a step, and the 1.3B model of the PPO bench beside 135M. What the two sides compute is compared in fp32. Ours
takes the step's prompts in one forward; each step is taken twice and the second time counts, since a GPU's memory is
given back between turns. All other rows stay on the CPU.
"""

import os
import random
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from pairs import NO_GPU, Clock, Worker, middle, ratio, run_bench, run_pairs, stamp
from ppo_models import FIRST_WORD, SHAPES, parameters

HERE = Path(__file__).resolve().parent
KEY = ("bench", "measure", "model", "k", "p_to_r", "lengths", "loss", "dtype", "peer", "mode")
SIDES = ("ours", "peer")
LIMIT = 1e-3  # largest relative error at which a ratio may be printed
ON_GPU = {"gpu-135M": "135M", "gpu-1.3B": "1.3B"}  # a model of `plan`: its shape
PROMPTS = {"cpu": {2: 8, 4: 2, 9: 1}, "cuda": {2: 32, 4: 16, 9: 8}}  # of a step, by K
MICRO = {"cpu": (2, 4, 12), "cuda": (24, 48, 96)}  # the peer's candidates, pairs
GROWTH = 4  # prompts of a step whose growth with K is measured
LENGTHS = {"1:1": (128, 128), "4:1": (512, 128), "1:4": (128, 512)}  # most tokens of a prompt, of a response
THREADS = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}


def shape_of(model: str) -> str:
    """The name in SHAPES of a model of `plan`."""
    return ON_GPU.get(model, model)


@dataclass(frozen=True)
class Row:
    """What one line measures."""

    bench: str
    model: str
    k: int = 9
    p_to_r: str = "1:1"
    lengths: str = "variable"
    measure: str = "step"  # step, growth
    law: bool = False

    @property
    def name(self) -> str:
        return f"{self.model}/{self.measure}/k{self.k}/{self.p_to_r}/{self.lengths}"

    @property
    def device(self) -> str:
        return "cuda" if self.model in ON_GPU else "cpu"

    @property
    def dtype(self) -> str:
        return {"cpu": "float32", "cuda": "bfloat16"}[self.device]

    @property
    def shape(self) -> str:
        return shape_of(self.model)

    @property
    def prompts(self) -> int:
        return PROMPTS[self.device][self.k]

    def rankings(self, seed: int, prompts: int | None = None) -> list[dict]:
        """Random words; variable lengths are uniform from a quarter of the most."""
        draw = random.Random(f"{self.name} {seed}")
        vocabulary = SHAPES[self.shape]["vocab_size"]
        size = lambda most: most if self.lengths == "fixed" else draw.randint(most // 4, most)  # noqa: E731
        text = lambda most: [draw.randrange(FIRST_WORD, vocabulary) for _ in range(size(most))]  # noqa: E731
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
    """Each model's claims, then its growth law."""
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
    return sum(len(r["prompt"]) + sum(map(len, r["responses"])) for r in rankings)


def necessary_flops(bench: str, shape: dict, rankings: list[dict]) -> float:
    """FLOPs that a step cannot do without: real tokens, each prompt once, causal attention; forward and backward three
    times a forward. DPO: logits at response tokens, and one more forward, the reference's."""
    weights, passes = parameters(shape), 4 if bench == "dpo" else 3
    attend = 4 * shape["hidden_size"] * shape["num_hidden_layers"]
    trunk = head = 0.0
    for r in rankings:
        prompt, responses = len(r["prompt"]), [len(x) for x in r["responses"]]
        looks = prompt * (prompt + 1) / 2 + sum(n * prompt + n * (n + 1) / 2 for n in responses)
        trunk += 2 * weights["trunk"] * (prompt + sum(responses)) + attend * looks
        head += 2 * weights["unembedding"] * sum(responses) * (bench == "dpo")
    return passes * (trunk + head)


class Session:
    """Both workers with one model loaded, and what this run has found out about it."""

    def __init__(self, bench: str, model: str, folder: Path, clock: Clock):
        self.bench, self.model, self.folder, self.clock = bench, model, folder, clock
        self.workers: dict[str, Worker] = {}
        self.versions: dict[str, dict] = {}
        self.micro: int | None = None
        self.tuned_for: Row | None = None
        self.tried: dict[str, float] = {}
        self.errors: dict[int, dict] = {}

    def start(self, dtype: str = "float32") -> None:
        """Workers with the weights as they are on disk, whatever was trained before; products in `dtype`."""
        for side in SIDES:
            if side not in self.workers:
                command = [sys.executable, "-W", "ignore", str(HERE / f"preferences_{side}.py"), self.bench]
                env = THREADS if self.model in ON_GPU else THREADS | NO_GPU
                self.workers[side] = Worker(side, command, self.folder / f"{side}.log", env)
                self.versions[side] = self.workers[side].ask("hello")
        if not (self.folder / "value_model").is_dir():
            made = self.workers["ours"].ask("craft", model=shape_of(self.model), folder=str(self.folder))
            self.clock.say(f"{self.model}: {made['parameters']:,} parameters")
        for worker in self.workers.values():
            worker.ask("load", folder=str(self.folder), dtype=dtype)

    def stop(self) -> None:
        for worker in self.workers.values():
            worker.close()
        self.workers = {}

    def expected_minutes(self, row: Row, pairs: int) -> float:
        return 0.0

    def check(self, row: Row) -> dict:
        """Both sides on the same few rankings, once a K; an error of more than LIMIT ends the row."""
        if row.k not in self.errors:
            self.start()
            few = [
                {**r, "prompt": r["prompt"][:24], "responses": [x[:16] for x in r["responses"]]}
                for r in row.rankings(1, 1 if row.k == 9 else 2)
            ]
            file = str(self.folder / "peer.safetensors")
            found = self.workers["peer"].ask("numbers", rankings=few, file=file)
            errors = self.workers["ours"].ask("compare", rankings=few, file=file, loss=found["loss"])
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
        """The peer's fastest micro-batch of three, by the second of two steps each of K = 4; once a model, on a GPU
        once a shape. A row takes the largest up to it that divides its pairs and has no more tokens than were tried."""
        plain = Row(self.bench, self.model, 4, *([row.p_to_r] if row.model in ON_GPU else []))
        if self.tuned_for != plain:
            self.tuned_for, self.micro, self.tried = plain, None, {}
        if self.micro is None:
            for micro in MICRO[row.device]:
                for seed in (2, 3):
                    self.tried[str(micro)] = round(self.peer_step(plain.rankings(seed), micro)["seconds"], 2)
            self.micro = int(min(self.tried, key=self.tried.get))
            self.clock.say(f"{self.model}: the peer's seconds by micro-batch: {self.tried}")
        tokens_of = lambda some: sum(LENGTHS[some.p_to_r])  # noqa: E731
        pairs, wider = row.prompts * row.k * (row.k - 1) // 2, tokens_of(row) / tokens_of(plain)
        most = max(MICRO[row.device])
        return max(m for m in range(1, self.micro + 1) if pairs % m == 0 and (m == 1 or m * wider <= most))

    def peer_step(self, rankings: list[dict], micro: int) -> dict:
        return self.workers["peer"].ask("step", rankings=rankings, micro=micro)


def measure_step(session: Session, row: Row, pairs: int) -> dict:
    """Rankings a second, in turns."""
    equal = session.check(row)
    session.start(row.dtype)
    micro = session.tune(row)
    ours_step = lambda seed: session.workers["ours"].ask("step", rankings=row.rankings(seed))  # noqa: E731
    ours_step(4)  # both warm: memory, kernels, optimizer states
    session.peer_step(row.rankings(4), micro)
    fastest = session.workers["ours"].ask("ceilings")["flops"]
    ours, peer = run_pairs(
        lambda pair: ours_step(100 + pair),
        lambda pair: session.peer_step(row.rankings(100 + pair), micro),
        pairs,
        lambda pair, side, found: session.clock.say(
            f"{row.name}: pair {pair + 1} of {pairs}, {SIDES[side]} {found['seconds']:.2f} s"
        ),
    )
    sides = list(zip(SIDES, (ours, peer), strict=True))
    needed = [necessary_flops(row.bench, SHAPES[row.shape], row.rankings(100 + pair)) for pair in range(pairs)]
    return {
        "ratio": ratio([b["seconds"] / a["seconds"] for a, b in zip(ours, peer, strict=True)]),
        "equal_math": equal,
        "seconds": {side: round(statistics.median(x["seconds"] for x in found), 3) for side, found in sides},
        "phases_s": {side: middle([x["phases"] for x in found]) for side, found in sides},
        "tokens": {
            "real": round(statistics.median(tokens(row.rankings(100 + pair)) for pair in range(pairs))),
            "processed": {side: round(statistics.median(x["tokens"] for x in found)) for side, found in sides},
        },
        "ceiling_fraction": round(
            statistics.median(n / x["seconds"] / fastest for n, x in zip(needed, ours, strict=True)), 4
        ),
        "matmul_gflops": round(fastest / 1e9, 1),
        "peak_bytes": {side: max(x["peak_bytes"] for x in found) for side, found in sides},
        "our_config": session.workers["ours"].ask("config"),
        "peer_config": session.workers["peer"].ask("config") | {"micro_batches_tried_s": session.tried},
    }


def measure_growth(session: Session, row: Row, pairs: int) -> dict:
    """Ours alone: seconds a prompt at K = 9 over K = 2, in turns, at the same number of prompts."""
    session.start(row.dtype)
    ask = lambda k, seed: session.workers["ours"].ask(  # noqa: E731
        "step", rankings=Row(row.bench, row.model, k, row.p_to_r, row.lengths).rankings(seed, GROWTH)
    )
    for k in (9, 2):
        ask(k, 4)
    many, few = run_pairs(lambda pair: ask(9, 100 + pair), lambda pair: ask(2, 100 + pair), 3)
    prompt, response = (n // 8 if row.model == "quick" else n for n in LENGTHS[row.p_to_r])
    grows = ratio([a["seconds"] / b["seconds"] for a, b in zip(many, few, strict=True)])
    tokens_grow = (prompt + 9 * response) / (prompt + 2 * response)
    return {"law": {"time": grows, "tokens": round(tokens_grow, 4), "over": round(grows["median"] / tokens_grow, 4)}}


def measure(session: Session, row: Row, pairs: int) -> dict:
    found = {"step": measure_step, "growth": measure_growth}[row.measure](session, row, pairs)
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
        **found,
        "threads": session.versions["ours"]["threads"],
        "versions": session.versions,
        **stamp(),
    }


def main(bench: str) -> int:
    open_session = lambda model, folder, clock: Session(bench, model, folder, clock)  # noqa: E731
    rows = lambda models: plan(bench, models)  # noqa: E731
    models = ["4.7M", "135M", *(ON_GPU if torch.cuda.is_available() else ())]
    return run_bench(bench, __doc__, models, 60.0, KEY, rows, open_session, measure)
