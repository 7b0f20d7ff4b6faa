"""The report's tables as values: what `evaluate` found in, Tables out (report.html.j2 draws them). Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from stages.page.words import NONE, fixed, interval, marks, percent

MANY = 10
"""Rows of a table of labelers above which it is folded."""


@dataclass(frozen=True)
class Cell:
    """A cell: its text, a smaller line below it, the policy or stage whose colour marks it, and how it is set."""

    text: str
    small: str = ""
    tone: str = ""
    strong: bool = False
    code: bool = False


@dataclass(frozen=True)
class Table:
    """A table. label: what it shows, read out in place of a heading; left: columns that are text, and may wrap;
    folded: the line that unfolds it, "" where it stands open."""

    label: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    left: frozenset[int] = frozenset({0})
    folded: str = ""


def dense(table: Table) -> Table:
    """Return the table without the columns that have no value in any row; the first one stays."""
    kept = [i for i in range(len(table.columns)) if i == 0 or any(row[i].text not in ("", NONE) for row in table.rows)]
    return Table(
        table.label,
        tuple(table.columns[i] for i in kept),
        tuple(tuple(row[i] for i in kept) for row in table.rows),
        frozenset(kept.index(i) for i in table.left if i in kept),
        table.folded,
    )


def cell(value, digits: int, ci95: Sequence[float] | None = None) -> Cell:
    """Return a number with its 95 % interval below it."""
    return Cell(fixed(value, digits), f"{fixed(ci95[0], digits)} to {fixed(ci95[1], digits)}" if ci95 else "")


def share(value, ci95: Sequence[float] | None = None, digits: int = 1) -> Cell:
    """Return a share in percent with its 95 % interval below it."""
    return Cell(percent(value, digits), f"{interval(*ci95, digits)}\u00a0%" if ci95 else "")


def policy(name: str, names: dict[str, str], mark: str = "") -> Cell:
    """Return the cell that names a policy."""
    return Cell(names.get(name, name) + mark, tone=name)


def results_tables(results: dict, names: dict[str, str]) -> list[Table]:
    """Tables of the policies: the main one, gold in parts, and the reward model's.

    Args:
        results: results.json, completed.
        names: Policy → its name on the page.
    """
    main, parts = [], []
    for name, p in results["policies"].items():
        ci, gold, new = p["ci95"], p["gold"] or {}, p["gold_held_out_tasks"] or {}
        rate = {} if name == "sft" else p["win_rate_vs_sft"] or {}
        quality = cell(gold.get("overall"), 3, gold.get("ci95"))
        main.append(
            (
                policy(name, names, marks(p)),
                Cell(quality.text, quality.small, strong=True),
                cell(new.get("overall"), 3, new.get("ci95")),
                cell(p["score"], 2, ci["score"]),
                cell(rate.get("value"), 3, rate.get("ci95")),
                cell(p["kl_to_sft"], 2, ci["kl_to_sft"]),
                cell(p["length"], 1, ci["length"]),
                Cell(percent(p["eos_rate"], 1)),
                cell(p["pretrain_perplexity"], 2, ci["pretrain_perplexity"]),
            )
        )
        known = p["gold_known_tasks"] or {}
        figures = [cell(gold.get(part), 3) for part in ("helpful", "honest", "harmless")]
        parts.append((policy(name, names), *figures, cell(known.get("overall"), 3, known.get("ci95"))))
    columns = ("policy", "gold, 95 % interval", "gold on held-out tasks", "reward model score",
               "win rate against SFT", "KL to SFT, nats a response", "length, tokens", "ended by itself",
               "pretraining perplexity")  # fmt: skip
    tables = [Table("Policies on the evaluation prompts", columns, tuple(main))]
    if results["judge"] == "gold":
        columns = ("gold in parts", "helpful", "honest", "harmless", "on known tasks")
        tables.append(Table("Gold in parts", columns, tuple(parts)))
    return [dense(table) for table in [*tables, *reward_model_table(results["reward_model"])]]


def reward_model_table(rm: dict) -> list[Table]:
    """Return the table of how far the reward model can be trusted; [] where nothing was measured of one."""
    if rm["accuracy"] is None:
        return []
    orders = rm["orders_as_gold"] or {}
    halves = [orders.get(half) or {} for half in ("known_tasks", "held_out_tasks")]
    columns = ("model", "accuracy, 95 % interval", "best reachable on these labels", "two labelers agree",
               "pairs held out", "calibration error (ECE)", "orders as gold, known tasks",
               "orders as gold, held-out tasks")  # fmt: skip
    row = (
        Cell("reward model", tone="rm"),
        share(rm["accuracy"], rm["accuracy_ci95"]),
        share(rm["accuracy_ceiling"]),
        share(rm["labeler_agreement"]),
        Cell(NONE if rm["n_pairs"] is None else f"{rm['n_pairs']:,}"),
        cell(rm["ece"], 3),
        *(share(half.get("value"), half.get("ci95")) for half in halves),
    )
    return [Table("The reward model on held-out pairs", columns, (row,))]


def accuracy_tables(rm: dict) -> list[Table]:
    """Return the reward model's accuracy in parts, and how often labelers agree; folded where labelers are many.

    Args:
        rm: Metrics of rm's manifest; parts that an older version lacks give no table.
    """
    tables = []
    for key, label, which in (
        ("accuracy_by_k", "Accuracy by K, the responses of a ranking", "K"),
        ("accuracy_by_labeler", "Accuracy by labeler", "labeler"),
    ):
        parts = rm.get(key) or {}
        rows = tuple(
            (Cell(name), share(part["accuracy"], part.get("accuracy_ci95")), Cell(f"{part['n_pairs']:,}"))
            for name, part in parts.items()
        )
        tables.append(Table(label, (which, "right, 95 % interval", "pairs"), rows, folded=fold(label, rows)))
    pairs = rm.get("agreement_by_labelers") or {}
    rows = tuple((Cell(name), share(part["agreement"]), Cell(f"{part['n_pairs']:,}")) for name, part in pairs.items())
    label = "How often two labelers agree"
    tables.append(Table(label, ("labelers", "agree", "pairs"), rows, folded=fold(label, rows)))
    return [table for table in tables if table.rows]


def fold(label: str, rows: Sequence) -> str:
    """Return the line that a long table is folded behind; "" for a short one."""
    return f"{label}: {len(rows)} rows" if len(rows) > MANY else ""
