"""Run rounds of ranking, reward model and PPO, against spending the same labels at once.

    python tests/benchmarks/rounds.py [-c tests/benchmarks/rounds.yaml] [--seeds 3 4 5] [--rounds 3]

For each seed, with the embedded world's simulated labelers, who post to the ranking page what a
browser posts (`rlhf rank --simulate`):
  rounds    the answers of SFT are ranked, a reward model and PPO follow; `rlhf round next`, and the
            answers of that policy are ranked; and so on. Each reward model trains on all labels so
            far, and PPO starts from SFT each time (the paper's way)
  at once   as many prompts as all rounds together get answers of SFT and are ranked in round 1;
            one reward model, and PPO with as many updates as that of the last round
Both share world, base and SFT. Every task is ranked by `rank.overlap_labelers` labelers.

Settings were chosen on seed 0, so other seeds are reported. Prints one JSON object for each seed,
then Markdown tables: means over seeds with 95 % intervals (Student's t), differences paired by
seed. Lines are kept in results/rounds.jsonl; a seed whose line was made with the same settings is
not run again. Run it again to resume after an interruption. `--quick` runs everything with a tiny
model in a temporary folder, which shows only that it runs. `key=value` changes settings.
"""

import json
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, not an installed copy

from sweeps.estimates import differences_over_seeds, over_seeds
from sweeps.points import provenance, save_rows, seconds_of
from sweeps.runner import make_parser, parse_arguments, run_command
from sweeps.text import markdown, with_interval

from data.source import Source
from data.sources import load
from pipeline import cli
from pipeline.config.yaml_tree import read_tree
from pipeline.errors import Interrupted, UserError
from pipeline.stage import StopFlag
from pipeline.store import integrity
from pipeline.store.artifacts import ArtifactStore
from stages.evaluation.statistics import agreement_figures
from stages.people.rank.snapshots import link_of

HERE = Path(__file__).resolve().parent
SEEDS = (3, 4, 5)
"""Settings were chosen on seed 0, so these are others."""
LABELERS = 5
"""Simulated labelers."""
SHARED = ("world", "base", "sft")
"""Stages that both sides have."""
MADE = ("rankings", "rm", "ppo", "evaluate")
"""Stages that each round, and the other side, makes of its own."""
QUICK = (
    "model.hidden_size=16", "model.num_hidden_layers=1", "model.num_attention_heads=2", "model.intermediate_size=32",
    "world.documents=300", "world.demonstrations=60", "world.prompts=60", "world.evaluation_prompts=20",
    "base.max_steps=4", "sft.max_steps=4", "rank.prompts=12", "rank.samples_per_prompt=3", "rm.max_steps=4",
    "ppo.total_episodes=16", "ppo.batch_size=8", "ppo.mini_batch_size=8",
    "ppo.per_device_train_batch_size=8", "evaluate.perplexity_rows=8",
)  # fmt: skip
"""Settings of --quick."""


def run(argv: list[str], stop: StopFlag) -> None:
    """Run both sides of each seed and print the tables."""
    args = parse(argv)
    if not args.quick:
        print(measure(args, stop))
        return
    with tempfile.TemporaryDirectory() as folder:
        args.artifacts, args.results = str(Path(folder) / "artifacts"), Path(folder)
        args.seeds, args.overrides = [0], [*QUICK, *args.overrides]
        print(measure(args, stop))


def parse(argv: list[str]) -> Namespace:
    """Parse and check the command line."""
    parser = make_parser("rounds.py", __doc__, HERE / "results")
    parser.set_defaults(config=str(HERE / "rounds.yaml"))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="seeds to run")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="rounds, at least 2")
    parser.add_argument("--quick", action="store_true", help="only show that it runs, in seconds")
    args = parse_arguments(parser, argv)
    args.artifacts = str(Path(args.artifacts).resolve())
    if args.rounds < 2:
        raise UserError(f"command line: --rounds is {args.rounds}; one round has nothing to compare; use 2 or more")
    if not Path(args.config).is_file():
        raise UserError(f"{args.config}: no such file")
    return args


def measure(args: Namespace, stop: StopFlag) -> str:
    """Run what has no line yet, and return the tables of all seeds."""
    rows = []
    for seed in args.seeds:
        values = read_tree(args.config, args.overrides).values
        settings = integrity.sha256_json({**values, "rounds": args.rounds})[:16]
        row = kept_row(args.results / "rounds.jsonl", seed, settings)
        if row is None:
            row = run_seed(args, values, seed, stop) | {"settings": settings, "overrides": args.overrides}
            save_rows(args.results / "rounds.jsonl", [row], lambda row: (row["experiment"], row["seed"]))
        print(json.dumps(row), flush=True)
        rows.append(row)
    return f"\n{main_table(rows)}\n\n{accuracy_table(rows)}\n"


def kept_row(file: Path, seed: int, settings: str) -> dict | None:
    """Return the line of a seed that was made with the same settings; None without one."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    found = [row for row in map(json.loads, lines) if row["seed"] == seed and row["settings"] == settings]
    return found[0] if found else None


# ── one seed ──────────────────────────────────────────────────────────────────────────────────────


def run_seed(args: Namespace, values: dict, seed: int, stop: StopFlag) -> dict:
    """Run the rounds and the other side on a seed; return the line.

    Args:
        args: The command line.
        values: The settings of the config and the command line.
        seed: The seed.
        stop: Set by a signal.
    """
    name, prompts = f"{values['name']}-seed{seed}", values["rank"]["prompts"]
    folder = Path(args.artifacts) / "configs"
    folder.mkdir(parents=True, exist_ok=True)
    names = [name, *(f"{name}-r{number}" for number in range(2, args.rounds + 1))]
    first = {**values, "name": name, "seed": seed}
    write_config(folder / f"{name}.yaml", first)
    for number, each in enumerate(names, 1):
        config = folder / f"{each}.yaml"
        if number > 1 and not config.exists():
            rlhf(args, stop, "round", "next", folder / f"{names[number - 2]}.yaml")
        run_round(args, stop, config)
    once = f"{name}-once"
    labels = {"rank": {**values["rank"], "prompts": prompts * args.rounds}}
    write_config(
        folder / f"{once}.yaml", {**first, **labels, "name": once, "from": {"experiment": name, "stages": list(SHARED)}}
    )
    run_round(args, stop, folder / f"{once}.yaml")
    stores = [ArtifactStore(args.artifacts, each) for each in names]
    return line(values["name"], seed, stores, ArtifactStore(args.artifacts, once))


def write_config(path: Path, values: dict) -> None:
    """Write a config, unless it is there: rounds are told from others by their file."""
    text = yaml.safe_dump(values, sort_keys=False)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise UserError(f"{path}: is there with other settings; give another --artifacts, or remove that folder")
    path.write_text(text, encoding="utf-8")


def run_round(args: Namespace, stop: StopFlag, config: Path) -> None:
    """Let labelers rank, and train and evaluate on what they said."""
    rlhf(args, stop, "run", "sft", config)
    rlhf(args, stop, "rank", "--simulate", str(LABELERS), config)
    rlhf(args, stop, "run", "evaluate", config)


def rlhf(args: Namespace, stop: StopFlag, *words: str | Path) -> None:
    """Run a command of `rlhf` in this process, so that libraries load once.

    Args:
        args: The command line.
        stop: Set by a signal.
        *words: The command, and last the config.

    Raises:
        Interrupted: A signal came.
        UserError: The command failed.
    """
    *command, config = words
    with redirect_stdout(sys.stderr):
        code = cli.main([*map(str, command), "-c", str(config), "--artifacts", args.artifacts])
    if code == 75 or stop.requested:
        raise Interrupted()
    if code:
        raise UserError(f"{config}: `rlhf {' '.join(map(str, command))}` ended with exit code {code}; see above")


def line(name: str, seed: int, stores: Sequence[ArtifactStore], once: ArtifactStore) -> dict:
    """Return the JSON object of a seed.

    Args:
        name: The experiment's name in the config.
        seed: The seed.
        stores: Artifacts of each round.
        once: Artifacts of the other side.
    """
    across = json.loads((stores[-1].folder("evaluate") / "rounds.json").read_text(encoding="utf-8"))
    made = [store.manifest(stage) for store in (*stores, once) for stage in MADE]
    seconds = sum(map(seconds_of, [*made, *(stores[0].manifest(stage) for stage in SHARED)]))
    return {
        "bench": "rounds",
        "experiment": name,
        "seed": seed,
        "rounds": [figures_of(store) for store in stores],
        "once": figures_of(once),
        "accuracy": across["accuracy"],
        **provenance(stores[-1].manifest("evaluate")),
        "seconds": round(seconds),
    }


def figures_of(store: ArtifactStore) -> dict:
    """Return the figures of a round, or of the other side.

    Raises:
        UserError: Its policies are not judged by gold.
    """
    results = json.loads((store.folder("evaluate") / "results.json").read_text(encoding="utf-8"))
    if results["judge"] != "gold":
        raise UserError(f"{store.base}: the judge is {results['judge']}; the tables need the embedded world's gold")
    rows = load("rankings", Source(path=link_of(store.base).resolve(), templated="keep"))
    ppo, model = results["policies"]["ppo"], results["reward_model"]
    return {
        "labels": len(rows),
        **{f"{policy}_gold": results["policies"][policy]["gold"]["overall"] for policy in ("sft", "ppo")},
        "ppo_gold_held_out_tasks": ppo["gold_held_out_tasks"]["overall"],
        "kl_to_sft": ppo["kl_to_sft"],
        "orders_as_gold": model["orders_as_gold"]["known_tasks"]["value"],
        "agreement": agreement_figures(rows)["labeler_agreement"],
        "updates": store.manifest("ppo")["metrics"].get("updates"),
    }


# ── the tables ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Figure:
    """Describe a line of the main table."""

    name: str
    """Its heading."""
    key: str
    """Its key in the figures of a round."""
    digits: int = 3
    """Decimal places."""
    share: bool = True
    """Whether it lies in [0, 1]."""


FIGURES = (
    Figure("gold of PPO, all prompts", "ppo_gold"),
    Figure("gold of PPO, held-out tasks", "ppo_gold_held_out_tasks"),
    Figure("gold of SFT, all prompts", "sft_gold"),
    Figure("reward model: orders two SFT answers as gold does", "orders_as_gold"),
    Figure("KL of PPO to the first SFT, nats a response", "kl_to_sft", 2, share=False),
    Figure("two labelers agree on this round's answers", "agreement"),
)


def main_table(rows: Sequence[dict]) -> str:
    """Format the Markdown table of rounds beside the other side, and differences paired by seed."""
    count = len(rows[0]["rounds"])
    headings = ["", *(f"round {number + 1}" for number in range(count)), "at once"]
    headings += [f"round {count} − at once", f"round {count} − round 1"]
    lines = [["labels so far", *labels_so_far(rows, count), "", ""]]
    for figure in FIGURES:
        rounds = [[row["rounds"][number][figure.key] for row in rows] for number in range(count)]
        once = [row["once"][figure.key] for row in rows]
        cells = [with_interval(over_seeds(values, figure.share), figure.digits) for values in (*rounds, once)]
        for other in (once, rounds[0]):
            cells.append(with_interval(difference(rounds[-1], other), figure.digits))
        lines.append([figure.name, *cells])
    seeds = " ".join(str(row["seed"]) for row in rows)
    return f"seeds {seeds}; 95 % intervals over seeds\n\n{markdown(headings, lines)}"


def labels_so_far(rows: Sequence[dict], count: int) -> list[str]:
    """Return the mean number of rankings up to each round, and of the other side."""
    means = [sum(row["rounds"][number]["labels"] for row in rows) / len(rows) for number in range(count)]
    once = sum(row["once"]["labels"] for row in rows) / len(rows)
    return [*(f"{sum(means[: number + 1]):.0f}" for number in range(count)), f"{once:.0f}"]


def difference(ours: Sequence[float], theirs: Sequence[float]) -> dict:
    """Return the mean difference over seeds with its interval; of one seed there is none."""
    if len(ours) == 1:
        return {"value": ours[0] - theirs[0], "ci95": None}
    return differences_over_seeds(ours, theirs)


def accuracy_table(rows: Sequence[dict]) -> str:
    """Format how often each round's reward model is right on each round's held-out labels."""
    count = len(rows[0]["rounds"])
    lines = []
    for model in range(1, count + 1):
        cells = [cell_of(rows, model, labels) for labels in range(1, count + 1)]
        lines.append([f"reward model of round {model}", *cells])
    headings = ["accuracy on held-out pairs", *(f"labels of round {labels}" for labels in range(1, count + 1))]
    return markdown(headings, lines)


def cell_of(rows: Sequence[dict], model: int, labels: int) -> str:
    """Return the mean accuracy of one reward model on the labels of one round, over seeds."""
    values = [
        one["accuracy"] for row in rows for one in row["accuracy"]
        if (one["reward_model"], one["labels"]) == (model, labels) and one["accuracy"] is not None
    ]  # fmt: skip
    return with_interval(over_seeds(values, share=True)) if len(values) == len(rows) else "–"


if __name__ == "__main__":
    sys.exit(run_command(run, sys.argv[1:]))
