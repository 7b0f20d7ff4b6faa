"""The demo on several seeds, each its own world: one JSON object a seed, and one table over seeds, ready for a README.

    python tests/benchmarks/demo_seeds.py [-c configs/tiny.yaml] [--seeds 3 4 5 6 7] [key=value …]

Settings were chosen on seeds 0 to 2, so others are reported. A column a seed, and the mean over seeds with its 95 %
interval (Student's t over seeds, the unit of this table; differences are paired by seed). Lines are kept in
results/demo_seeds.jsonl, artifacts in NAME-seed3 …. On configs/tiny.yaml and two cores: six to ten minutes a seed. Run
it again to go on where it was stopped, or to print the table of what is there.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))  # the code beside this file, wherever another copy is installed

from sweeps.beside import command, options, parsed  # noqa: E402
from sweeps.estimates import over_seeds  # noqa: E402
from sweeps.points import keep, provenance, seconds_of  # noqa: E402
from sweeps.words import markdown, with_interval  # noqa: E402

from pipeline.errors import Interrupted, UserError  # noqa: E402
from pipeline.stage import StopFlag  # noqa: E402
from pipeline.store.artifacts import ArtifactStore  # noqa: E402
from stages.page.numbers import fixed  # noqa: E402
from stages.page.results import PROMPTED

SEEDS = (3, 4, 5, 6, 7)
"""Settings were chosen on seeds 0 to 2."""
STAGES = ("world", "base", "sft", "rankings", "rm", "ppo", "dpo", "evaluate", "report")
LABELS = {"base": "base", "sft": "SFT", "ppo": "PPO-ptx", "dpo": "DPO", "best_of_n": "best of {n}"}
TRAINED = ("base", "sft", "ppo", "dpo")
HALVES = {"gold": "all prompts", "gold_held_out_tasks": "held-out tasks"}
DIFFERENCES = (("sft", "base"), ("ppo", "sft"), ("dpo", "sft"))


def run(argv: list[str], stop: StopFlag) -> None:
    asked = parse(argv)
    rows = []
    for seed in asked.seeds:
        name = f"{asked.name}-seed{seed}"
        words = [sys.executable, "-c", "import sys; from pipeline.cli import main; sys.exit(main(sys.argv[1:]))"]
        words += ["run", "report", "-c", asked.config, "--artifacts", asked.artifacts]
        words += [f"name={name}", f"seed={seed}", *asked.overrides]
        code = subprocess.run(words, cwd=ROOT, stdout=sys.stderr).returncode
        if code:
            raise Interrupted() if stop.requested else UserError(f"seed {seed}: ended with exit code {code}; see above")
        row = line(ArtifactStore(asked.artifacts, name), asked, seed)
        keep(asked.results / "demo_seeds.jsonl", [row], lambda row: (row["experiment"], row["seed"]))
        print(json.dumps(row), flush=True)
        rows.append(row)
    print(f"\n{table(rows)}")


def parse(argv: list[str]):
    parser = options("demo_seeds.py", __doc__, HERE / "results")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, help="a chain each")
    asked = parsed(parser, argv)
    asked.config, asked.artifacts = str(Path(asked.config).resolve()), str(Path(asked.artifacts).resolve())
    if not Path(asked.config).is_file():
        raise UserError(f"{asked.config}: no such file")
    asked.name = yaml.safe_load(Path(asked.config).read_text(encoding="utf-8"))["name"]
    return asked


def line(store: ArtifactStore, asked, seed: int) -> dict:
    """Return the JSON object of a seed: what results.json says, and how long all stages took."""
    results = json.loads((store.folder("evaluate") / "results.json").read_text(encoding="utf-8"))
    if results["judge"] != "gold":
        raise UserError(f"{asked.config}: the judge is {results['judge']}; the table needs the embedded world's gold")
    if results["samples_per_prompt"] < 2:
        raise UserError("evaluate.samples_per_prompt: is 1; the table compares two answers of SFT, so give 2 or more")
    manifests = {stage: store.manifest(stage) for stage in STAGES}
    return {
        "bench": "demo_seeds",
        "experiment": asked.name,
        "seed": seed,
        "best_of": manifests["evaluate"]["config"]["evaluate"]["best_of"],
        **{key: results[key] for key in ("prompts", "samples_per_prompt", "clusters", "leaked")},
        "policies": results["policies"],
        "reward_model": results["reward_model"],
        "overrides": asked.overrides,
        **provenance(manifests["evaluate"]),
        "seconds": round(sum(map(seconds_of, manifests.values()))),
    }


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Figure:
    """A line of the table."""

    name: str
    read: Callable[[dict], float]
    """A seed's row → the figure. A difference is read off each seed, so its interval is of paired differences."""
    digits: int = 3
    share: bool = False
    """Whether it lies in [0, 1]."""


def table(rows: Sequence[dict]) -> str:
    """Write the Markdown table of all seeds: a column a seed, then the mean with its interval over seeds."""
    lines = []
    for figure in figures(rows[0]):
        values = [figure.read(row) for row in rows]
        mean = with_interval(over_seeds(values, figure.share), figure.digits)
        lines.append([figure.name, *(fixed(value, figure.digits) for value in values), mean])
    headings = ["", *(f"seed {row['seed']}" for row in rows), "mean (95 % interval over seeds)"]
    return markdown(headings, lines)


def figures(row: dict) -> list[Figure]:
    """Return the lines of the table, in their order; `row` is that of a seed, whose settings are those of all."""
    labels = {name: label.format(n=row["best_of"]) for name, label in LABELS.items()}
    asked = PROMPTED[row["policies"]["base"]["asked"]]
    found = []
    for half, where in HALVES.items():
        gold = {name: reader("policies", name, half, "overall") for name in labels}
        for name, label in labels.items():
            how = f" ({asked})" if name == "base" and asked else ""
            found.append(Figure(f"gold, {where}: {label}{how}", gold[name], share=True))
        for ours, theirs in DIFFERENCES:
            found.append(Figure(f"gold, {where}: {labels[ours]} − {labels[theirs]}", minus(gold[ours], gold[theirs])))
    for name in ("ppo", "dpo"):
        read = reader("policies", name, "win_rate_vs_sft", "value")
        found.append(Figure(f"win rate against SFT: {labels[name]}", read, share=True))
    accuracy, ceiling = reader("reward_model", "accuracy"), reader("reward_model", "accuracy_ceiling")
    found += [
        Figure("reward model: accuracy on held-out pairs", accuracy, share=True),
        Figure("reward model: best accuracy that any scorer could reach", ceiling, share=True),
        Figure("reward model: accuracy as a share of that", lambda row: accuracy(row) / ceiling(row)),
        Figure("two labelers agree", reader("reward_model", "labeler_agreement"), share=True),
    ]
    for half, where in (("known_tasks", "known tasks"), ("held_out_tasks", "held-out tasks")):
        read = reader("reward_model", "orders_as_gold", half, "value")
        found.append(Figure(f"reward model: orders two SFT answers as gold does, {where}", read, share=True))
    for name in TRAINED:
        read = reader("policies", name, "pretrain_perplexity")
        found.append(Figure(f"pretraining perplexity: {labels[name]}", read, digits=2))
    for name in ("ppo", "dpo"):
        found.append(Figure(f"KL to SFT, nats a response: {labels[name]}", reader("policies", name, "kl_to_sft"), 2))
    return [*found, Figure("seconds, all stages", reader("seconds"), digits=0)]


def reader(*path: str) -> Callable[[dict], float]:
    """Return a function that reads the figure at a path of keys out of a row."""

    def read(row: dict) -> float:
        value = row
        for key in path:
            value = value[key]
        return value

    return read


def minus(ours: Callable[[dict], float], theirs: Callable[[dict], float]) -> Callable[[dict], float]:
    """Return a function that reads the difference of two figures out of a row."""
    return lambda row: ours(row) - theirs(row)


if __name__ == "__main__":
    sys.exit(command(run, sys.argv[1:]))
