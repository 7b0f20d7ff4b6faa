"""Measure how often the 95 % intervals contain the true value, on simulated evaluations.

    python tests/benchmarks/coverage.py [--draws 4000] [--naive-draws 400]

Prints a table with one row for each case: tasks of uneven sizes with several prompts and samples,
prompts with rankings of K responses, seeds (`tests/stages/simulated.py`). The intervals are those
of `stages/evaluation/statistics.py`. Next to each coverage stands that of a bootstrap over prompts
(over pairs, over the prompts of all seeds), which wrongly treats dependent observations as
independent. Keeps one JSON line for each case in results/coverage.jsonl. Takes about two minutes on
one core, and needs no model and no data.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, not an installed copy

from pairs import save_row, stamp

from tests.stages.simulated import CASES, coverage

HERE = Path(__file__).resolve().parent


def main(argv: list[str]) -> None:
    """Simulate every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=4000, metavar="N", help="simulated data sets for each case")
    parser.add_argument(
        "--naive-draws", type=int, default=400, metavar="N", help="simulated data sets for each case of the bootstrap"
    )
    parser.add_argument(
        "--results", type=Path, default=HERE / "results", metavar="DIR", help="folder of the results files"
    )
    args = parser.parse_args(argv)
    rows = []
    for case in CASES:
        clustered = coverage(case, args.draws)
        naive = coverage(case, args.naive_draws, naive=True)["naive_coverage"]
        row = {
            "bench": "coverage",
            "kind": case.kind,
            "setting": case.setting,
            "clusters": case.clusters,
            "truth": round(case.truth, 4),
            "coverage": round(clustered["coverage"], 4),
            "width": round(clustered["width"], 4),
            "draws": args.draws,
            "bootstrap_over_observations": round(naive, 4),
            "bootstrap_draws": args.naive_draws,
            **stamp(),
        }
        save_row(row, ("bench", "kind", "setting", "clusters"), args.results / "coverage.jsonl")
        rows.append(row)
    print("\n" + table(rows))


def table(rows: list[dict]) -> str:
    """Format the rows as a Markdown table.

    Args:
        rows: One row for each case.

    Returns:
        The table, with a line for each kind and setting and a column for each number of clusters.
    """
    clusters = sorted({row["clusters"] for row in rows})
    lines = ["| case, coverage of the 95 % interval | " + " | ".join(map(str, clusters)) + " clusters |"]
    lines.append("| --- |" + " --- |" * len(clusters))
    by_case: dict[str, dict[int, dict]] = {}
    for row in rows:
        by_case.setdefault(f"{row['kind']}, {row['setting']}", {})[row["clusters"]] = row
    for name, by_clusters in by_case.items():
        cells = []
        for count in clusters:
            row = by_clusters.get(count)
            cells.append(f"{row['coverage']:.3f} ({row['bootstrap_over_observations']:.2f})" if row else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "In brackets: a bootstrap over prompts, pairs or the prompts of all seeds."])


if __name__ == "__main__":
    main(sys.argv[1:])
