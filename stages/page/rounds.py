"""Show a round beside the rounds before it: what labels bought, and which reward model still ranks.

Everything comes from rounds.json, which evaluate writes for round 2 and later ones.
"""

import json
from pathlib import Path
from typing import Any

from stages.page.numbers import NONE, fixed, interval, number, percent
from stages.page.plot import Curves, Dots, Line, Mark, Plot, RowMark, Rows, Spans
from stages.page.table import Cell, Table, dense, estimate_cell, share_cell, value_cell

Rounds = dict[str, Any]
JUDGES = {"gold": "gold", "kept": "the kept judge", "reward_model": "this round's reward model"}
"""Who scores → how the page says it."""


def read(folder: Path) -> Rounds | None:
    """Return rounds.json of a stage evaluate; None in round 1."""
    path = folder / "rounds.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def judge_of(rounds: Rounds) -> str:
    """Return who scores the policies, in words."""
    by = next((row["score"]["by"] for row in rounds["rounds"] if row["score"]), None)
    return "nobody" if by is None else JUDGES.get(by, by)


def tables(rounds: Rounds | None) -> list[Table]:
    """Return a table of the rounds, and one of reward models against labels; none in round 1."""
    if rounds is None:
        return []
    return [rounds_table(rounds), *accuracy_table(rounds)]


def rounds_table(rounds: Rounds) -> Table:
    """Return a row for each round: its labels, its policy's score and its KL to the first SFT."""
    judge = judge_of(rounds)
    rows = []
    if rounds["first_sft"] is not None:
        nothing = [Cell(NONE)] * 3
        rows.append((Cell("SFT of round 1", tone="sft"), Cell(NONE), estimate_cell(rounds["first_sft"], 3), *nothing))
    for row in rounds["rounds"]:
        held = f"{row['held_out_labels']:,} held out" if row["held_out_labels"] else ""
        known = row["agreement"] or {}
        rows.append(
            (
                Cell(f"round {row['round']}", row["experiment"]),
                Cell(f"{row['labels']:,}", held),
                estimate_cell(row["score"], 3),
                estimate_cell(row["gain"], 3),
                value_cell(row["kl_to_first_sft"], 2),
                share_cell(known.get("value"), known.get("ci95")),
            )
        )
    head = ("round", "new rankings", f"policy by {judge}", "gain over the row above", "KL to the first SFT",
            "labelers agree")  # fmt: skip
    return dense(Table("Rounds of collecting and training", head, tuple(rows)))


def accuracy_table(rounds: Rounds) -> list[Table]:
    """Return how often each round's reward model is right on each round's labels; or nothing."""
    found = {(row["reward_model"], row["labels"]): row for row in rounds["accuracy"]}
    if not found:
        return []
    columns = sorted({labels for _, labels in found})
    rows = []
    for model in sorted({model for model, _ in found}):
        cells = [Cell(f"reward model of round {model}")]
        for labels in columns:
            row = found.get((model, labels), {})
            cells.append(share_cell(row.get("accuracy"), row.get("ci95")))
        rows.append(tuple(cells))
    pairs = {labels: found[model, labels]["n_pairs"] for model, labels in found}
    head = ("", *(f"labels of round {labels} ({pairs[labels]:,} pairs)" for labels in columns))
    return [Table("Correct pairs: each round's reward model on each round's held-out labels", head, tuple(rows))]


def sentences(rounds: Rounds | None) -> list[str]:
    """Return what the figures say of old reward models on new labels."""
    if rounds is None:
        return []
    last = rounds["rounds"][-1]["round"]
    found = {(row["reward_model"], row["labels"]): row for row in rounds["accuracy"]}
    lines = []
    for model in range(1, last):
        old, new = found.get((model, last)), found.get((last, last))
        if old is None or new is None:
            continue
        lines.append(
            f"On the labels of round {last}, the reward model of round {model} is right on "
            f"{percent(old['accuracy'], 1)} ({interval(*old['ci95'], 1)}) of pairs and that of round {last} on "
            f"{percent(new['accuracy'], 1)} ({interval(*new['ci95'], 1)})."
        )
    return lines


def plots(rounds: Rounds | None) -> list[Plot]:
    """Return the policies' scores by round, and the reward models' accuracy by labels."""
    if rounds is None:
        return []
    return [*score_plot(rounds), *accuracy_plot(rounds)]


def score_plot(rounds: Rounds) -> list[Plot]:
    """Return the score of each round's policy, from the first SFT on; no plot of fewer than two."""
    points: list[tuple[float, dict[str, Any], str]] = []
    if rounds["first_sft"] is not None:
        points.append((0.0, rounds["first_sft"], "SFT"))
    for row in rounds["rounds"]:
        if row["score"] is not None:
            points.append((float(row["round"]), row["score"], f"round {row['round']}"))
    if len(points) < 2:
        return []
    line = [(x, number(estimate["value"])) for x, estimate, _ in points]
    spans = [(x, *estimate["ci95"]) for x, estimate, _ in points if estimate["ci95"]]
    tips = [f"{name}: {fixed(estimate['value'], 3)}" for _, estimate, name in points]
    marks: list[Mark] = [Line(line, "ppo"), Spans(spans, "ppo"), Dots(line, "ppo", 9, tips)]
    caption = (
        f"Each round's policy on the same evaluation prompts, scored by {judge_of(rounds)}, with 95 % intervals; 0 is "
        f"the SFT of round 1."
    )
    drawing = Curves(marks, "round", f"score by {judge_of(rounds)}", x_includes=(0, len(rounds["rounds"]) + 0.5))
    return [Plot("rounds", "What each round bought", caption, drawing, size="large")]


def accuracy_plot(rounds: Rounds) -> list[Plot]:
    """Return a row for each reward model on each round's labels; or no plot."""
    rows = []
    last = rounds["rounds"][-1]["round"]
    for row in sorted(rounds["accuracy"], key=order_of_rows):
        tone = "rm" if row["reward_model"] == last else "base"
        name = f"labels {row['labels']}, reward model {row['reward_model']}"
        rows.append((name, [RowMark(row["accuracy"], tone, fixed(row["accuracy"], 3), row["ci95"])]))
    if not rows:
        return []
    caption = (
        "Share of held-out pairs that each round's reward model orders as people did. If an old one falls towards "
        "one half on newer labels, it no longer ranks what the newer policy answers."
    )
    drawing = Rows(rows, "correct pairs", reference=0.5)
    return [Plot("rounds-accuracy", "Does an old reward model still rank?", caption, drawing, size="large")]


def order_of_rows(row: dict[str, Any]) -> tuple[int, int]:
    """Return what rows of the accuracy are sorted by: the labels, then the reward model."""
    return row["labels"], row["reward_model"]


def line(rounds: Rounds | None) -> str:
    """Return the rounds in one line of a terminal; "" in round 1."""
    if rounds is None:
        return ""
    parts = []
    for row in rounds["rounds"]:
        text = f"round {row['round']}"
        if row["score"] is not None:
            ci95 = row["score"]["ci95"]
            text += f" {fixed(row['score']['value'], 3)}"
            text += f" ({fixed(ci95[0], 3)} to {fixed(ci95[1], 3)})" if ci95 else ""
        if number(row["kl_to_first_sft"]) is not None:
            text += f" at {fixed(row['kl_to_first_sft'], 1)} nats"
        parts.append(text)
    return f"rounds, by {judge_of(rounds)}, with KL to the first SFT: {'; '.join(parts)}"
