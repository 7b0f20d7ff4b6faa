"""Run the demo on several seeds, each with its own world, and print one table over seeds.

    python tests/benchmarks/demo_seeds.py [-c configs/tiny.yaml] [--seeds 3 4 5 6 7] [key=value …]

Settings were chosen on seeds 0 to 2, so other seeds are reported. Prints one JSON object for each
seed, then a Markdown table with a column for each seed and the mean over seeds with its 95 %
interval (Student's t over seeds; differences are paired by seed). Lines are kept in
results/demo_seeds.jsonl, artifacts in NAME-seed3 and so on. Takes six to ten minutes a seed for
configs/tiny.yaml on two cores. Run it again to resume after an interruption, or to print the table
of existing results.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, not an installed copy

from sweeps.estimates import over_seeds
from sweeps.points import provenance, save_rows, seconds_of
from sweeps.runner import make_parser, parse_arguments, run_command, run_rlhf
from sweeps.text import markdown, with_interval

from pipeline.errors import UserError
from pipeline.stage import StopFlag
from pipeline.store.artifacts import ArtifactStore
from stages.page.numbers import fixed
from stages.page.results import PROMPTED

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

SEEDS = (3, 4, 5, 6, 7)
"""Settings were chosen on seeds 0 to 2, so these are others."""
STAGES = ("world", "base", "sft", "rankings", "rm", "ppo", "dpo", "evaluate", "report")
LABELS = {"base": "base", "sft": "SFT", "ppo": "PPO-ptx", "dpo": "DPO", "best_of_n": "best of {n}"}
TRAINED = ("base", "sft", "ppo", "dpo")
HALVES = {"gold": "all prompts", "gold_held_out_tasks": "held-out tasks"}
DIFFERENCES = (("sft", "base"), ("ppo", "sft"), ("dpo", "sft"))


def run(argv: list[str], stop: StopFlag) -> None:
    """Run the chain of each seed and print the table."""
    args = parse(argv)
    rows = [on_seed(args, stop, seed) for seed in args.seeds]
    print(f"\n{table(rows)}")


def on_seed(args: Namespace, stop: StopFlag, seed: int) -> dict:
    """Run the chain of a seed; keep, print and return its JSON object.

    Args:
        args: The command line.
        stop: Set by a signal.
        seed: The seed.
    """
    name = f"{args.name}-seed{seed}"
    run_rlhf(args, stop, "report", name, [f"seed={seed}", *args.overrides], called=f"seed {seed}")
    row = line(ArtifactStore(args.artifacts, name), args, seed)
    save_rows(args.results / "demo_seeds.jsonl", [row], lambda row: (row["experiment"], row["seed"]))
    print(json.dumps(row), flush=True)
    return row


def parse(argv: list[str]) -> Namespace:
    """Parse and check the command line."""
    parser = make_parser("demo_seeds.py", __doc__, HERE / "results")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, help="seeds to run")
    args = parse_arguments(parser, argv)
    args.config, args.artifacts = str(Path(args.config).resolve()), str(Path(args.artifacts).resolve())
    if not Path(args.config).is_file():
        raise UserError(f"{args.config}: no such file")
    args.name = yaml.safe_load(Path(args.config).read_text(encoding="utf-8"))["name"]
    return args


def line(store: ArtifactStore, args: Namespace, seed: int) -> dict:
    """Return the JSON object of a seed: what results.json says, and the seconds of all stages.

    Args:
        store: Artifacts of the seed's experiment.
        args: The command line.
        seed: The seed.

    Returns:
        The object.

    Raises:
        UserError: The results do not allow the table.
    """
    results = json.loads((store.folder("evaluate") / "results.json").read_text(encoding="utf-8"))
    if results["judge"] != "gold":
        raise UserError(f"{args.config}: the judge is {results['judge']}; the table needs the embedded world's gold")
    if results["samples_per_prompt"] < 2:
        raise UserError("evaluate.samples_per_prompt: 1 is too few to compare two responses of SFT; use 2 or more")
    manifests = {stage: store.manifest(stage) for stage in STAGES}
    return {
        "bench": "demo_seeds",
        "experiment": args.name,
        "seed": seed,
        "best_of": manifests["evaluate"]["config"]["evaluate"]["best_of"],
        **{key: results[key] for key in ("prompts", "samples_per_prompt", "clusters", "leaked")},
        "policies": results["policies"],
        "reward_model": results["reward_model"],
        "overrides": args.overrides,
        **provenance(manifests["evaluate"]),
        "seconds": round(sum(map(seconds_of, manifests.values()))),
    }


# ── the table ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Figure:
    """Describe a line of the table."""

    name: str
    """Its heading."""
    read: Callable[[dict], float]
    """A seed's row → the figure. Differences are taken within a seed, so intervals are paired."""
    digits: int = 3
    """Decimal places."""
    share: bool = False
    """Whether the figure lies in [0, 1]."""


def table(rows: Sequence[dict]) -> str:
    """Format the Markdown table: a column for each seed, then the mean over seeds."""
    lines = []
    for figure in figures(rows[0]):
        values = [figure.read(row) for row in rows]
        mean = with_interval(over_seeds(values, figure.share), figure.digits)
        lines.append([figure.name, *(fixed(value, figure.digits) for value in values), mean])
    headings = ["", *(f"seed {row['seed']}" for row in rows), "mean (95 % interval over seeds)"]
    return markdown(headings, lines)


def figures(row: dict) -> list[Figure]:
    """Return the lines of the table in order; `row` is any seed's, as all share their settings."""
    labels = {name: label.format(n=row["best_of"]) for name, label in LABELS.items()}
    prompted = PROMPTED[row["policies"]["base"]["asked"]]
    lines = []
    for half, where in HALVES.items():
        gold = {name: reader("policies", name, half, "overall") for name in labels}
        for name, label in labels.items():
            how = f" ({prompted})" if name == "base" and prompted else ""
            lines.append(Figure(f"gold, {where}: {label}{how}", gold[name], share=True))
        for ours, theirs in DIFFERENCES:
            lines.append(Figure(f"gold, {where}: {labels[ours]} − {labels[theirs]}", minus(gold[ours], gold[theirs])))
    for name in ("ppo", "dpo"):
        read = reader("policies", name, "win_rate_vs_sft", "value")
        lines.append(Figure(f"win rate against SFT: {labels[name]}", read, share=True))
    accuracy, ceiling = reader("reward_model", "accuracy"), reader("reward_model", "accuracy_ceiling")
    lines += [
        Figure("reward model: accuracy on held-out pairs", accuracy, share=True),
        Figure("reward model: best accuracy that any scorer could reach", ceiling, share=True),
        Figure("reward model: accuracy as a share of that", lambda row: accuracy(row) / ceiling(row)),
        Figure("two labelers agree", reader("reward_model", "labeler_agreement"), share=True),
    ]
    for half, where in (("known_tasks", "known tasks"), ("held_out_tasks", "held-out tasks")):
        read = reader("reward_model", "orders_as_gold", half, "value")
        lines.append(Figure(f"reward model: orders two SFT answers as gold does, {where}", read, share=True))
    for name in TRAINED:
        read = reader("policies", name, "pretrain_perplexity")
        lines.append(Figure(f"pretraining perplexity: {labels[name]}", read, digits=2))
    for name in ("ppo", "dpo"):
        lines.append(Figure(f"KL to SFT, nats a response: {labels[name]}", reader("policies", name, "kl_to_sft"), 2))
    return [*lines, Figure("seconds, all stages", reader("seconds"), digits=0)]


def reader(*path: str) -> Callable[[dict], float]:
    """Return a function that reads the value at a path of keys in a row."""

    def read(row: dict) -> float:
        value = row
        for key in path:
            value = value[key]
        return value

    return read


def minus(ours: Callable[[dict], float], theirs: Callable[[dict], float]) -> Callable[[dict], float]:
    """Return a function that reads the difference of two figures in a row."""
    return lambda row: ours(row) - theirs(row)


if __name__ == "__main__":
    sys.exit(run_command(run, sys.argv[1:]))
