"""Let a real model learn an instruction from a rule, by PPO with gae and rloo, on several seeds.

    python tests/benchmarks/rule_reward.py [--seeds 0 1 2] [--advantages gae rloo] [key=value …]

Settings are those of configs/rule-reward.yaml and were chosen on other seeds. For each seed, base
and sft are run once, and then ppo with each way of computing advantages. Before and after are the
held-out evaluations of ppo before its first update and after its last: one sample of each held-out
prompt, with the same seeds, scored by the rule itself. Prints one JSON object for each run, then a
Markdown table with the mean over seeds and its 95 % interval (Student's t over seeds; differences
are paired by seed). Lines are kept in results/rule_reward.jsonl, artifacts in NAME-seed0-rloo and
so on. Run it again to resume after an interruption, or to print the table of existing results.
"""

import json
import shutil
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, not an installed copy

from sweeps.estimates import over_seeds
from sweeps.points import provenance, save_rows
from sweeps.runner import make_parser, parse_arguments, run_command, run_rlhf
from sweeps.text import markdown, with_interval

from pipeline.errors import UserError
from pipeline.stage import StopFlag
from pipeline.store.artifacts import ArtifactStore

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CONFIG = ROOT / "configs" / "rule-reward.yaml"

OPTIONS = {"gae": ["ppo.advantage=gae", "ppo.value_learning_rate=3e-4"], "rloo": ["ppo.advantage=rloo"]}
"""Way of computing advantages → the settings that it needs."""
FIGURES = (("score", "score by the rule"), ("kl", "KL to SFT, nats a response"), ("length", "tokens a response"))
"""Key of evaluations.jsonl → its heading."""
PARTS = "rewards/"


def run(argv: list[str], stop: StopFlag) -> None:
    """Run PPO on each seed in each way, and print the table."""
    args = parse(argv)
    rows = [row for seed in args.seeds for row in on_seed(args, stop, seed)]
    for advantage in args.advantages:
        print(f"\n{advantage}\n\n{table([row for row in rows if row['advantage'] == advantage])}")


def on_seed(args: Namespace, stop: StopFlag, seed: int) -> list[dict]:
    """Run base and sft of a seed once, and PPO in each way; return the JSON object of each.

    Args:
        args: The command line.
        stop: Set by a signal.
        seed: The seed.
    """
    shared, rows = f"{args.name}-seed{seed}", []
    run_rlhf(args, stop, "sft", shared, [f"seed={seed}", *args.overrides])
    for advantage in args.advantages:
        name = f"{shared}-{advantage}"
        if not (Path(args.artifacts) / name).exists():
            shutil.copytree(Path(args.artifacts) / shared, Path(args.artifacts) / name)
        run_rlhf(args, stop, "ppo", name, [f"seed={seed}", *OPTIONS[advantage], *args.overrides])
        row = line(ArtifactStore(args.artifacts, name), args, seed, advantage)
        save_rows(args.results / "rule_reward.jsonl", [row], lambda row: (row["advantage"], row["seed"]))
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def parse(argv: list[str]) -> Namespace:
    """Parse and check the command line."""
    parser = make_parser("rule_reward.py", __doc__, HERE / "results")
    parser.set_defaults(config=str(CONFIG))
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2), help="seeds to run")
    parser.add_argument("--advantages", nargs="+", choices=list(OPTIONS), default=list(OPTIONS), help="ways to run")
    args = parse_arguments(parser, argv)
    args.config, args.artifacts = str(Path(args.config).resolve()), str(Path(args.artifacts).resolve())
    if not Path(args.config).is_file():
        raise UserError(f"{args.config}: no such file")
    args.name = yaml.safe_load(Path(args.config).read_text(encoding="utf-8"))["name"]
    return args


def line(store: ArtifactStore, args: Namespace, seed: int, advantage: str) -> dict:
    """Return the JSON object of a run: its held-out figures before and after.

    Args:
        store: Artifacts of the run.
        args: The command line.
        seed: Its seed.
        advantage: How advantages were computed.
    """
    manifest = store.manifest("ppo")
    text = (store.folder("ppo") / "evaluations.jsonl").read_text(encoding="utf-8")
    evaluations = [json.loads(row) for row in text.splitlines()]
    keys = [key for key, _ in FIGURES] + sorted(key for key in evaluations[-1] if key.startswith(PARTS))
    settings = manifest["config"]["ppo"]
    return {
        "bench": "rule_reward",
        "experiment": args.name,
        "advantage": advantage,
        "seed": seed,
        "rewards": settings["rewards"],
        "episodes": settings["total_episodes"],
        "before": {key: evaluations[0][key] for key in keys},
        "after": {key: evaluations[-1][key] for key in keys},
        **provenance(manifest),
    }


def table(rows: Sequence[dict]) -> str:
    """Format the Markdown table of one way: before, after and their difference, over seeds."""
    headings = dict(FIGURES) | {key: f"part {key.removeprefix(PARTS)}" for key in rows[0]["after"] if PARTS in key}
    lines = []
    for key, heading in headings.items():
        share = key == "score"
        before, after = ([row[when][key] for row in rows] for when in ("before", "after"))
        change = [late - early for early, late in zip(before, after, strict=True)]
        lines.append(
            [
                heading,
                with_interval(over_seeds(before, share)),
                with_interval(over_seeds(after, share)),
                with_interval(over_seeds(change)),
            ]
        )
    seconds = with_interval(over_seeds([float(row["seconds"]) for row in rows]), 0)
    lines.append(["seconds of ppo", "", seconds, ""])
    return markdown(["on held-out prompts", "before", "after", "after − before"], lines)


if __name__ == "__main__":
    sys.exit(run_command(run, sys.argv[1:]))
