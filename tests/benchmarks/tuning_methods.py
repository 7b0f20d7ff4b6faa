"""Compare all tuning methods on one model: parameters, memory, seconds a step, held-out loss.

    python tests/benchmarks/tuning_methods.py [--methods full lora …] [--stages sft dpo]
        [--seeds 1 2 3] [--steps 48] [key=value …]

Settings and data are those of configs/smollm2.yaml (SmolLM2-135M), with `key=value` on top. sft
starts from base, dpo from one sft model a seed, the same for all methods. Every run is a process of
its own and takes the same number of steps; the held-out loss is that after the last.

Learning rates: a method takes the best of its family's three (`RATES`; for dpo a tenth of them), by
the held-out loss of runs of half as many steps on another seed (--choice-seed). The best rate at
the edge of its family is marked in the table.

Prints one JSON object for each run, then a Markdown table for each stage with means over seeds and
95 % intervals (Student's t over seeds). Lines are kept in results/tuning_methods.jsonl; a run whose
line is there is not repeated, so the command resumes after an interruption and prints the table of
existing results. Of a method that cannot train here a line says why, and it is tried again.
Artifacts of runs are removed once their line is kept; those of each seed's base and sft stay in
NAME-seed1 and so on.
"""

import json
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, not an installed copy

from sweeps.estimates import over_seeds
from sweeps.points import provenance, save_rows
from sweeps.runner import make_parser, parse_arguments, run_command
from sweeps.text import markdown, with_interval

from pipeline.errors import Interrupted, UserError
from pipeline.stage import StopFlag
from pipeline.store.artifacts import ArtifactStore

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CONFIG = ROOT / "configs" / "smollm2.yaml"
RESULTS = "tuning_methods.jsonl"

RATES = {
    "all weights": (1e-5, 3e-5, 1e-4),
    "low rank": (1e-4, 3e-4, 1e-3),
    "modules": (1e-4, 3e-4, 1e-3),
    "vectors": (1e-3, 3e-3, 1e-2),
}
"""Family of methods → the learning rates that are tried for sft."""
OF_STAGE = {"sft": 1.0, "dpo": 0.1}
"""Stage → what its rates are, relative to `RATES`."""
METHODS = {
    "full": ("all weights", "full"),
    "lora": ("low rank", "{method: lora}"),
    "rslora": ("low rank", "{method: lora, use_rslora: true}"),
    "pissa": ("low rank", "{method: lora, init_lora_weights: pissa}"),
    "olora": ("low rank", "{method: lora, init_lora_weights: olora}"),
    "dora": ("low rank", "{method: dora}"),
    "adalora": ("low rank", "{method: adalora}"),
    "qlora": ("low rank", "{method: qlora}"),
    "ia3": ("vectors", "{method: ia3}"),
    "bitfit": ("vectors", "{method: bitfit}"),
    "prompt_tuning": ("vectors", "{method: prompt_tuning}"),
    "p_tuning": ("vectors", "{method: p_tuning}"),
    "prefix_tuning": ("vectors", "{method: prefix_tuning}"),
    "bottleneck": ("modules", "{method: bottleneck}"),
}
"""Method → its family and the stage's `peft`: the one place where methods are listed."""
HEADINGS = ("method", "trained", "peak GB", "s a step", "learning rate", "held-out loss", "accuracy")
COUNT = """
import sys
from pathlib import Path
from pipeline.config.validation import load_experiment
from stages.models.adapters import trainable_parameters, with_adapter
from stages.models.loading import load_policy
from stages.settings.experiment import Experiment
from stages.settings.peft import model_of
from stages.shared.runtime import adapter_settings
config, folder, stage, *overrides = sys.argv[1:]
settings = adapter_settings(model_of(load_experiment(config, overrides, Experiment), stage))
model = with_adapter(load_policy(Path(folder)), settings)
print(sum(p.numel() for p in trainable_parameters(model).values()))
"""


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
    for stage in args.stages:
        for method in args.methods:
            rate = args.rate or chosen_rate(args, stop, stage, method)
            if rate is None:
                continue
            for seed in args.seeds:
                line_of(args, stop, Trial(method, stage, seed, args.steps, rate, "report"))
    rows = known_rows(args)
    for stage in args.stages:
        print(f"\n{stage}, {args.steps} steps, seeds {' '.join(map(str, args.seeds))}\n\n{table(args, rows, stage)}")


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
    args = parse_arguments(parser, argv)
    args.config, args.artifacts = str(Path(args.config).resolve()), str(Path(args.artifacts).resolve())
    if not Path(args.config).is_file():
        raise UserError(f"{args.config}: no such file")
    if args.choice_seed in args.seeds:
        raise UserError(f"--choice-seed: {args.choice_seed} is a seed that is reported; choose rates on another one")
    args.name = yaml.safe_load(Path(args.config).read_text(encoding="utf-8"))["name"] + "-tuning"
    return args


def chosen_rate(args: Namespace, stop: StopFlag, stage: str, method: str) -> float | None:
    """Return the best of the family's learning rates; None if the method cannot train here.

    Args:
        args: The command line.
        stop: Set by a signal.
        stage: The stage.
        method: The method.
    """
    lines = []
    for rate in rates_of(stage, method):
        line = line_of(args, stop, Trial(method, stage, args.choice_seed, max(1, args.steps // 2), rate, "choice"))
        if "refused" in line:
            return None
        lines.append(line)
    return best(lines)


def rates_of(stage: str, method: str) -> list[float]:
    """Return the learning rates that are tried for a method in a stage."""
    return [float(f"{rate * OF_STAGE[stage]:.3g}") for rate in RATES[METHODS[method][0]]]


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
    common, name = f"{args.name}-seed{trial.seed}", f"{args.name}-{trial.kind}-{trial.method}-{trial.stage}"
    for stage in ("base",) if trial.stage == "sft" else ("sft", "rankings"):
        rlhf(args, stop, stage, common, [f"seed={trial.seed}"])
    needed = ["world", "base"] if trial.stage == "sft" else ["world", "base", "sft", "rankings"]
    needed = [stage for stage in needed if (Path(args.artifacts) / common / stage / "manifest.json").is_file()]
    stage, peft = trial.stage, METHODS[trial.method][1]
    options = [f"seed={trial.seed}", f"{stage}.peft={peft}", f"{stage}.learning_rate={trial.rate:g}"]
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
        source = ArtifactStore(args.artifacts, common).folder("base" if stage == "sft" else "sft") / "model"
        line |= measured(ArtifactStore(args.artifacts, name), stage)
        line["trained"] = count(args, source, stage, [f"name={name}", *options])
    save_rows(args.results / RESULTS, [line], _key)
    print(json.dumps(line), flush=True)
    shutil.rmtree(Path(args.artifacts) / name, ignore_errors=True)
    return line


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
    words = [sys.executable, "-c", "import sys; from pipeline.cli import main; sys.exit(main(sys.argv[1:]))"]
    words += ["run", stage, "-c", args.config, "--artifacts", args.artifacts, f"name={name}", *args.overrides, *options]
    done = subprocess.run(words, cwd=ROOT, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    if not done.returncode:
        return None
    if stop.requested:
        raise Interrupted()
    errors = [line.partition("error: ")[2] for line in done.stderr.splitlines() if "error: " in line]
    if may_refuse and done.returncode == 2 and errors:
        return errors[0]
    raise UserError(f"{name}: ended with exit code {done.returncode}: {done.stderr.strip()[-500:]}")


def measured(store: ArtifactStore, stage: str) -> dict:
    """Return what a finished run measured.

    Args:
        store: Its artifacts.
        stage: The stage.
    """

    def rows(name: str) -> list[dict]:
        return [json.loads(row) for row in (store.folder(stage) / name).read_text(encoding="utf-8").splitlines()]

    times, last = rows("timing.jsonl"), rows("evaluations.jsonl")[-1]
    steps = times[1:] or times  # the first one also fills caches
    held_out = {key: last[key] for key in ("loss", "rewards/accuracies", "rewards/margins") if key in last}
    return {
        "held_out": held_out,
        "seconds_a_step": round(median(row["seconds"] for row in steps), 3),
        "peak_gb": times[-1]["memory_gb"],
        **provenance(store.manifest(stage)),
    }


def count(args: Namespace, folder: Path, stage: str, options: list[str]) -> int:
    """Return how many parameters a method trains, counted in a process of its own.

    Args:
        args: The command line.
        folder: Of the model that the stage started from.
        stage: The stage.
        options: Settings of the run.
    """
    words = [sys.executable, "-c", COUNT, args.config, str(folder), stage, *args.overrides, *options]
    return int(subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()[-1])


def table(args: Namespace, rows: Sequence[dict], stage: str) -> str:
    """Format the Markdown table of a stage.

    Args:
        args: The command line: which methods, seeds and steps.
        rows: All lines of the results.
        stage: The stage.
    """
    lines = []
    for method in args.methods:
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
    rate, tried = rows[0]["rate"], rates_of(stage, method)
    mark = " *" if rate in (tried[0], tried[-1]) else ""
    accuracies = [row["held_out"]["rewards/accuracies"] for row in rows if "rewards/accuracies" in row["held_out"]]
    return [
        method,
        f"{rows[0]['trained']:,}",
        f"{max(row['peak_gb'] for row in rows):.2f}",
        f"{median(row['seconds_a_step'] for row in rows):.2f}",
        f"{rate:g}{mark}",
        with_interval(over_seeds([row["held_out"]["loss"] for row in rows]), 4),
        with_interval(over_seeds(accuracies, True)) if accuracies else "",
    ]


if __name__ == "__main__":
    sys.exit(run_command(run, sys.argv[1:]))
