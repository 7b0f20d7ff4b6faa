"""Check that figures of the READMEs are lines of results/, and ratios those of fair comparisons."""

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the benchmarks are programs, not a package

import claims
import demo_seeds
from claims_rows import catalogue
from claims_rows.verdicts import NOT_RUN
from sweeps.text import with_interval

HERE = Path(__file__).resolve().parent
PUBLISHED = {row["row"]: row for row in json.loads((HERE / "results" / "claims.json").read_text(encoding="utf-8"))}
RATIO = re.compile(r"(\d+\.\d+) \((\d+\.\d+)\s+to\s+(\d+\.\d+)\)")
COMMIT = re.compile(r"\b(?=[0-9a-f]*\d)[0-9a-f]{7}\b")
README = (HERE / "README.md").read_text(encoding="utf-8")
AGAINST_TRL = README.partition("## Against trl")[2]


def lines(*benches: str) -> list[dict]:
    """Return all lines of the benchmarks' results."""
    return [
        json.loads(line)
        for bench in benches
        for line in (HERE / "results" / f"{bench}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def ratio_of(line: dict) -> tuple[float, float, float] | None:
    """Return (median, minimum, maximum) of a line's ratio; None if it has none."""
    ratio = line.get("ratio") or line.get("vllm_over_ours")
    return (ratio["median"], ratio["min"], ratio["max"]) if ratio else None


def rounds_to(values: tuple[float, ...], text: tuple[str, ...]) -> bool:
    """Return whether the values, rounded to the digits of the text, equal the text."""
    digits = [len(part.partition(".")[2]) for part in text]
    return all(round(value, n) == float(part) for value, n, part in zip(values, digits, text, strict=True))


ALL = lines("ppo", "rm", "dpo", "sft", "engines")
FAIR = [ratio_of(line) for line in ALL if ratio_of(line) and line.get("mode") != "capped"]


@pytest.mark.parametrize("text", sorted(set(RATIO.findall(AGAINST_TRL))), ids=" ".join)
def test_every_ratio_is_a_line_of_a_fair_comparison(text):
    assert any(rounds_to(values, text) for values in FAIR)


def test_ratios_of_all_tables_are_found():
    assert len(RATIO.findall(AGAINST_TRL)) >= 25


@pytest.mark.parametrize("commit", sorted(set(COMMIT.findall(AGAINST_TRL))))
def test_every_commit_is_that_of_a_line(commit):
    benches = ("ppo", "rm", "dpo", "sft", "engines", "starts", "checkpoints", "goodput")
    known = {line["commit"].rstrip("+") for line in lines(*benches)}
    assert commit in known


def test_the_coverage_table_has_the_figures_of_the_lines():
    """Compare every cell: the coverage, and in brackets that of the bootstrap."""
    section = README.partition("## Intervals")[2].partition("## Against trl")[0]
    cells = re.findall(r"(0\.\d{3}) \((0\.\d{2})\)", section)
    expected = [(f"{line['coverage']:.3f}", f"{line['bootstrap_over_observations']:.2f}") for line in lines("coverage")]
    assert sorted(cells) == sorted(expected)
    (commit,) = {line["commit"] for line in lines("coverage")}
    assert f"commit {commit}" in section


def cells(table: str) -> list[list[str]]:
    """Return the cells of a Markdown table without its rule and padding."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return [row for row in rows if not all(set(cell) <= {"-"} and cell for cell in row)]


def table_below(heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading of tests/README.md."""
    text = (HERE.parent / "README.md").read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2]
    section = text.partition("\n## ")[0]
    return cells("\n".join(line for line in section.splitlines() if line.startswith("|")))


def test_verdicts_are_those_of_the_published_rows():
    ran = [row for row in PUBLISHED.values() if row["verdict"] != NOT_RUN]
    assert table_below("What the papers claim") == cells(claims.published_table(list(PUBLISHED.values())))
    text = (HERE.parent / "README.md").read_text(encoding="utf-8")
    assert f"{len(ran)} of the {len(PUBLISHED)} rows have run" in " ".join(text.split()) and len(ran) >= 3
    for row in ran:
        assert not row["quick"] and len(row["seeds"]) >= 3 and row["commit"] and "+" not in row["commit"]
        assert row["commit"] in text


def test_published_rows_have_the_settings_and_rules_of_today(tmp_path):
    args = claims.parse(["--workers", "1", "--out", str(tmp_path), "--artifacts", str(tmp_path)])
    by_key = {row.key: row for row in catalogue.ROWS}
    for key, row in PUBLISHED.items():
        assert row["verdict"] == NOT_RUN or claims.is_of_today(args, by_key[key], row), key


def test_verdicts_of_the_readme_are_those_of_published_rows():
    """Each difference is the main figure of a row, with its verdict and its commit."""
    text = (HERE.parents[1] / "README.md").read_text(encoding="utf-8")
    section = text.partition("`make claims` measures")[2].partition("```")[0]
    told = cells("\n".join(line for line in section.splitlines() if line.startswith("|")))[1:]
    for name, ours, verdict in told:
        row = PUBLISHED[name.strip("`")]
        main = row["figures"][0]
        assert (ours, verdict) == (with_interval(main, main["digits"]), row["verdict"])
        assert row["commit"] in section
    assert len(told) >= 3


def test_the_demo_over_seeds_is_that_of_its_lines():
    expected = [row for row in cells(demo_seeds.table(lines("demo_seeds"))) if row[0] != "seconds, all stages"]
    assert table_below("The demo over seeds") == expected
