"""Every ratio that README.md tells of trl and vLLM is a line of results/, and no line that is no comparison is told."""

import json
import re
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
RATIO = re.compile(r"(\d+\.\d+) \((\d+\.\d+)\s+to\s+(\d+\.\d+)\)")
COMMIT = re.compile(r"\b(?=[0-9a-f]*\d)[0-9a-f]{7}\b")
README = (HERE / "README.md").read_text(encoding="utf-8")
AGAINST_TRL = README.partition("## Against trl")[2]


def lines(*benches):
    return [
        json.loads(line)
        for bench in benches
        for line in (HERE / "results" / f"{bench}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def told(line):
    """The (median, least, most) of a line."""
    ratio = line.get("ratio") or line.get("vllm_over_ours")
    return ratio and tuple(ratio[key] for key in ("median", "min", "max"))


def rounds_to(values, text):
    digits = [len(part.partition(".")[2]) for part in text]
    return all(round(value, n) == float(part) for value, n, part in zip(values, digits, text, strict=True))


ALL = lines("ppo", "rm", "dpo", "engines")
FAIR = [told(line) for line in ALL if told(line) and line.get("mode") != "capped"]


@pytest.mark.parametrize("text", sorted(set(RATIO.findall(AGAINST_TRL))), ids=" ".join)
def test_a_ratio_is_a_line_of_a_fair_comparison(text):
    assert any(rounds_to(values, text) for values in FAIR)


def test_all_tables_are_read():
    assert len(RATIO.findall(AGAINST_TRL)) >= 25


@pytest.mark.parametrize("commit", sorted(set(COMMIT.findall(AGAINST_TRL))))
def test_a_commit_is_that_of_a_line(commit):
    known = {line["commit"].rstrip("+") for line in lines("ppo", "rm", "dpo", "engines", "checkpoints", "goodput")}
    assert commit in known


def test_the_table_of_coverage_is_that_of_the_lines():
    """In every cell: the coverage, and that of the bootstrap in brackets."""
    part = README.partition("## Intervals")[2].partition("## Against trl")[0]
    cells = re.findall(r"(0\.\d{3}) \((0\.\d{2})\)", part)
    found = [(f"{line['coverage']:.3f}", f"{line['bootstrap_over_observations']:.2f}") for line in lines("coverage")]
    assert sorted(cells) == sorted(found)
    (commit,) = {line["commit"] for line in lines("coverage")}
    assert f"commit {commit}" in part
