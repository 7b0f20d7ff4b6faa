"""`make demo` on several seeds: prints one JSON object a seed and keeps it in results/demo_seeds.jsonl.

    python tests/benchmarks/demo_seeds.py [--seeds 0 1 2] [--artifacts artifacts] [key=value …]
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def share(start: float, end: float, x: float) -> float:
    """How much of the way from `start` to `end` lies behind x."""
    return (x - start) / (end - start)


def figures(folder: Path) -> dict:
    """What results.json says of one seed."""
    results = json.loads((folder / "evaluate" / "results.json").read_text())
    policies, rm = results["policies"], results["reward_model"]
    gold = {name: policy["gold"]["overall"] for name, policy in policies.items()}
    ppl = {name: policies[name]["pretrain_perplexity"] for name in ("base", "sft", "ppo", "dpo")}
    return {
        "gold": gold,
        "ppo_of_the_way_to_best_of_n": share(gold["sft"], gold["best_of_n"], gold["ppo"]),
        "dpo_of_the_way_to_best_of_n": share(gold["sft"], gold["best_of_n"], gold["dpo"]),
        "best_of_n_of_the_way_to_1": share(gold["sft"], 1.0, gold["best_of_n"]),
        "ppo_win_rate_vs_sft": policies["ppo"]["win_rate_vs_sft"],
        "dpo_win_rate_vs_sft": policies["dpo"]["win_rate_vs_sft"],
        "rm_accuracy": rm["accuracy"],
        "rm_accuracy_ceiling": rm["accuracy_ceiling"],
        "rm_of_reachable": rm["accuracy"] / rm["accuracy_ceiling"],
        "labeler_agreement": rm["labeler_agreement"],
        "pretrain_perplexity": ppl,
        "ppo_perplexity_over_sft": ppl["ppo"] / ppl["sft"],
        "kl_to_sft": {name: policies[name]["kl_to_sft"] for name in ("ppo", "dpo")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--artifacts", default="artifacts")
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_args()
    rows = []
    for seed in asked.seeds:
        name = f"tiny-seed{seed}"
        command = [sys.executable, "-c", "import sys; from pipeline.cli import main; sys.exit(main(sys.argv[1:]))"]
        command += ["run", "report", "-c", "configs/tiny.yaml", "--artifacts", asked.artifacts]
        started = time.monotonic()
        subprocess.run(
            [*command, f"name={name}", f"seed={seed}", *asked.overrides], cwd=ROOT, check=True, stdout=sys.stderr
        )
        seconds = round(time.monotonic() - started)
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        row = {"bench": "demo_seeds", "seed": seed, **figures(Path(asked.artifacts) / name), "seconds": seconds}
        row |= {"overrides": asked.overrides, "commit": commit.stdout.strip(), "date": date.today().isoformat()}
        row |= {"versions": {p: version(p) for p in ("torch", "transformers", "trl")}}
        row |= {"machine": f"{platform.machine()}, {os.cpu_count()} cores"}
        print(json.dumps(row), flush=True)
        rows.append(row)
    (HERE / "results").mkdir(exist_ok=True)
    kept = HERE / "results" / "demo_seeds.jsonl"  # one line a seed, rewritten by each run
    old = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    rows = sorted([r for r in old if r["seed"] not in asked.seeds] + rows, key=lambda r: r["seed"])
    kept.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
