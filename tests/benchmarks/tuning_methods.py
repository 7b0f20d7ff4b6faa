"""Compare all tuning methods on one model: parameters, memory, seconds a step, held-out loss.

    python tests/benchmarks/tuning_methods.py [--methods full lora …] [--stages sft dpo]
        [--seeds 1 2 3] [--steps 48] [key=value …]

Settings and data are those of configs/smollm2.yaml (SmolLM2-135M), with `key=value` on top. sft
starts from base, dpo from one sft model a seed, the same for all methods. A soft prompt has a base
of its own, to which its tokens have been added. Every run is a process of its own and takes the
same number of steps; held-out losses are those before the first and after the last. A step's
processor time is that of 4 rows of 64 tokens on one copy of the model (lines have the time that
passed in training too, which depends on what else the machine does).

Learning rates: each family of methods has three (`FAMILIES`; for dpo a tenth of them). All its
methods take the one that serves its first method best, by the held-out loss of runs of half as many
steps on another seed (--choice-seed). A rate at the edge of its family is marked in the table.
--middle takes the second of the three unseen, which saves these runs.

--times measures a step's processor time again, in every line of these methods, stages and seeds:
this takes half a minute a method, so that a quiet machine can give all of them under one load.

Prints one JSON object for each run, then a Markdown table for each stage with means over seeds and
95 % intervals (Student's t over seeds). Lines are kept in results/tuning_methods.jsonl; a run whose
line is there is not repeated, so the command resumes after an interruption and prints the table of
existing results. All methods of a seed are run before the next seed. Of a method that cannot train
here a line says why, and it is tried again. Artifacts of runs are removed once their line is kept;
those that they start from stay in NAME-seed1 and so on.
"""

import json
import os
import shutil
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, not an installed copy

from sweeps.estimates import over_seeds
from sweeps.points import commit_of, provenance, save_rows
from sweeps.runner import make_parser, parse_arguments, run_command
from sweeps.text import markdown, with_interval

from pipeline.errors import Interrupted, UserError
from pipeline.record import git_state
from pipeline.stage import StopFlag
from pipeline.store.artifacts import ArtifactStore, now

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CONFIG = ROOT / "configs" / "smollm2.yaml"
RESULTS = "tuning_methods.jsonl"

FAMILIES = {
    "all weights": (1e-5, 3e-5, 1e-4),
    "low rank": (1e-4, 3e-4, 1e-3),
    "vectors": (1e-3, 1e-2, 3e-2),
    "networks": (1e-4, 3e-4, 1e-3),
    "modules": (1e-4, 3e-4, 1e-3),
}
"""Family of methods → the learning rates that are tried for sft."""
OF_STAGE = {"sft": 1.0, "dpo": 0.1}
"""Stage → what its rates are, relative to `FAMILIES`."""
METHODS = {
    "full": ("all weights", "full"),
    "lora": ("low rank", "{method: lora}"),
    "rslora": ("low rank", "{method: lora, use_rslora: true}"),
    "pissa": ("low rank", "{method: lora, init_lora_weights: pissa}"),
    "olora": ("low rank", "{method: lora, init_lora_weights: olora}"),
    "dora": ("low rank", "{method: dora}"),
    "adalora": ("low rank", "{method: adalora}"),
    "qlora": ("low rank", "{method: qlora}"),
    "prompt_tuning": ("vectors", "{method: prompt_tuning}"),
    "ia3": ("vectors", "{method: ia3}"),
    "bitfit": ("vectors", "{method: bitfit}"),
    "prefix_tuning": ("vectors", "{method: prefix_tuning}"),
    "p_tuning": ("networks", "{method: p_tuning}"),
    "prefix_tuning, MLP": ("networks", "{method: prefix_tuning, prefix_projection: true}"),
    "houlsby": ("modules", "{method: houlsby}"),
    "pfeiffer": ("modules", "{method: pfeiffer}"),
    "parallel_adapter": ("modules", "{method: parallel_adapter}"),
}
"""Method → its family and its settings: the one place where methods are listed."""
SOFT_PROMPTS = ("prompt_tuning", "p_tuning")
"""Methods whose tokens `base` adds, so that they stand in model.peft."""
NOT_COMPARED = {
    ("dpo", method): "needs an sft model with its tokens; here all start from one" for method in SOFT_PROMPTS
}
"""(stage, method) → why it is not in the stage's table."""
HEADINGS = (
    "method",
    "trained",
    "share",
    "peak GB",
    "CPU s a step",
    "learning rate",
    "loss before",
    "held-out loss",
    "accuracy",
)


@dataclass(frozen=True)
class Trial:
    """One run: a method in a stage."""

    method: str
    """Key of `METHODS`."""
    stage: str
    """sft or dpo."""
    seed: int
    """Seed of the experiment."""
    steps: int
    """Optimizer steps."""
    rate: float
    """Learning rate."""
    kind: str
    """What the run is for: "choice" of a rate, or "report"."""

    def key(self) -> tuple:
        """Return what identifies the run's line."""
        return (self.stage, self.method, self.kind, self.steps, self.seed, self.rate)


def run(argv: list[str], stop: StopFlag) -> None:
    """Run what has no line yet, and print the tables."""
    args = parse(argv)
    load_libraries()
    if args.times:
        time_again(args, stop)
        return
    for stage in args.stages:
        methods = [method for method in args.methods if (stage, method) not in NOT_COMPARED]
        for seed in args.seeds:
            for method in list(methods):
                rate = rate_for(args, stop, stage, METHODS[method][0])
                line = line_of(args, stop, Trial(method, stage, seed, args.steps, rate, "report"))
                if "refused" in line:
                    methods.remove(method)
    rows = known_rows(args)
    for stage in args.stages:
        print(f"\n{stage}, {args.steps} steps, seeds {' '.join(map(str, args.seeds))}\n\n{table(args, rows, stage)}")


def load_libraries() -> None:
    """Load what all stages import, so that the process of each run begins with it."""
    import peft  # noqa: F401
    import trl  # noqa: F401

    import stages.dpo
    import stages.sft  # noqa: F401


def parse(argv: list[str]) -> Namespace:
    """Parse and check the command line."""
    parser = make_parser("tuning_methods.py", __doc__, HERE / "results")
    parser.set_defaults(config=str(CONFIG))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="methods to run")
    parser.add_argument("--stages", nargs="+", choices=list(OF_STAGE), default=list(OF_STAGE), help="stages to run")
    parser.add_argument("--seeds", nargs="+", type=int, default=(1, 2, 3), help="seeds that are reported")
    parser.add_argument("--choice-seed", type=int, default=0, help="seed on which learning rates are chosen")
    parser.add_argument("--steps", type=int, default=48, help="optimizer steps of each run")
    parser.add_argument("--rate", type=float, help="a learning rate for all, in place of choosing one")
    parser.add_argument("--middle", action="store_true", help="take the middle rate of each family, choosing none")
    parser.add_argument("--times", action="store_true", help="measure the step times of existing lines again")
    args = parse_arguments(parser, argv)
    args.config, args.artifacts = str(Path(args.config).resolve()), str(Path(args.artifacts).resolve())
    if not Path(args.config).is_file():
        raise UserError(f"{args.config}: no such file")
    if args.choice_seed in args.seeds:
        raise UserError(f"--choice-seed: {args.choice_seed} is a seed that is reported; choose rates on another one")
    args.up_to_date = set()  # experiments and their stages that this command has seen
    args.name = yaml.safe_load(Path(args.config).read_text(encoding="utf-8"))["name"] + "-tuning"
    return args


def rate_for(args: Namespace, stop: StopFlag, stage: str, family: str) -> float:
    """Return the learning rate of a family's methods: the middle one, the given one or the best.

    Args:
        args: The command line.
        stop: Set by a signal.
        stage: The stage.
        family: The family.
    """
    if args.middle:
        return rates_of(stage, family)[1]
    return args.rate or chosen_rate(args, stop, stage, family)


def chosen_rate(args: Namespace, stop: StopFlag, stage: str, family: str) -> float:
    """Return the best of a family's learning rates, by its first method that trains here.

    Args:
        args: The command line.
        stop: Set by a signal.
        stage: The stage.
        family: The family.

    Raises:
        UserError: No method of the family trains here.
    """
    refused = ""
    for method in methods_of(stage, family):
        trials = [
            Trial(method, stage, args.choice_seed, max(1, args.steps // 2), rate, "choice")
            for rate in rates_of(stage, family)
        ]
        lines = []
        for trial in trials:
            lines.append(line_of(args, stop, trial))
            if "refused" in lines[-1]:
                refused = lines[-1]["refused"]
                break
        else:
            return best(lines)
    raise UserError(f"{family}: no method of this family trains here: {refused}; leave them out of --methods")


def methods_of(stage: str, family: str) -> list[str]:
    """Return the methods of a family that a stage's table compares."""
    return [name for name, (own, _) in METHODS.items() if own == family and (stage, name) not in NOT_COMPARED]


def rates_of(stage: str, family: str) -> list[float]:
    """Return the learning rates that are tried for a family in a stage."""
    return [float(f"{rate * OF_STAGE[stage]:.3g}") for rate in FAMILIES[family]]


def best(lines: Sequence[dict]) -> float:
    """Return the learning rate of the line with the lowest held-out loss; NaN loses."""
    return min(lines, key=_loss)["rate"]


def _loss(line: dict) -> float:
    loss = line["held_out"]["loss"]
    return loss if loss == loss else float("inf")


def line_of(args: Namespace, stop: StopFlag, trial: Trial) -> dict:
    """Return the line of a run, from the results or by running it.

    Args:
        args: The command line.
        stop: Set by a signal.
        trial: The run.
    """
    wanted = [args.name, *args.overrides, *trial.key()]
    for row in known_rows(args):
        if row["key"] == wanted and "refused" not in row:
            return row
    stage = trial.stage
    common, needed = started_from(args, stop, trial)
    name = f"{args.name}-{trial.kind}-{trial.method.replace(', ', '-')}-{stage}"
    options = settings_of(trial)
    options += [f"{stage}.max_steps={trial.steps}", f"{stage}.eval_steps={trial.steps}", f"{stage}.keep=last"]
    options += ["checkpoints.every=0", f"from={{experiment: {common}, stages: [{', '.join(needed)}]}}"]
    shutil.rmtree(Path(args.artifacts) / name, ignore_errors=True)  # of an interrupted run
    refusal = rlhf(args, stop, stage, name, options, may_refuse=True)
    line = {
        "bench": "tuning_methods",
        "key": wanted,
        "method": trial.method,
        "stage": stage,
        "kind": trial.kind,
        "seed": trial.seed,
        "steps": trial.steps,
        "rate": trial.rate,
    }
    if refusal:
        line |= {"refused": refusal}
    else:
        line |= measured(ArtifactStore(args.artifacts, name), stage)
        line |= counted(args, trial, start_of(args, trial, common), [f"name={name}", *options])
    save_rows(args.results / RESULTS, [line], _key)
    print(json.dumps(line), flush=True)
    shutil.rmtree(Path(args.artifacts) / name, ignore_errors=True)
    return line


def settings_of(trial: Trial) -> list[str]:
    """Return the settings of a run's method, seed and rate."""
    section = "model" if trial.method in SOFT_PROMPTS else trial.stage
    return [
        f"seed={trial.seed}",
        f"{section}.peft={METHODS[trial.method][1]}",
        f"{trial.stage}.learning_rate={trial.rate:g}",
    ]


def start_of(args: Namespace, trial: Trial, common: str) -> Path:
    """Return the folder of the model that a run starts from, in the experiment that has it."""
    return ArtifactStore(args.artifacts, common).folder("base" if trial.stage == "sft" else "sft") / "model"


def time_again(args: Namespace, stop: StopFlag) -> None:
    """Measure the step times of existing lines again, one method after the other.

    Args:
        args: The command line: which methods, stages and seeds.
        stop: Set by a signal.
    """
    timed: dict[tuple[str, str], dict] = {}
    commit = commit_of(git_state()) or "unknown"
    for row in known_rows(args):
        method, stage = row["method"], row["stage"]
        if method not in args.methods or stage not in args.stages or row["seed"] not in args.seeds:
            continue
        if "refused" in row or not is_of(args, row):
            continue
        if (method, stage) not in timed:
            trial = Trial(method, stage, row["seed"], row["steps"], row["rate"], row["kind"])
            folder = start_of(args, trial, started_from(args, stop, trial)[0])
            options = [*args.overrides, f"name={args.name}-times", *settings_of(trial)]
            found = in_own_process(figures_of, args.config, options, stage, folder)
            found["timed"] = {"commit": commit, "date": now()[:10], "dtype": found.pop("dtype")}
            timed[method, stage] = found
            print(json.dumps({"method": method, "stage": stage, **timed[method, stage]}), flush=True)
        save_rows(args.results / RESULTS, [row | timed[method, stage]], _key)


def started_from(args: Namespace, stop: StopFlag, trial: Trial) -> tuple[str, list[str]]:
    """Bring up to date what a run starts from.

    Args:
        args: The command line.
        stop: Set by a signal.
        trial: The run.

    Returns:
        The experiment that has it, and its stages that the run takes.
    """
    common, options = f"{args.name}-seed{trial.seed}", [f"seed={trial.seed}"]
    stages = ["base"] if trial.stage == "sft" else ["sft", "rankings"]
    if trial.method in SOFT_PROMPTS:
        common, options = f"{common}-{trial.method}", [*options, f"model.peft={METHODS[trial.method][1]}"]
    for stage in stages:
        if (common, stage) not in args.up_to_date:
            rlhf(args, stop, stage, common, options)
            args.up_to_date.add((common, stage))
    needed = ["world", "base"] if trial.stage == "sft" else ["world", "base", "sft", "rankings"]
    return common, [stage for stage in needed if (Path(args.artifacts) / common / stage / "manifest.json").is_file()]


def _key(row: dict) -> tuple:
    return tuple(map(str, row["key"]))


def known_rows(args: Namespace) -> list[dict]:
    """Return the lines of the results, as far as there are any."""
    file = args.results / RESULTS
    return [json.loads(row) for row in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def rlhf(
    args: Namespace, stop: StopFlag, stage: str, name: str, options: list[str], may_refuse: bool = False
) -> str | None:
    """Bring a stage of an experiment up to date, in a process of its own.

    Args:
        args: The command line.
        stop: Set by a signal.
        stage: The stage.
        name: Name of the experiment.
        options: Its own settings; those of the command line come before them.
        may_refuse: Whether a refusal of the settings is an answer.

    Returns:
        The line that refuses the settings; None if the stage is done.
    """
    words = ["run", stage, "-c", args.config, "--artifacts", args.artifacts, f"name={name}", *args.overrides, *options]
    code, text = in_own_process(run_rlhf, words)
    if not code:
        return None
    if stop.requested:
        raise Interrupted()
    errors = [line.partition("error: ")[2] for line in text.splitlines() if "error: " in line]
    if may_refuse and code == 2 and errors and errors[0].startswith(("model.peft", f"{stage}.peft")):
        return errors[0]
    raise UserError(f"{name}: ended with exit code {code}: {text.strip()[-500:]}")


def in_own_process(task: Callable[..., Any], *values: Any) -> Any:
    """Return what a function returns in a copy of this process, which ends with it.

    The copy has the libraries loaded already, and its memory is its own.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        return pool.submit(task, *values).result()


def run_rlhf(words: list[str]) -> tuple[int, str]:
    """Run a command of rlhf, with its output on stderr.

    Args:
        words: The command line after `rlhf`.

    Returns:
        The exit code, and what it wrote to stderr.
    """
    from pipeline.cli import main

    os.dup2(2, 1)
    with tempfile.TemporaryFile("w+") as errors:
        os.dup2(errors.fileno(), 2)
        code = main(words)
        sys.stderr.flush()
        errors.seek(0)
        return code, errors.read()


def measured(store: ArtifactStore, stage: str) -> dict:
    """Return what a finished run measured.

    Args:
        store: Its artifacts.
        stage: The stage.
    """

    def rows(name: str) -> list[dict]:
        return [json.loads(row) for row in (store.folder(stage) / name).read_text(encoding="utf-8").splitlines()]

    times, evaluations = rows("timing.jsonl"), rows("evaluations.jsonl")
    first, last = evaluations[0], evaluations[-1]
    steps = times[1:] or times  # the first one also fills caches
    held_out = {key: last[key] for key in ("loss", "rewards/accuracies", "rewards/margins") if key in last}
    return {
        "before": {"step": first["step"], "loss": first["loss"]},
        "held_out": held_out,
        "seconds_a_step": round(median(row["seconds"] for row in steps), 3),
        "peak_gb": times[-1]["memory_gb"],
        **provenance(store.manifest(stage)),
    }


def counted(args: Namespace, trial: Trial, folder: Path, options: list[str]) -> dict:
    """Return how many parameters a method trains, how many the model has, and what a step costs.

    Args:
        args: The command line.
        trial: The run; another seed and rate have the same figures.
        folder: Of the model that the stage started from.
        options: Settings of the run.
    """
    names = ("trained", "parameters", "dtype", "cpu_seconds_a_step")
    for row in known_rows(args):
        if (row["method"], row["stage"]) == (trial.method, trial.stage) and is_of(args, row) and names[-1] in row:
            return {name: row[name] for name in names if name in row}
    return in_own_process(figures_of, args.config, [*args.overrides, *options], trial.stage, folder)


def figures_of(config: str, overrides: list[str], stage: str, folder: Path) -> dict:
    """Compute what `counted` returns.

    Args:
        config: The YAML file.
        overrides: Settings of the run.
        stage: The stage.
        folder: As of `counted`.
    """
    from pipeline.config.validation import load_experiment
    from stages.models.adapters import trainable_parameters, with_adapter
    from stages.models.loading import load_policy
    from stages.models.soft_prompts import soft_prompt_of
    from stages.settings.experiment import Experiment
    from stages.settings.peft import model_of
    from stages.shared.runtime import adapter_settings, dtype_of

    experiment = load_experiment(config, overrides, Experiment)
    settings = adapter_settings(model_of(experiment, stage))
    model = load_policy(folder)
    parameters = sum(p.numel() for p in model.parameters())
    model = with_adapter(model, settings)
    weights = list(trainable_parameters(model).values())
    dtype = dtype_of(experiment)
    return {
        "trained": sum(p.numel() for p in weights),
        "parameters": parameters,
        "dtype": dtype,
        "cpu_seconds_a_step": step_seconds(model, weights, soft_prompt_of(folder), dtype),
    }


def step_seconds(model: Any, weights: list[Any], soft_prompt: Sequence[int], dtype: str) -> float:
    """Return the processor time of a step on 4 rows of 64 tokens, the median of three after one.

    Unlike the time that passes, it depends little on what else the machine does.

    Args:
        model: The model with its adapter.
        weights: What trains.
        soft_prompt: Ids that every row begins with, beside the 64.
        dtype: Of the products, as in training. A processor without instructions for bfloat16
            emulates them, about ten times as slowly as float32.
    """
    import torch

    from stages.models.precision import casting

    ids = torch.randint(0, model.config.vocab_size // 2, (4, 64), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([torch.tensor(soft_prompt, dtype=torch.long).expand(4, -1), ids], dim=1)
    optimizer, times = torch.optim.AdamW(weights, lr=1e-6), []
    for _ in range(4):
        start = process_time()
        with casting("cpu", dtype):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(process_time() - start)
    return round(median(times[1:]), 3)


def table(args: Namespace, rows: Sequence[dict], stage: str) -> str:
    """Format the Markdown table of a stage.

    Args:
        args: The command line: which methods, seeds and steps.
        rows: All lines of the results.
        stage: The stage.
    """
    lines = []
    for method in args.methods:
        if (stage, method) in NOT_COMPARED:
            lines.append([method, NOT_COMPARED[stage, method], *["–"] * (len(HEADINGS) - 2)])
            continue
        own = [row for row in rows if (row["method"], row["stage"]) == (method, stage) and is_of(args, row)]
        refused = [row["refused"] for row in own if "refused" in row]
        found = [row for row in own if row["kind"] == "report" and row["seed"] in args.seeds and "refused" not in row]
        if found:
            lines.append(cells(method, stage, found))
        elif refused:
            lines.append([method, f"refused: {refused[0]}", *[""] * (len(HEADINGS) - 2)])
    return markdown(HEADINGS, lines)


def is_of(args: Namespace, row: dict) -> bool:
    """Return whether a line is of this config, these settings and this number of steps."""
    head = [args.name, *args.overrides]
    steps = (args.steps, max(1, args.steps // 2))
    return row["key"][: len(head)] == head and len(row["key"]) == len(head) + 6 and row["steps"] in steps


def cells(method: str, stage: str, rows: Sequence[dict]) -> list[str]:
    """Return the cells of a method.

    Args:
        method: The method.
        stage: The stage.
        rows: Its reported lines.
    """
    rate, tried = rows[0]["rate"], rates_of(stage, METHODS[method][0])
    mark = " *" if rate in (tried[0], tried[-1]) else ""
    accuracies = [row["held_out"]["rewards/accuracies"] for row in rows if "rewards/accuracies" in row["held_out"]]
    return [
        method,
        f"{rows[0]['trained']:,}",
        f"{100 * rows[0]['trained'] / rows[0]['parameters']:.3g} %",
        f"{max(row['peak_gb'] for row in rows):.2f}",
        f"{rows[0]['cpu_seconds_a_step']:.2f}" if "cpu_seconds_a_step" in rows[0] else "–",
        f"{rate:g}{mark}",
        f"{median(row['before']['loss'] for row in rows):.4f}",
        with_interval(over_seeds([row["held_out"]["loss"] for row in rows]), 4),
        with_interval(over_seeds(accuracies, True)) if accuracies else "",
    ]


if __name__ == "__main__":
    sys.exit(run_command(run, sys.argv[1:]))
