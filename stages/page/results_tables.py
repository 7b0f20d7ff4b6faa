"""Build the tables of results: of the policies and of the reward model."""

from collections.abc import Sequence
from typing import Any

from stages.page.numbers import NONE, listed, number
from stages.page.results import JUDGES
from stages.page.sentences import marks
from stages.page.table import (
    Cell,
    Table,
    dense,
    erring_cell,
    estimate_cell,
    gold_cell,
    policy_cell,
    share_cell,
    value_cell,
)

MANY = 10
"""Rows above which a table of labelers is folded."""


# -- policies ------------------------------------------------------------------------------------


def policy_tables(results: dict[str, Any], names: dict[str, str]) -> list[Table]:
    """Return the tables of policies, of gold in parts and of the reward model.

    Args:
        results: results.json, completed.
        names: Policy → its name on the page.
    """
    policies = results["policies"]
    rows = tuple(policy_row(name, policy, names) for name, policy in policies.items())
    columns = ("policy", "gold, 95 % interval", "gold on held-out tasks", "reward model score",
               "win rate against SFT", "KL to SFT, nats per response", "length, tokens", "ended by itself",
               "pretraining perplexity")  # fmt: skip
    tables = [Table("Policies on the evaluation prompts", columns, rows)]
    if results["judge"] == "gold":
        rows = tuple(gold_row(name, policy, names) for name, policy in policies.items())
        columns = ("policy", "helpful", "honest", "harmless", "overall, on known tasks")
        tables.append(Table("Gold in parts", columns, rows))
    tables += differences_table(policies, names) + judges_tables(results, names)
    tables += reward_model_table(results["reward_model"])
    return [dense(table) for table in tables]


def policy_row(name: str, policy: dict[str, Any], names: dict[str, str]) -> tuple[Cell, ...]:
    """Return a policy's row of the main table."""
    ci95 = policy["ci95"]
    gold = gold_cell(policy["gold"])
    return (
        policy_cell(name, names, marks(policy)),
        Cell(gold.text, gold.small, strong=True),
        gold_cell(policy["gold_held_out_tasks"]),
        value_cell(policy["score"], 2, ci95["score"]),
        estimate_cell(None if name == "sft" else policy["win_rate_vs_sft"], 3),
        erring_cell(policy["kl_to_sft"], 2, ci95["kl_to_sft"], policy["se"]["kl_to_sft"]),
        value_cell(policy["length"], 1, ci95["length"]),
        share_cell(policy["eos_rate"], ci95["eos_rate"]),
        value_cell(policy["pretrain_perplexity"], 2, ci95["pretrain_perplexity"]),
    )


def gold_row(name: str, policy: dict[str, Any], names: dict[str, str]) -> tuple[Cell, ...]:
    """Return a policy's row of the table of gold in parts."""
    gold = policy["gold"] or {}
    ci95 = gold.get("parts_ci95") or {}
    parts = [value_cell(gold.get(part), 3, ci95.get(part)) for part in ("helpful", "honest", "harmless")]
    return (policy_cell(name, names), *parts, gold_cell(policy["gold_known_tasks"]))


def differences_table(policies: dict[str, dict[str, Any]], names: dict[str, str]) -> list[Table]:
    """Return the table of differences to SFT, paired by prompt; none where nothing is compared.

    Args:
        policies: The policies of results.json, completed.
        names: Policy → its name on the page.
    """
    rows = []
    for name, policy in policies.items():
        found = policy["differences_to_sft"]
        if name != "sft" and any(found.values()):
            ended = found["eos_rate"] or {}
            in_percent = [100 * end for end in ended["ci95"]] if ended.get("ci95") else None
            value = None if number(ended.get("value")) is None else 100 * ended["value"]
            rows.append((
                policy_cell(name, names),
                estimate_cell(found["score"], 2),
                estimate_cell(found["length"], 1),
                value_cell(value, 1, in_percent),
                estimate_cell(found["pretrain_perplexity"], 2),
            ))  # fmt: skip
    columns = ("policy", "reward model score", "length, tokens", "ended by itself, percentage points",
               "pretraining perplexity")  # fmt: skip
    return [Table("Differences to SFT on the same prompts, 95 % intervals", columns, tuple(rows))] if rows else []


# -- judges --------------------------------------------------------------------------------------


def judges_tables(results: dict[str, Any], names: dict[str, str]) -> list[Table]:
    """Return what each judge says of the policies, and how far each can be trusted.

    Args:
        results: results.json, completed.
        names: Policy → its name on the page.

    Returns:
        Two tables; none with one judge, whose verdicts are in the table of policies.
    """
    judges, policies = results["judges"], results["policies"]
    if len(judges) < 2:
        return []
    shown = {judge: JUDGES.get(judge, judge) for judge in judges}
    rows = tuple(
        (policy_cell(name, names), *(verdict_cell(policy["judges"][judge]) for judge in judges))
        for name, policy in policies.items()
        if name != "sft"
    )
    verdicts = Table("Win rate against SFT by each judge, 95 % intervals", ("policy", *shown.values()), rows)
    columns = ("judge", "what it is", "climbed by", "right on held-out pairs", "held-out pairs",
               "orders responses as gold does, known tasks",
               "orders responses as gold does, held-out tasks")  # fmt: skip
    about = tuple(judge_row(judge, shown[judge], judges[judge], names) for judge in judges)
    return [verdicts, Table("The judges", columns, about, left=frozenset({0, 1, 2}))]


def verdict_cell(verdict: dict[str, Any]) -> Cell:
    """Return a cell with a policy's win rate by a judge; marked where it climbed the judge."""
    if verdict["win_rate_vs_sft"] is None:
        return Cell("selected by it" if verdict["climbed"] else NONE)
    cell = estimate_cell(verdict["win_rate_vs_sft"], 3)
    return Cell(cell.text + (" †" if verdict["climbed"] else ""), cell.small)


def judge_row(name: str, shown: str, judge: dict[str, Any], names: dict[str, str]) -> tuple[Cell, ...]:
    """Return a judge's row of the table of judges."""
    orders = judge["orders_as_gold"] or {}
    known, held_out = (orders.get(half) or {} for half in ("known_tasks", "held_out_tasks"))
    return (
        Cell(shown),
        Cell(what_it_is(name, judge)),
        Cell(listed([names.get(policy, policy) for policy in judge["climbed"]]) or "nobody"),
        share_cell(judge["accuracy"], judge["accuracy_ci95"]),
        Cell(NONE if judge["n_pairs"] is None else f"{judge['n_pairs']:,}"),
        share_cell(known.get("value"), known.get("ci95")),
        share_cell(held_out.get("value"), held_out.get("ci95")),
    )


def what_it_is(name: str, judge: dict[str, Any]) -> str:
    """Return a clause that says what a judge is."""
    if name == "kept":
        count = "" if judge["rankings"] is None else f"{judge['rankings']:,} "
        apart = ", by labelers who rank for nothing else" if judge["labelers_apart"] else ""
        return f"a reward model of {count}rankings that train nothing else{apart}"
    known = {
        "gold": "the embedded world's own scorer",
        "reward_model": "the reward model that PPO maximises and best of n selects by"
        if judge["selected"] or not judge["climbed"]
        else "the reward model that PPO maximises",
        "held_out": "a reward model of another seed, of the same rankings",
    }
    return judge.get("what") or known.get(name, "")


# -- the reward model ----------------------------------------------------------------------------


def reward_model_table(reward_model: dict[str, Any]) -> list[Table]:
    """Return the table of the reward model on held-out pairs; none where it was not measured."""
    if number(reward_model["accuracy"]) is None:
        return []
    orders = reward_model["orders_as_gold"] or {}
    known, held_out = (orders.get(half) or {} for half in ("known_tasks", "held_out_tasks"))
    columns = ("model", "accuracy, 95 % interval", "best possible on these labels", "two labelers agree",
               "held-out pairs", "calibration error (ECE)", "orders responses as gold does, known tasks",
               "orders responses as gold does, held-out tasks")  # fmt: skip
    row = (
        Cell("reward model", tone="rm"),
        share_cell(reward_model["accuracy"], reward_model["accuracy_ci95"]),
        share_cell(reward_model["accuracy_ceiling"], reward_model["accuracy_ceiling_ci95"]),
        share_cell(reward_model["labeler_agreement"], reward_model["labeler_agreement_ci95"]),
        Cell(NONE if reward_model["n_pairs"] is None else f"{reward_model['n_pairs']:,}"),
        value_cell(reward_model["ece"], 3, reward_model["ece_ci95"]),
        share_cell(known.get("value"), known.get("ci95")),
        share_cell(held_out.get("value"), held_out.get("ci95")),
    )
    return [Table("The reward model on held-out pairs", columns, (row,))]


def accuracy_tables(rm: dict[str, Any]) -> list[Table]:
    """Return the reward model's accuracy in parts, and how often two labelers agree.

    Args:
        rm: Metrics of the manifest of rm. Parts that an older version lacks give no table.
    """
    tables = source_tables(rm)
    for key, label, which in (
        ("accuracy_by_k", "Accuracy by K, the responses per ranking", "K"),
        ("accuracy_by_labeler", "Accuracy by labeler", "labeler"),
    ):
        parts = rm.get(key) or {}
        rows = tuple(
            (Cell(name), share_cell(part["accuracy"], part.get("accuracy_ci95")), Cell(f"{part['n_pairs']:,}"))
            for name, part in parts.items()
        )
        tables.append(Table(label, (which, "accuracy, 95 % interval", "pairs"), rows, folded=fold(label, rows)))
    label = "How often two labelers agree"
    pairs = rm.get("agreement_by_labelers") or {}
    rows = tuple(
        (Cell(name), share_cell(part["agreement"], part.get("agreement_ci95")), Cell(f"{part['n_pairs']:,}"))
        for name, part in pairs.items()
    )
    tables.append(Table(label, ("labelers", "agree, 95 % interval", "pairs"), rows, folded=fold(label, rows)))
    return [table for table in tables if table.rows]


def source_tables(rm: dict[str, Any]) -> list[Table]:
    """Return the reward model's accuracy by source beside that of preferring longer responses.

    Args:
        rm: Metrics of the manifest of rm. An older version lacks the second, and gives no table.
    """
    if "longer_wins" not in rm:
        return []
    parts = {"all": rm, **rm.get("accuracy_by_source", {})}
    priors = {"all": rm["longer_wins"], **rm.get("longer_wins_by_source", {})}
    rows = tuple(
        (
            Cell(name),
            share_cell(part["accuracy"], part.get("accuracy_ci95")),
            share_cell(priors[name]["accuracy"], priors[name].get("accuracy_ci95")),
            Cell(f"{part['n_pairs']:,}"),
        )
        for name, part in parts.items()
    )
    columns = ("held-out pairs", "reward model, 95 % interval", "if the longer response were better", "pairs")
    return [Table("Accuracy beside that of length", columns, rows)]


def fold(label: str, rows: Sequence[Any]) -> str:
    """Return the line that unfolds a long table; "" for a short one."""
    return f"{label}: {len(rows)} rows" if len(rows) > MANY else ""
