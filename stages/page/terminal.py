"""The table that ends a run: results.json in, lines on a console out."""

import json
from pathlib import Path

from pipeline.errors import UserError
from stages.page.trust import warnings
from stages.page.words import (
    NAMES,
    NONE,
    complete,
    cut_sentences,
    fixed,
    interval,
    marks,
    notes,
    number,
    percent,
    quality,
)


def show(folder: Path, console) -> None:
    """Print what results.json says, and where the page is. `folder`: the report's artifact."""
    from rich.table import Table
    from rich.text import Text

    file = folder.parent / "evaluate" / "results.json"
    if not file.is_file():
        raise UserError(f"{file}: is missing; `rlhf run evaluate -c CONFIG` makes it")
    results = complete(json.loads(file.read_text(encoding="utf-8")))
    policies = results["policies"]
    table = Table(header_style="bold", box=None, padding=(0, 2, 0, 0))
    rows = {name: figures_of(name, p) for name, p in policies.items()}
    columns = [c for c in next(iter(rows.values())) if any(row[c] != NONE for row in rows.values())]
    table.add_column("policy", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    fair = [n for n, p in policies.items() if not p["judge_climbed"] and quality(p) is not None]
    best = max(fair, key=lambda n: quality(policies[n]), default=None)  # what climbed its judge is no winner by it
    for name, row in rows.items():
        cells = [NAMES.get(name, name) + marks(policies[name]), *(row[column] for column in columns)]
        table.add_row(*cells, style="green" if name == best else "")
    title = f"\n{folder.parent.name}: policies on evaluation prompts"  # a title of the table's would wrap with it
    console.print(Text(title, style="bold"), soft_wrap=True)
    console.print(table)
    if line := reward_model_line(results["reward_model"]):
        console.print(Text(f"\n{line}"))
    for line in notes(results):
        console.print(Text(line, style="dim"), soft_wrap=True)
    for line in cut_sentences(results, NAMES) + warnings(results, NAMES):
        console.print(Text(line, style="yellow"), soft_wrap=True)
    console.print(Text(f"report: {folder / 'index.html'}", style="bold"), soft_wrap=True)


def figures_of(name: str, p: dict) -> dict[str, str]:
    """Return a policy's cells by column; NONE where there is no number."""
    rate = p["win_rate_vs_sft"]
    won = NONE if name == "sft" or not rate else f"{percent(rate['value'])}  ({interval(*rate['ci95'])})"
    return {
        "gold": fixed((p["gold"] or {}).get("overall"), 3),
        "new tasks": fixed((p["gold_held_out_tasks"] or {}).get("overall"), 3),
        "score": fixed(p["score"]),
        "win rate against SFT": won,
        "KL to SFT": fixed(p["kl_to_sft"], 1),
        "perplexity": fixed(p["pretrain_perplexity"]),
        "length": fixed(p["length"], 1),
    }


def reward_model_line(rm: dict) -> str:
    """Say how often the reward model is right; "" where there is none."""
    if number(rm["accuracy"]) is None:
        return ""
    beside = [
        f"{text} {fixed(100 * rm[key], 1)}"
        for key, text in (("accuracy_ceiling", "best reachable"), ("labeler_agreement", "labelers"))
        if number(rm[key]) is not None
    ]
    more = f"; {', '.join(beside)}" if beside else ""
    span = f" ({interval(*rm['accuracy_ci95'], 1)})" if rm["accuracy_ci95"] else ""
    return f"reward model: right on {percent(rm['accuracy'], 1)} of held-out pairs{span}{more}"
