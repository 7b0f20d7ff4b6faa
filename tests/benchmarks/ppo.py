"""Measure PPO against trl 1.12.0: samples a second, decoding, peak memory, growth laws.

    python tests/benchmarks/ppo.py [--only 4.7M/update …] [--pairs 5] [--minutes 80] [--quick]

Also `make bench BENCH=ppo`. Prints one JSON line for each row as soon as it is measured and keeps
it in results/ppo.jsonl (one line a key, replaced by each run). Two long-lived workers, ppo_ours.py
and ppo_peer.py, measure a row in turns (pairs.py) on the same prompts, weights (ppo_models.py),
threads and number of optimizer steps. `ratio` is ours over the peer's: samples a second, tokens a
second, or bytes at the peak. `seconds` is the wall's clock, `cpu_seconds` that of the process on
all its cores. `collections` says how often trl calls gc.collect and torch.cuda.empty_cache in an
update and what that takes; it is part of its time, and `ratio_without_collections` leaves it out.
Before a ratio is measured, both sides compute the same few episodes, and must agree to 1e-3 in
every log-probability, value, score and gradient.

In mode `tuned` the peer runs without checkpointing, in the fastest of three micro-batches tried in
this run (once for each model). In mode `as_shipped` it has trl's defaults except for the workload;
if that amounts to the same work as `tuned`, it is not measured again. Our side has its defaults.
The peer's environment is created if a row needs it and it is missing; PEER_PYTHON names another
one. Decoding and ptx need none.

If torch sees a GPU there are also rows of a 1.3B model on it (--only 1.3B): prompts and responses
of 512 tokens, batch 128, bfloat16 products (the peer's weights are bfloat16; ours stay fp32, with
autocast). Both sides sample the whole batch at once, and their equality is checked in fp32 on the
4.7M model. All other rows stay on the CPU.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pairs import NO_GPU, Clock, Worker, medians, ratio, run_bench, run_pairs, stamp
from ppo_models import P_EOS, PAD, SHAPES, decode_bytes, eos_of, necessary_flops, prompts

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PEER = "trl==1.12.0"
KEY = ("bench", "measure", "model", "lengths", "n", "epochs", "ptx", "dtype", "peer", "mode")
SIDES = ("ours", "peer")
ROLES = ("policy", "ref_policy", "reward_model", "value_model")
LIMIT = 1e-3
"""Largest relative error for which a ratio is printed."""
BATCH = {"4.7M": 32, "135M": 16, "1.3B": 128, "quick": 8}
"""Episodes of an update."""
MICRO = {"4.7M": (8, 16, 32), "135M": (2, 4, 8), "1.3B": (2, 4, 8), "quick": (2, 4, 8)}
"""Micro-batches to try for the peer."""
LONGEST = {"4.7M": 128, "135M": 128, "1.3B": 512, "quick": 32}
"""Maximum tokens of a prompt, and of a response."""
DTYPE = {"1.3B": "bfloat16"}
"""Data type of products; float32 for the other models."""
COMPARED = {"1.3B": "4.7M"}
"""Model on the GPU → the model that stands in for it when both sides are compared in fp32."""
PTX_LENGTH, PTX_ROWS = 128, 8
"""Tokens of a row, and rows for each episode: our defaults."""
THREADS = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}


@dataclass(frozen=True)
class Row:
    """Describe what one line measures."""

    model: str
    """A name of SHAPES."""
    measure: str = "update"
    """update, decode or memory."""
    lengths: str = "variable"
    """fixed or variable lengths of prompts and responses."""
    n: int = 1
    """Samples of each prompt."""
    epochs: int = 1
    """Passes over the batch."""
    ptx: bool = False
    """Whether pretraining gradients are mixed in."""
    mode: str = "tuned"
    """tuned or as_shipped."""
    pairs: int | None = None
    """Number of pairs; None: as many as the command line asks for."""
    batch: int | None = None
    """Episodes of an update; None: the model's entry in BATCH."""
    law: bool = False
    """Whether this is a growth law, which is skipped when the time is up."""

    @property
    def name(self) -> str:
        """Return the name of the row for --only and messages."""
        parts = [self.model, self.measure, self.lengths, f"n{self.n}", f"e{self.epochs}"]
        if self.ptx:
            parts.append("ptx")
        return "/".join([*parts, self.mode])

    @property
    def episodes(self) -> int:
        """Return the number of episodes of an update."""
        return self.batch or BATCH[self.model]

    @property
    def dtype(self) -> str:
        """Return the data type of products."""
        return DTYPE.get(self.model, "float32")


def plan(models: list[str]) -> list[Row]:
    """Return the rows of each model: its ratios, then its growth laws."""
    rows = []
    for model in models:
        if model == "1.3B":  # time on a GPU is expensive
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
    """Hold both workers with one model loaded, and what this run has learnt about it."""

    def __init__(self, model: str, folder: Path, clock: Clock):
        """Prepare a session; workers start, and the peer's environment is made, when needed.

        Args:
            model: Name of the model.
            folder: Scratch folder.
            clock: Prints progress.
        """
        self.model, self.folder, self.clock = model, folder, clock
        self.workers: dict[str, Worker] = {}
        self.versions: dict[str, dict] = {}
        self.warm = False
        self.micro: int | None = None  # the peer's fastest micro-batch
        self.tried: dict[str, float] = {}  # micro-batch → the peer's seconds
        self.errors: dict[tuple, dict] = {}
        self.tuned: dict[Row, dict] = {}  # figures of the rows measured in mode `tuned`
        self.seconds: dict[str, float] = {}  # of the last update with one epoch, for estimates

    def start(self, *sides: str, model: str | None = None) -> None:
        """Load the initial weights in the workers, whatever was trained before.

        Args:
            *sides: The sides to start; both if none is given.
            model: Another model than the session's own.
        """
        for side in sides or SIDES:
            if side not in self.workers:
                python = sys.executable if side == "ours" else peer_python(self.clock)
                command = [python, "-W", "ignore", str(HERE / f"ppo_{side}.py")]
                env = THREADS if self.model in COMPARED else THREADS | NO_GPU
                self.workers[side] = Worker(side, command, self.folder / f"{side}.log", env)
                self.versions[side] = self.workers[side].ask("hello")
        dtype = "float32" if model else DTYPE.get(self.model, "float32")
        model = model or self.model
        folder = self.folder / model
        if not (folder / "value_model").is_dir():
            models = self.workers["ours"].ask("craft", model=model, folder=str(folder), dtype=dtype)
            self.clock.say(f"{model}: {models['parameters']:,} parameters, P(EOS) {models['p_eos']}")
        for worker in self.workers.values():
            worker.ask("load", folders={role: str(folder / role) for role in ROLES}, dtype=dtype)

    def stop(self) -> None:
        """End the workers."""
        for worker in self.workers.values():
            worker.close()
        self.workers, self.warm = {}, False

    def expected_minutes(self, row: Row, pairs: int) -> float:
        """Estimate the minutes of a row from the last update with one epoch on either side."""
        ours, peer = self.seconds.get("ours", 0.0), self.seconds.get("peer", 0.0)
        scale = row.episodes / BATCH[row.model] * (1 + 0.6 * (row.epochs - 1))
        if row.ptx:  # ours only, since the peer has no ptx
            scale, peer = 4 * scale, 0.0
        return (row.pairs or pairs) * scale * (ours + peer) / 60

    def our_setup(self, row: Row) -> dict:
        """Set up our side: the workload of the row, and otherwise the defaults of the stage ppo."""
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
        }
        if not row.ptx:
            options["ptx_coef"] = 0.0
        return self.workers["ours"].ask("setup", options=options, eos_id=eos_of(row.lengths))

    def peer_setup(self, row: Row, micro: int | None) -> dict:
        """Set up the peer: the workload of the row, one optimizer step an epoch.

        Args:
            row: The row to measure.
            micro: Episodes of a micro-batch; None: trl's default.

        Returns:
            trl's settings as they really are.
        """
        options = {"response_length": LONGEST[row.model], "temperature": 1.0, "num_ppo_epochs": row.epochs}
        return self.workers["peer"].ask(
            "setup", batch_size=row.episodes, eos_id=eos_of(row.lengths), pad_id=PAD, micro=micro, options=options
        )

    def prompts(self, row: Row, seed: int) -> list[list[int]]:
        """Draw the prompts of an update, each once."""
        return prompts(SHAPES[row.model], row.lengths, row.episodes // row.n, LONGEST[row.model], seed)

    def warm_up(self, row: Row) -> None:
        """Run one small update in a new process of ours.

        The peer has already run some, in `check` and `tune`.
        """
        if not self.warm:
            few = replace(row, batch=max(MICRO[self.model]), n=1, epochs=1, ptx=False)
            self.our_setup(few)
            self.our_update(few, 3)
            self.our_setup(row)
            self.warm = True

    def our_update(self, row: Row, seed: int, text: list[list[int]] | None = None) -> dict:
        """Measure one update of ours on the prompts of `seed`, with rows of `text` for ptx."""
        return self.workers["ours"].ask("update", prompts=self.prompts(row, seed), text=text)

    def peer_update(self, row: Row, seed: int) -> dict:
        """Measure one update of the peer."""
        repeated = [p for p in self.prompts(row, seed) for _ in range(row.n)]
        return self.workers["peer"].ask("update", prompts=repeated)

    def check(self, row: Row) -> dict:
        """Check that both sides compute the same on a few episodes, once for each workload.

        Args:
            row: The row to measure.

        Returns:
            The largest relative error, its tensor, and the number of tensors.

        Raises:
            ValueError: An error is above LIMIT.
        """
        key = (row.lengths, row.n)
        if key not in self.errors:
            stand_in = COMPARED.get(self.model)
            few = replace(row, model=stand_in or self.model, epochs=1, ptx=False)
            few = replace(few, batch=max(2, row.n) if self.model == "135M" else 8)
            self.start(model=stand_in)
            self.our_setup(few)
            self.peer_setup(few, few.episodes)
            file = self.folder / "peer.safetensors"
            repeated = [p for p in self.prompts(few, 1) for _ in range(row.n)]
            answer = self.workers["peer"].ask("numbers", prompts=repeated, file=str(file))
            errors = self.workers["ours"].ask(
                "compare", prompts=repeated, responses=answer["responses"], file=str(file), vf_coef=answer["vf_coef"]
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
        """Return the peer's fastest micro-batch of three by one update each, once a model."""
        if self.micro is None:
            plain, tried = replace(row, epochs=1, n=1, batch=max(MICRO[self.model]), ptx=False), {}
            for micro in MICRO[self.model]:
                self.peer_setup(plain, micro)
                if self.model in COMPARED and not tried:
                    self.peer_update(plain, 2)  # the first update plans kernels
                tried[micro] = self.peer_update(plain, 2)["seconds"]
            self.micro, self.tried = min(tried, key=tried.get), {str(m): round(s, 2) for m, s in tried.items()}
            self.clock.say(f"{self.model}: the peer's seconds by micro-batch: {self.tried}")
        return self.micro


def measure_update(session: Session, row: Row, pairs: int) -> dict:
    """Measure the samples a second of both sides in turns; return the figures of the line."""
    equal = session.check(row)
    session.start()
    tuned = row.mode == "tuned"
    config = session.peer_setup(row, session.tune(row) if tuned else None)
    as_tuned = session.tuned.get(replace(row, mode="tuned"))
    if tuned:
        config["micro_batches_tried_s"] = session.tried
    elif as_tuned is not None and work(config) == work(as_tuned["peer_config"]):
        session.clock.say(f"{row.name}: the peer does the same work as when tuned; that measurement is used")
        return {**as_tuned, "peer_config": config | {"measured_as": "tuned"}}
    our_config = session.our_setup(row)
    session.warm_up(row)
    if session.model in COMPARED:  # `check` has done this for the other models
        our_config["recompute"] = session.workers["ours"].ask("preflight", prompts=session.prompts(row, 4)[:16])
        # On a GPU a process plans its kernels again for each shape, and trl's first update takes
        # twice the time of its second.
        session.our_update(row, 3)
        session.peer_update(row, 3)
    peak_flops = session.workers["ours"].ask("ceilings")["flops"]
    ours, peer = run_pairs(
        lambda pair: session.our_update(row, 100 + pair),
        lambda pair: session.peer_update(row, 100 + pair),
        pairs,
        lambda pair, side, answer: session.clock.say(
            f"{row.name}: pair {pair + 1} of {pairs}, {SIDES[side]} {answer['seconds']:.2f} s"
        ),
    )
    if row.lengths == "variable":
        check_lengths(session, [n for answer in (*ours, *peer) for n in answer["lengths"]])
    figures = our_figures(session, row, ours, peak_flops)
    figures["tokens"]["response_mean"] |= {"peer": mean_length(peer)}
    if row.epochs > 1:
        figures["law"] = epochs_law(session, row, ours)
    seconds, cpu_seconds = (
        {"ours": median_seconds(ours, clock), "peer": median_seconds(peer, clock)}
        for clock in ("seconds", "cpu_seconds")
    )
    if row.epochs == 1:
        session.seconds = seconds
    line = {
        "ratio": ratio([b["seconds"] / a["seconds"] for a, b in zip(ours, peer, strict=True)]),
        "equal_math": equal,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "phases_s": {"ours": medians([x["phases"] for x in ours]), "peer": medians([x["phases"] for x in peer])},
        "collections": medians([x["collections"] for x in peer]),
        "ratio_without_collections": ratio(
            [(b["seconds"] - b["collections"]["seconds"]) / a["seconds"] for a, b in zip(ours, peer, strict=True)]
        ),
        **figures,
        "peak_bytes": {
            side: max(x["peak_bytes"] for x in answers) for side, answers in zip(SIDES, (ours, peer), strict=True)
        },
        "our_config": our_config,
        "peer_config": config,
    }
    if tuned:
        session.tuned[row] = line
    return line


def work(config: dict) -> dict:
    """Return the settings of the peer, as they really are, that decide the time of an update."""
    effective = {key: config[key]["really"] for key in ("bf16", "gradient_checkpointing")}
    sizes = ("per_device_train_batch_size", "gradient_accumulation_steps", "local_rollout_forward_batch_size")
    return effective | {key: config[key] for key in (*sizes, "dtype", "attention", "optimizer")}


def median_seconds(answers: list[dict], clock: str = "seconds") -> float:
    """Return the median of the answers' seconds by one of both clocks."""
    return round(statistics.median(x[clock] for x in answers), 3)


def mean_length(answers: list[dict]) -> float:
    """Return the mean length of the responses in all answers."""
    return round(statistics.mean(n for x in answers for n in x["lengths"]), 2)


def check_lengths(session: Session, lengths: list[int]) -> None:
    """Check that the mean length of responses is that of a geometric law with P_EOS, cut off.

    Raises:
        ValueError: The mean is more than 5 standard errors off.
    """
    expected = (1 - (1 - P_EOS) ** LONGEST[session.model]) / P_EOS
    mean, error = statistics.mean(lengths), statistics.stdev(lengths) / len(lengths) ** 0.5
    if abs(mean - expected) > 5 * error:
        raise ValueError(f"responses have {mean:.1f} ± {error:.1f} tokens instead of {expected:.1f}: no ratio")


def our_figures(session: Session, row: Row, ours: list[dict], peak_flops: float) -> dict:
    """Compare our tokens and FLOP/s with what is necessary and possible.

    Args:
        session: The session.
        row: The row measured.
        ours: Our answers, one for each pair.
        peak_flops: FLOP/s of a matrix product.

    Returns:
        "tokens": through the trunks, and how many were necessary; "ceiling_fraction": necessary
        FLOP/s of the whole update over `peak_flops`; "update_mfu": the same of gradients and
        optimizer only.
    """
    shape, necessary, fractions, update_fractions = SHAPES[session.model], [], [], []
    for pair, answer in enumerate(ours):
        sizes = [len(p) for p in session.prompts(row, 100 + pair)]
        groups = [(size, answer["lengths"][i * row.n : (i + 1) * row.n]) for i, size in enumerate(sizes)]
        tokens = sum(size + sum(lengths) for size, lengths in groups)
        # The sampler does not have to read the last token of an episode.
        necessary.append((4 + 2 * row.epochs) * tokens - row.episodes)
        flops = necessary_flops(shape, groups, row.epochs)
        fractions.append(flops["all"] / answer["seconds"] / peak_flops)
        update_fractions.append(
            flops["update"] / (answer["phases"]["update"] + answer["phases"]["optimizer"]) / peak_flops
        )
    return {
        "tokens": {
            "processed": round(statistics.median(x["tokens"] for x in ours)) if row.model not in COMPARED else None,
            "real": round(statistics.median(necessary)),
            "response_mean": {"ours": mean_length(ours)},
        },
        "ceiling_fraction": round(statistics.median(fractions), 4),
        "update_mfu": round(statistics.median(update_fractions), 4),
        "matmul_gflops": round(peak_flops / 1e9, 1),
    }


def epochs_law(session: Session, row: Row, ours: list[dict]) -> dict:
    """Compare the time of several passes over a batch with that of as many one-pass updates.

    Args:
        session: The session.
        row: The row measured, with several epochs.
        ours: Our answers to it.

    Returns:
        "update_s": seconds by number of epochs; "linear": several epochs over as many single ones.
    """
    once = replace(row, epochs=1)
    session.our_setup(once)

    def learning(answer: dict) -> float:
        return answer["phases"]["update"] + answer["phases"]["optimizer"]

    one, several = learning(session.our_update(once, 100)), learning(ours[0])
    return {
        "update_s": {"1": round(one, 3), str(row.epochs): round(several, 3)},
        "linear": several / (row.epochs * one),
    }


def measure_ptx(session: Session, row: Row, _: int) -> dict:
    """Measure the cost of ptx against plain language modelling on as many tokens.

    Only our side is measured, because the peer has no ptx.
    """
    session.start("ours")
    session.our_setup(row)
    session.warm_up(row)
    vocabulary = SHAPES[session.model]["vocab_size"]
    rows = PTX_ROWS * row.episodes
    text = prompts({"vocab_size": vocabulary}, "fixed", rows, PTX_LENGTH, 5)

    def sft_cost() -> float:
        return session.workers["ours"].ask("sft_cost", text=text[:32], micro=16)

    before = sft_cost()
    update = session.our_update(row, 100, text)
    seconds_per_token = (min(before, sft_cost()) + sft_cost()) / 2
    ptx_seconds = update["phases"]["ptx"]
    law = {"ptx_s": ptx_seconds, "ptx_tokens": rows * PTX_LENGTH, "sft_s_a_token": seconds_per_token}
    return {
        "ratio": None,
        "seconds": {"ours": round(update["seconds"], 3)},
        "cpu_seconds": {"ours": round(update["cpu_seconds"], 3)},
        "phases_s": {"ours": medians([update["phases"]])},
        "peer": None,
        "law": law | {"over_sft": round(ptx_seconds / (rows * PTX_LENGTH * seconds_per_token), 3)},
        "peak_bytes": {"ours": update["peak_bytes"]},
    }


def measure_decode(session: Session, row: Row, pairs: int) -> dict:
    """Measure decoding: tokens a second after the prefill.

    Our sampler and transformers' generate run in turns in the same process.
    """
    session.start("ours")
    session.our_setup(row)
    length, worker = LONGEST[session.model], session.workers["ours"]

    def decode(engine: str, pair: int) -> dict:
        arguments = {"prompts": session.prompts(row, 200 + pair), "engine": engine, "seed": pair}
        prefill = worker.ask("decode", length=1, **arguments)
        return {"seconds": worker.ask("decode", length=length, **arguments) - prefill, "prefill": prefill}

    for engine in ("ours", "generate"):
        # A GPU's kernels are planned for each length of the cache.
        warm_up_length = length if session.model in COMPARED else 4
        worker.ask("decode", length=warm_up_length, prompts=session.prompts(row, 3), engine=engine, seed=0)
    ours, peer = run_pairs(
        lambda pair: decode("ours", pair),
        lambda pair: decode("generate", pair),
        pairs,
        lambda pair, side, answer: session.clock.say(
            f"{row.name}: pair {pair + 1} of {pairs}, {('ours', 'generate')[side]} {answer['seconds']:.2f} s"
        ),
    )
    equal = worker.ask("compare_decoding", prompts=session.prompts(row, 5)[:4])
    if row.dtype == "float32" and not equal <= LIMIT:
        raise ValueError(f"the sampler's log-probabilities differ from those of generate's model ({equal}): no ratio")

    def tokens_per_second(answers: list[dict]) -> float:
        return round(row.episodes * (length - 1) / median_seconds(answers), 1)

    def prefill(answers: list[dict]) -> float:
        return round(statistics.median(x["prefill"] for x in answers), 4)

    sides = list(zip(SIDES, (ours, peer), strict=True))
    peak_bytes_per_s = worker.ask("ceilings")["bytes"]
    sizes, width = [len(p) for p in session.prompts(row, 200)], 2 if row.dtype == "bfloat16" else 4
    least_seconds = decode_bytes(SHAPES[session.model], sizes, length, width) / peak_bytes_per_s
    return {
        "ratio": ratio([b["seconds"] / a["seconds"] for a, b in zip(ours, peer, strict=True)]),
        "tokens_per_s": {side: tokens_per_second(answers) for side, answers in sides},
        "phases_s": {side: {"prefill": prefill(answers), "decode": median_seconds(answers)} for side, answers in sides},
        "roofline_fraction": {side: round(least_seconds / median_seconds(answers), 4) for side, answers in sides},
        "copy_gbytes_per_s": round(peak_bytes_per_s / 1e9, 1),
        "equal_math": {"max_rel_err": equal},
        "peer": f"transformers {session.versions['ours']['transformers']} generate",
    }


def measure_memory(session: Session, row: Row, _: int) -> dict:
    """Measure the peak memory of one update, weights and optimizer included.

    Each side runs by itself in a fresh process.
    """
    session.start()
    equal, micro = session.check(row), session.tune(row)
    answers, config = {}, None
    for side in SIDES:
        session.stop()
        session.start(side)
        if side == "ours":
            our_config = session.our_setup(row)
            answers[side] = session.our_update(row, 100)
        else:
            config = session.peer_setup(row, micro)
            answers[side] = session.peer_update(row, 100)
        session.clock.say(f"{row.name}: {side} {answers[side]['peak_bytes'] / 2**30:.2f} GiB")
    session.stop()
    peaks = {side: x["peak_bytes"] for side, x in answers.items()}
    return {
        "ratio": ratio([peaks["ours"] / peaks["peer"]]),
        "equal_math": equal,
        "seconds": {side: round(x["seconds"], 3) for side, x in answers.items()},
        "phases_s": {side: medians([x["phases"]]) for side, x in answers.items()},
        "peak_bytes": peaks,
        "our_config": our_config,
        "peer_config": config,
    }


def measure(session: Session, row: Row, pairs: int) -> dict:
    """Measure a row and return its line."""
    measure_row = {"update": measure_update, "decode": measure_decode, "memory": measure_memory}[row.measure]
    if row.ptx:
        measure_row = measure_ptx
    figures = measure_row(session, row, row.pairs or pairs)
    peer = figures.pop("peer") if "peer" in figures else f"trl {session.versions['peer']['trl']}"
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
        **figures,
        "threads": session.versions["ours"]["threads"],
        "versions": session.versions,
        **stamp(),
    }


def peer_python(clock: Clock) -> str:
    """Return the interpreter of the peer's environment, creating it with pip if there is none.

    PEER_PYTHON names another interpreter.
    """
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
            torch = next(line for line in pins if line.startswith("torch=="))  # first, as in the Makefile's `setup`
            for packages in ([torch], [PEER, "transformers", "accelerate", "datasets"]):
                command = [python, "-m", "pip", "install", "-q", "-c", constraints.name, *packages]
                subprocess.run(command, check=True, stdout=sys.stderr)
        (folder / ".installed").touch()
    return str(python)


def main() -> int:
    """Run the benchmark and return the exit code."""
    models = ["4.7M", "135M"]
    if torch.cuda.is_available():
        models += COMPARED
    return run_bench("ppo", __doc__, models, minutes=80.0, key=KEY, plan=plan, open_session=Session, measure=measure)


if __name__ == "__main__":
    sys.exit(main())
