"""PPO against trl 1.12.0: samples a second, decoding, peak memory, growth laws. `make bench BENCH=ppo`.

    python tests/benchmarks/ppo.py [--only 4.7M/update …] [--pairs 5] [--minutes 80] [--quick]

One JSON object a line, printed and kept in results/ppo.jsonl as soon as it is measured (one line a key, rewritten by
each run). A row is measured by two long-lived workers, ppo_ours.py and ppo_peer.py, in turns (pairs.py), on the same
prompts, weights (ppo_models.py), threads and number of optimizer steps. `ratio` is ours over the peer's: samples a
second, tokens a second, or bytes at the peak. Before a ratio is measured both sides compute the same few episodes, and
must agree to 1e-3 in every log-prob, value, score and gradient.

mode tuned: the peer without checkpointing, its micro-batch the fastest of three tried in this run (once a model);
as_shipped: trl's defaults but for the workload; where they come to the same work as tuned, it is not measured twice.
Ours: its defaults. The peer's environment is made when it is missing; PEER_PYTHON names another one.

Where torch sees a GPU there are also rows of a 1.3B model on it (--only 1.3B): prompts and responses of 512 tokens,
batch 128, products in bfloat16 (the peer's weights are bfloat16; ours stay fp32, with autocast); both sides sample the
batch at once, and what they compute is compared in fp32 on the 4.7M model. All other rows stay on the CPU.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pairs import NO_GPU, Clock, Worker, middle, ratio, run_bench, run_pairs, stamp
from ppo_models import P_EOS, PAD, SHAPES, decode_bytes, eos_of, necessary_flops, prompts

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PEER = "trl==1.12.0"
KEY = ("bench", "measure", "model", "lengths", "n", "epochs", "ptx", "dtype", "peer", "mode")
SIDES = ("ours", "peer")
ROLES = ("policy", "ref_policy", "reward_model", "value_model")
LIMIT = 1e-3  # largest relative error at which a ratio may be printed
BATCH = {"4.7M": 32, "135M": 16, "1.3B": 128, "quick": 8}
MICRO = {"4.7M": (8, 16, 32), "135M": (2, 4, 8), "1.3B": (2, 4, 8), "quick": (2, 4, 8)}  # the peer's candidates
LONGEST = {"4.7M": 128, "135M": 128, "1.3B": 512, "quick": 32}  # tokens of a prompt, and of a response
DTYPE = {"1.3B": "bfloat16"}  # of products; others float32
COMPARED = {"1.3B": "4.7M"}  # on a GPU; and the model that stands for it where both sides are compared in fp32
PTX_LENGTH, PTX_ROWS = 128, 8  # tokens a row, rows an episode: our defaults
THREADS = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}


@dataclass(frozen=True)
class Row:
    """What one line measures."""

    model: str
    measure: str = "update"  # update, decode, memory
    lengths: str = "variable"
    n: int = 1
    epochs: int = 1
    ptx: bool = False
    mode: str = "tuned"
    pairs: int | None = None  # None: as many as the run was asked for
    batch: int | None = None  # None: the model's
    law: bool = False

    @property
    def name(self) -> str:
        parts = [self.model, self.measure, self.lengths, f"n{self.n}", f"e{self.epochs}", "ptx" * self.ptx, self.mode]
        return "/".join(filter(None, parts))

    @property
    def episodes(self) -> int:
        return self.batch or BATCH[self.model]

    @property
    def dtype(self) -> str:
        return DTYPE.get(self.model, "float32")


def plan(models: list[str]) -> list[Row]:
    """Each model's claims, then its growth laws, which are left out where the time is up."""
    rows = []
    for model in models:
        if model == "1.3B":  # a GPU is dear
            fixed = Row(model, lengths="fixed", pairs=2)
            rows += [fixed, replace(fixed, measure="decode"), Row(model, pairs=1)]
            continue
        rows += [
            Row(model, lengths="fixed"),
            Row(model),
            Row(model, n=4),
            Row(model, mode="as_shipped"),
            Row(model, "decode", lengths="fixed"),
        ]
        if model != "4.7M":
            rows.append(Row(model, "memory", lengths="fixed", pairs=1, batch=64 if model == "135M" else 16))
        rows += [Row(model, epochs=4, pairs=1, law=True), Row(model, ptx=True, pairs=1, law=True)]
    return rows


class Session:
    """Both workers with one model loaded, and what this run has found out about it."""

    def __init__(self, model: str, folder: Path, peer_python: str, clock: Clock):
        self.model, self.folder, self.clock = model, folder, clock
        self.pythons = {"ours": sys.executable, "peer": peer_python}
        self.workers: dict[str, Worker] = {}
        self.versions: dict[str, dict] = {}
        self.warm = False
        self.micro: int | None = None
        self.errors: dict[tuple, dict] = {}
        self.tuned: dict[Row, dict] = {}  # what was measured
        self.seconds: dict[str, float] = {}  # of the last plain update, for estimates

    def start(self, *sides: str, model: str | None = None) -> None:
        """Workers with the weights as they are on disk, whatever was trained before. model: another than its own."""
        for side in sides or SIDES:
            if side not in self.workers:
                command = [self.pythons[side], "-W", "ignore", str(HERE / f"ppo_{side}.py")]
                env = THREADS if self.model in COMPARED else THREADS | NO_GPU
                self.workers[side] = Worker(side, command, self.folder / f"{side}.log", env)
                self.versions[side] = self.workers[side].ask("hello")
        dtype = "float32" if model else DTYPE.get(self.model, "float32")
        model = model or self.model
        folder = self.folder / model
        if not (folder / "value_model").is_dir():
            crafted = self.workers["ours"].ask("craft", model=model, folder=str(folder), dtype=dtype)
            self.clock.say(f"{model}: {crafted['parameters']:,} parameters, P(EOS) {crafted['p_eos']}")
        for worker in self.workers.values():
            worker.ask("load", folders={role: str(folder / role) for role in ROLES}, dtype=dtype)

    def stop(self) -> None:
        for worker in self.workers.values():
            worker.close()
        self.workers, self.warm = {}, False

    def expected_minutes(self, row: Row, pairs: int) -> float:
        """By the seconds of the last plain update on either side."""
        ours, peer = self.seconds.get("ours", 0.0), self.seconds.get("peer", 0.0)
        scale = row.episodes / BATCH[row.model] * (1 + 0.6 * (row.epochs - 1)) * (1 + 3 * row.ptx)
        return (row.pairs or pairs) * scale * (ours + peer * (not row.ptx)) / 60

    def our_setup(self, row: Row) -> dict:
        """The workload, and everything else by stages/ppo/run.py's defaults."""
        longest, batch = LONGEST[row.model], row.episodes
        options = {
            "total_episodes": batch,
            "batch_size": batch,
            "mini_batch_size": batch,
            "samples_per_prompt": row.n,
            "num_ppo_epochs": row.epochs,
            "response_length": longest,
            "max_length": max(512, 2 * longest),
            "local_rollout_forward_batch_size": max(64, batch),
        } | ({} if row.ptx else {"ptx_coef": 0.0})
        return self.workers["ours"].ask("setup", options=options, eos_id=eos_of(row.lengths))

    def peer_setup(self, row: Row, micro: int | None) -> dict:
        """trl's options of the workload, one optimizer step a pass; micro None: trl's default."""
        options = {"response_length": LONGEST[row.model], "temperature": 1.0, "num_ppo_epochs": row.epochs}
        return self.workers["peer"].ask(
            "setup", batch_size=row.episodes, eos_id=eos_of(row.lengths), pad_id=PAD, micro=micro, options=options
        )

    def prompts(self, row: Row, seed: int) -> list[list[int]]:
        return prompts(SHAPES[row.model], row.lengths, row.episodes // row.n, LONGEST[row.model], seed)

    def warm_up(self, row: Row) -> None:
        """One small update of a process of ours that has made none (the peer's has, by `check` and `tune`)."""
        if not self.warm:
            few = replace(row, batch=max(MICRO[self.model]), n=1, epochs=1, ptx=False)
            self.our_setup(few)
            self.our_update(few, 3)
            self.our_setup(row)
            self.warm = True

    def our_update(self, row: Row, seed: int, text=None) -> dict:
        return self.workers["ours"].ask("update", prompts=self.prompts(row, seed), text=text)

    def peer_update(self, row: Row, seed: int) -> dict:
        return self.workers["peer"].ask("update", prompts=[p for p in self.prompts(row, seed) for _ in range(row.n)])

    def check(self, row: Row) -> dict:
        """Both sides on the same few episodes, once a workload; an error of more than LIMIT ends the row."""
        key = (row.lengths, row.n)
        if key not in self.errors:
            stand_in = COMPARED.get(self.model)
            few = replace(row, model=stand_in or self.model, epochs=1, ptx=False)
            few = replace(few, batch=max(2, row.n) if self.model == "135M" else 8)
            self.start(model=stand_in)
            self.our_setup(few)
            self.peer_setup(few, few.episodes)
            file = self.folder / "peer.safetensors"
            asked = [p for p in self.prompts(few, 1) for _ in range(row.n)]
            found = self.workers["peer"].ask("numbers", prompts=asked, file=str(file))
            errors = self.workers["ours"].ask(
                "compare", prompts=asked, responses=found["responses"], file=str(file), vf_coef=found["vf_coef"]
            )
            file.unlink()
            worst = max(errors, key=errors.get)
            self.errors[key] = {"max_rel_err": float(f"{errors[worst]:.3g}"), "tensor": worst, "tensors": len(errors)}
            if stand_in:
                self.errors[key]["model"] = stand_in
            self.clock.say(f"{row.name}: equal to {errors[worst]:.2g} in {len(errors)} tensors (worst: {worst})")
        if not self.errors[key]["max_rel_err"] <= LIMIT:
            raise ValueError(f"the two sides do not compute the same ({self.errors[key]}): no ratio")
        return self.errors[key]

    def tune(self, row: Row) -> int:
        """The peer's fastest micro-batch of three, by one update each; once a model."""
        if self.micro is None:
            plain, tried = replace(row, epochs=1, n=1, batch=max(MICRO[self.model]), ptx=False), {}
            for micro in MICRO[self.model]:
                self.peer_setup(plain, micro)
                if self.model in COMPARED and not tried:
                    self.peer_update(plain, 2)  # the first one plans kernels
                tried[micro] = self.peer_update(plain, 2)["seconds"]
            self.micro, self.tried = min(tried, key=tried.get), {str(m): round(s, 2) for m, s in tried.items()}
            self.clock.say(f"{self.model}: the peer's seconds by micro-batch: {self.tried}")
        return self.micro


def measure_update(session: Session, row: Row, pairs: int) -> dict:
    """Samples a second, in turns."""
    equal = session.check(row)
    session.start()
    tuned = row.mode == "tuned"
    config = session.peer_setup(row, session.tune(row) if tuned else None)
    like = session.tuned.get(replace(row, mode="tuned"))
    if tuned:
        config["micro_batches_tried_s"] = session.tried
    elif like is not None and work(config) == work(like["peer_config"]):
        session.clock.say(f"{row.name}: the peer does what it does tuned; that is what was measured")
        return {**like, "peer_config": config | {"measured_as": "tuned"}}
    our_config = session.our_setup(row)
    session.warm_up(row)
    if session.model in COMPARED:  # else `check` has found it out
        our_config["recompute"] = session.workers["ours"].ask("preflight", prompts=session.prompts(row, 4)[:16])
        session.our_update(row, 3)  # on a GPU a process plans its kernels anew for each shape, and a first update
        session.peer_update(row, 3)  # of trl's takes twice the time of a second
    most = session.workers["ours"].ask("ceilings")["flops"]
    ours, peer = run_pairs(
        lambda pair: session.our_update(row, 100 + pair),
        lambda pair: session.peer_update(row, 100 + pair),
        pairs,
        lambda pair, side, found: session.clock.say(
            f"{row.name}: pair {pair + 1} of {pairs}, {SIDES[side]} {found['seconds']:.2f} s"
        ),
    )
    if row.lengths == "variable":
        check_lengths(session, [n for found in (*ours, *peer) for n in found["lengths"]])
    figures = our_figures(session, row, ours, most)
    figures["tokens"]["response_mean"] |= {"peer": mean_length(peer)}
    if row.epochs > 1:
        figures["law"] = epochs_law(session, row, ours)
    seconds = {"ours": median_seconds(ours), "peer": median_seconds(peer)}
    session.seconds = seconds if row.epochs == 1 else session.seconds
    found = {
        "ratio": ratio([b["seconds"] / a["seconds"] for a, b in zip(ours, peer, strict=True)]),
        "equal_math": equal,
        "seconds": seconds,
        "phases_s": {"ours": middle([x["phases"] for x in ours]), "peer": middle([x["phases"] for x in peer])},
        **figures,
        "peak_bytes": {
            side: max(x["peak_bytes"] for x in found) for side, found in zip(SIDES, (ours, peer), strict=True)
        },
        "our_config": our_config,
        "peer_config": config,
    }
    if tuned:
        session.tuned[row] = found
    return found


def work(config: dict) -> dict:
    """What decides the time of one of the peer's updates, of its settings as they really are."""
    really = {key: config[key]["really"] for key in ("bf16", "gradient_checkpointing")}
    sizes = ("per_device_train_batch_size", "gradient_accumulation_steps", "local_rollout_forward_batch_size")
    return really | {key: config[key] for key in (*sizes, "dtype", "attention", "optimizer")}


def median_seconds(found: list[dict]) -> float:
    return round(statistics.median(x["seconds"] for x in found), 3)


def mean_length(found: list[dict]) -> float:
    return round(statistics.mean(n for x in found for n in x["lengths"]), 2)


def check_lengths(session: Session, lengths: list[int]) -> None:
    """Responses are on average as long as a geometric law with P_EOS, cut off, makes them; else a ValueError."""
    expected = (1 - (1 - P_EOS) ** LONGEST[session.model]) / P_EOS
    found, error = statistics.mean(lengths), statistics.stdev(lengths) / len(lengths) ** 0.5
    if abs(found - expected) > 5 * error:
        raise ValueError(f"responses have {found:.1f} ± {error:.1f} tokens, and should have {expected:.1f}: no ratio")


def our_figures(session: Session, row: Row, ours: list[dict], most: float) -> dict:
    """Tokens through the trunks against those that were needed, and necessary FLOP/s against a matrix product's: of
    the whole (ceiling_fraction), and of the update with its optimizer alone (update_mfu)."""
    shape, real, fractions, updates = SHAPES[session.model], [], [], []
    for pair, found in enumerate(ours):
        sizes = [len(p) for p in session.prompts(row, 100 + pair)]
        groups = [(size, found["lengths"][i * row.n : (i + 1) * row.n]) for i, size in enumerate(sizes)]
        tokens = sum(size + sum(lengths) for size, lengths in groups)
        real.append((4 + 2 * row.epochs) * tokens - row.episodes)  # the sampler need not read what it drew last
        flops = necessary_flops(shape, groups, row.epochs)
        fractions.append(flops["all"] / found["seconds"] / most)
        updates.append(flops["update"] / (found["phases"]["update"] + found["phases"]["optimizer"]) / most)
    return {
        "tokens": {
            "processed": round(statistics.median(x["tokens"] for x in ours)) if row.model not in COMPARED else None,
            "real": round(statistics.median(real)),
            "response_mean": {"ours": mean_length(ours)},
        },
        "ceiling_fraction": round(statistics.median(fractions), 4),
        "update_mfu": round(statistics.median(updates), 4),
        "matmul_gflops": round(most / 1e9, 1),
    }


def epochs_law(session: Session, row: Row, ours: list[dict]) -> dict:
    """Update time of `epochs` passes over that of as many updates with one."""
    once = replace(row, epochs=1)
    session.our_setup(once)
    learning = lambda found: found["phases"]["update"] + found["phases"]["optimizer"]  # noqa: E731
    one, several = learning(session.our_update(once, 100)), learning(ours[0])
    return {
        "update_s": {"1": round(one, 3), str(row.epochs): round(several, 3)},
        "linear": several / (row.epochs * one),
    }


def measure_ptx(session: Session, row: Row, _) -> dict:
    """Ours alone (the peer has no ptx): its seconds over those of as many tokens of plain language modelling."""
    session.start()
    session.our_setup(row)
    session.warm_up(row)
    vocabulary = SHAPES[session.model]["vocab_size"]
    rows = PTX_ROWS * row.episodes
    text = prompts({"vocab_size": vocabulary}, "fixed", rows, PTX_LENGTH, 5)
    few, cost = text[:32], lambda: session.workers["ours"].ask("sft_cost", text=few, micro=16)
    before = cost()
    found = session.our_update(row, 100, text)
    a_token = (min(before, cost()) + cost()) / 2
    spent = found["phases"]["ptx"]
    law = {"ptx_s": spent, "ptx_tokens": rows * PTX_LENGTH, "sft_s_a_token": a_token}
    return {
        "ratio": None,
        "seconds": {"ours": round(found["seconds"], 3)},
        "phases_s": {"ours": middle([found["phases"]])},
        "peer": None,
        "law": law | {"over_sft": round(spent / (rows * PTX_LENGTH * a_token), 3)},
        "peak_bytes": {"ours": found["peak_bytes"]},
    }


def measure_decode(session: Session, row: Row, pairs: int) -> dict:
    """Tokens a second after the prompt, our sampler against transformers' generate in the same process."""
    session.start()
    session.our_setup(row)
    length, worker = LONGEST[session.model], session.workers["ours"]

    def decode(engine: str, pair: int) -> dict:
        asked = {"prompts": session.prompts(row, 200 + pair), "engine": engine, "seed": pair}
        first = worker.ask("decode", length=1, **asked)
        return {"seconds": worker.ask("decode", length=length, **asked) - first, "prefill": first}

    for engine in ("ours", "generate"):
        warm = length if session.model in COMPARED else 4  # a GPU's kernels are planned for each length of the cache
        worker.ask("decode", length=warm, prompts=session.prompts(row, 3), engine=engine, seed=0)
    ours, peer = run_pairs(
        lambda pair: decode("ours", pair),
        lambda pair: decode("generate", pair),
        pairs,
        lambda pair, side, found: session.clock.say(
            f"{row.name}: pair {pair + 1} of {pairs}, {('ours', 'generate')[side]} {found['seconds']:.2f} s"
        ),
    )
    equal = worker.ask("compare_decoding", prompts=session.prompts(row, 5)[:4])
    if row.dtype == "float32" and not equal <= LIMIT:
        raise ValueError(f"the sampler's log-probs are not those of generate's model ({equal}): no ratio")
    a_second = lambda found: round(row.episodes * (length - 1) / median_seconds(found), 1)  # noqa: E731
    prefill = lambda found: round(statistics.median(x["prefill"] for x in found), 4)  # noqa: E731
    sides = list(zip(SIDES, (ours, peer), strict=True))
    most = worker.ask("ceilings")["bytes"]
    sizes, width = [len(p) for p in session.prompts(row, 200)], 2 if row.dtype == "bfloat16" else 4
    least = decode_bytes(SHAPES[session.model], sizes, length, width) / most
    return {
        "ratio": ratio([b["seconds"] / a["seconds"] for a, b in zip(ours, peer, strict=True)]),
        "tokens_per_s": {side: a_second(found) for side, found in sides},
        "phases_s": {side: {"prefill": prefill(found), "decode": median_seconds(found)} for side, found in sides},
        "roofline_fraction": {side: round(least / median_seconds(found), 4) for side, found in sides},
        "copy_gbytes_per_s": round(most / 1e9, 1),
        "equal_math": {"max_rel_err": equal},
        "peer": f"transformers {session.versions['ours']['transformers']} generate",
    }


def measure_memory(session: Session, row: Row, _) -> dict:
    """Most resident bytes of one update, weights and optimizer included; each side alone, in a fresh process."""
    session.start()
    equal, micro = session.check(row), session.tune(row)
    found, config = {}, None
    for side in SIDES:
        session.stop()
        session.start(side)
        if side == "ours":
            our_config = session.our_setup(row)
            found[side] = session.our_update(row, 100)
        else:
            config = session.peer_setup(row, micro)
            found[side] = session.peer_update(row, 100)
        session.clock.say(f"{row.name}: {side} {found[side]['peak_bytes'] / 2**30:.2f} GiB")
    session.stop()
    peaks = {side: x["peak_bytes"] for side, x in found.items()}
    return {
        "ratio": ratio([peaks["ours"] / peaks["peer"]]),
        "equal_math": equal,
        "seconds": {side: round(x["seconds"], 3) for side, x in found.items()},
        "phases_s": {side: middle([x["phases"]]) for side, x in found.items()},
        "peak_bytes": peaks,
        "our_config": our_config,
        "peer_config": config,
    }


def measure(session: Session, row: Row, pairs: int) -> dict:
    kinds = {"update": measure_ptx if row.ptx else measure_update, "decode": measure_decode, "memory": measure_memory}
    found = kinds[row.measure](session, row, row.pairs or pairs)
    peer = found.pop("peer", f"trl {session.versions['peer']['trl']}")
    return {
        "bench": "ppo",
        "measure": row.measure,
        "model": row.model,
        "lengths": row.lengths,
        "batch": row.episodes,
        "n": row.n,
        "epochs": row.epochs,
        "ptx": row.ptx,
        "dtype": row.dtype,
        "peer": peer,
        "mode": row.mode,
        **found,
        "threads": session.versions["ours"]["threads"],
        "versions": session.versions,
        **stamp(),
    }


def peer_python(clock: Clock) -> str:
    """The peer's interpreter; its environment is made (pip) if there is none."""
    if "PEER_PYTHON" in os.environ:
        return os.environ["PEER_PYTHON"]
    folder = ROOT / ".venv-trl112"
    python = folder / "bin" / "python"
    if not (folder / ".installed").exists():
        clock.say(f"making {folder.name} with {PEER}")
        pins = (ROOT / "constraints.txt").read_text().splitlines()
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
            constraints.write("\n".join(line for line in pins if not line.startswith("trl==")))
            constraints.flush()
            torch = next(line for line in pins if line.startswith("torch=="))  # first: see the Makefile's `setup`
            for what in ([torch], [PEER, "transformers", "accelerate", "datasets"]):
                command = [python, "-m", "pip", "install", "-q", "-c", constraints.name, *what]
                subprocess.run(command, check=True, stdout=sys.stderr)
        (folder / ".installed").touch()
    return str(python)


def main() -> int:
    open_session = lambda model, folder, clock: Session(model, folder, peer_python(clock), clock)  # noqa: E731
    models = ["4.7M", "135M", *(COMPARED if torch.cuda.is_available() else ())]
    return run_bench("ppo", __doc__, models, 80.0, KEY, plan, open_session, measure)


if __name__ == "__main__":
    sys.exit(main())
