"""Print the table that ends a run, from results.json."""

import json
import textwrap
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.errors import UserError
from stages.page import rounds
from stages.page.numbers import NONE, fixed, interval, number, percent
from stages.page.results import NAMES, complete, judge_name, quality
from stages.page.sentences import cut_sentences, marks, notes
from stages.page.trust import warnings

WIDTH = 100
"""Columns of the printed lines."""


def show(folder: Path, console: Console) -> None:
    """Print the results, and where the page is.

    Args:
        folder: The artifact of the stage report.
        console: Where to print.

    Raises:
        UserError: If results.json is missing.
    """
    from rich.text import Text

    file = evaluation_of(folder) / "results.json"
    if not file.is_file():
        raise UserError(f"{file}: is missing; run `rlhf run evaluate -c CONFIG`")
    results = complete(json.loads(file.read_text(encoding="utf-8")))
    # The title is printed on its own: a title of the table would wrap at the table's width.
    title = f"\n{folder.parent.name}: policies on evaluation prompts"
    console.print(Text(title, style="bold"), soft_wrap=True)
    console.print(policy_table(results))
    if line := reward_model_line(results["reward_model"]):
        console.print(Text(f"\n{line}"))
    if line := rounds.line(rounds.read(evaluation_of(folder))):
        console.print(Text(line), soft_wrap=True)
    for line in other_judges(results):
        console.print(Text(line), soft_wrap=True)
    for line in notes(results):
        console.print(Text(line, style="dim"), soft_wrap=True)
    for line in cut_sentences(results, NAMES) + warnings(results, NAMES):
        console.print(Text(line, style="yellow"), soft_wrap=True)
    console.print(Text(f"report: {folder / 'index.html'}", style="bold"), soft_wrap=True)


def evaluation_of(folder: Path) -> Path:
    """Return the artifact of evaluate that a report shows; another experiment's if it was taken."""
    manifest = folder / "manifest.json"
    config = json.loads(manifest.read_text(encoding="utf-8"))["config"] if manifest.is_file() else {}
    taken = config.get("from", {}).get("evaluate")
    return folder.parent / ("evaluate" if taken is None else taken["folder"])


def policy_table(results: dict[str, Any]) -> Any:
    """Return the table of policies, without the columns that have no value, the best row green.

    Args:
        results: results.json, completed.
    """
    from rich.table import Table

    policies, judge = results["policies"], results["judge_name"]
    rows = {name: cells_of(name, policy) for name, policy in policies.items()}
    columns = [c for c in next(iter(rows.values())) if any(row[c] != NONE for row in rows.values())]
    table = Table(header_style="bold", box=None, padding=(0, 2, 0, 0))
    table.add_column("policy", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    # A policy that maximised the judge's score does not count as the best by that judge.
    values = {name: quality(policy, judge) for name, policy in policies.items() if not policy["judge_climbed"]}
    fairly_judged = {name: value for name, value in values.items() if value is not None}
    best = max(fairly_judged, key=lambda name: fairly_judged[name], default=None)
    for name, row in rows.items():
        label = NAMES.get(name, name) + marks(policies[name])
        table.add_row(label, *(row[column] for column in columns), style="green" if name == best else "")
    return table


def cells_of(name: str, policy: dict[str, Any]) -> dict[str, str]:
    """Return a policy's cells by column, `NONE` where there is no number."""
    rate = policy["win_rate_vs_sft"]
    won = NONE if name == "sft" or not rate else f"{percent(rate['value'])}  ({interval(*rate['ci95'])})"
    return {
        "gold": fixed((policy["gold"] or {}).get("overall"), 3),
        "new tasks": fixed((policy["gold_held_out_tasks"] or {}).get("overall"), 3),
        "score": fixed(policy["score"]),
        "win rate against SFT": won,
        "KL to SFT": fixed(policy["kl_to_sft"], 1),
        "perplexity": fixed(policy["pretrain_perplexity"]),
        "length": fixed(policy["length"], 1),
    }


def other_judges(results: dict[str, Any]) -> list[str]:
    """Return lines on the judges beside the one that decides, and on the kept judge's accuracy.

    Args:
        results: results.json, completed.
    """
    lines, policies = [], results["policies"]
    kept = results["judges"].get("kept") or {}
    if number(kept.get("accuracy")) is not None:
        span = f" ({interval(*kept['accuracy_ci95'], 1)})" if kept["accuracy_ci95"] else ""
        lines.append(f"kept judge: correct on {percent(kept['accuracy'], 1)} of held-out pairs{span}")
    for judge in results["judges"]:
        if judge == results["judge_name"]:
            continue
        parts = []
        for name, policy in policies.items():
            rate = policy["judges"][judge]["win_rate_vs_sft"]
            if name != "sft" and rate:
                mark = " †" if policy["judges"][judge]["climbed"] else ""
                parts.append(f"{NAMES.get(name, name)} {percent(rate['value'])}{mark} ({interval(*rate['ci95'])})")
        if parts:
            line = f"win rates by {judge_name(judge)}: {', '.join(parts)}"
            lines += textwrap.wrap(line, WIDTH, subsequent_indent="  ")
    return lines


def reward_model_line(reward_model: dict[str, Any]) -> str:
    """Return a line on the reward model's accuracy; "" where there is no reward model."""
    if number(reward_model["accuracy"]) is None:
        return ""
    span = f" ({interval(*reward_model['accuracy_ci95'], 1)})" if reward_model["accuracy_ci95"] else ""
    line = f"reward model: correct on {percent(reward_model['accuracy'], 1)} of held-out pairs{span}"
    references = []
    if number(reward_model["accuracy_ceiling"]) is not None:
        references.append(f"best possible {fixed(100 * reward_model['accuracy_ceiling'], 1)}")
    if number(reward_model["labeler_agreement"]) is not None:
        references.append(f"labelers {fixed(100 * reward_model['labeler_agreement'], 1)}")
    return f"{line}; {', '.join(references)}" if references else line
