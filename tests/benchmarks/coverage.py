"""How often the 95 % intervals of `stages/evaluation/statistics.py` hold the truth, on simulated evaluations.

    python tests/benchmarks/coverage.py [--draws 4000] [--naive-draws 400]

Prints a table, a row a case: tasks of uneven sizes with several prompts and samples, prompts with rankings of K
responses, seeds (`tests/stages/simulated.py`). Beside each coverage stands that of a bootstrap over prompts (over
pairs, over the prompts of all seeds), which takes for independent what is not. Keeps a JSON line a case in
results/coverage.jsonl. On one core: about two minutes. It needs no model and no data.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))  # the code beside this file, wherever another copy is installed

from pairs import keep, stamp  # noqa: E402

from tests.stages.simulated import CASES, coverage  # noqa: E402


def main(argv: list[str]) -> None:
    """Try every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=4000, metavar="N", help="data sets a case")
    parser.add_argument("--naive-draws", type=int, default=400, metavar="N", help="data sets a case for the bootstrap")
    parser.add_argument("--results", type=Path, default=HERE / "results", metavar="DIR", help="where lines are kept")
    asked = parser.parse_args(argv)
    rows = []
    for case in CASES:
        found = coverage(case, asked.draws)
        naive = coverage(case, asked.naive_draws, naive=True)["naive_coverage"]
        row = {
            "bench": "coverage",
            "kind": case.kind,
            "setting": case.setting,
            "clusters": case.clusters,
            "truth": round(case.truth, 4),
            "coverage": round(found["coverage"], 4),
            "width": round(found["width"], 4),
            "draws": asked.draws,
            "bootstrap_over_observations": round(naive, 4),
            "bootstrap_draws": asked.naive_draws,
            **stamp(),
        }
        keep(row, ("bench", "kind", "setting", "clusters"), asked.results / "coverage.jsonl")
        rows.append(row)
    print("\n" + table(rows))


def table(rows: list[dict]) -> str:
    """Return the rows as a Markdown table: a line a kind and setting, a column a number of clusters."""
    numbers = sorted({row["clusters"] for row in rows})
    lines = ["| what, how often the 95 % interval holds the truth | " + " | ".join(map(str, numbers)) + " clusters |"]
    lines.append("| --- |" + " --- |" * len(numbers))
    by_case: dict[str, dict[int, dict]] = {}
    for row in rows:
        by_case.setdefault(f"{row['kind']}, {row['setting']}", {})[row["clusters"]] = row
    for name, found in by_case.items():
        cells = [
            f"{found[n]['coverage']:.3f} ({found[n]['bootstrap_over_observations']:.2f})" if n in found else ""
            for n in numbers
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "In brackets: a bootstrap over prompts, pairs or the prompts of all seeds."])


if __name__ == "__main__":
    main(sys.argv[1:])
