"""Compare what lm-eval found of two policies, document by document where that is possible."""

import math
from collections.abc import Sequence
from typing import Any

from stages.evaluation.statistics import difference_estimate
from stages.external.harness import Found

CLOSE = 1e-6
"""Differences of two means that count as the same."""


def difference(ours: Found, theirs: Found, task: str, metric: str) -> dict[str, Any] | None:
    """Estimate how far a metric of one policy is above that of another.

    Where the metric is the mean of a number per document, the difference is paired: its error is
    that of the mean of the documents' differences, which is smaller than that of two figures apart.
    Of a group the documents of all its tasks are taken together, where its figure is their mean.

    Args:
        ours: The policy.
        theirs: The other one.
        task: A task or group.
        metric: "acc,none": the metric's name and its filter.

    Returns:
        {value, stderr, ci95, n, paired}; stderr and ci95 are None where they are not known, and the
        whole is None where either has no such figure.
    """
    mine, other = (found.metrics.get(task, {}).get(metric) for found in (ours, theirs))
    if mine is None or other is None:
        return None
    value = mine["value"] - other["value"]
    pairs = paired_values(ours, theirs, task, metric)
    if pairs and abs(sum(a - b for a, b in pairs) / len(pairs) - value) < CLOSE:
        estimate = difference_estimate([a for a, _ in pairs], [b for _, b in pairs], range(len(pairs)))
        return {"value": value, "stderr": stderr_of(pairs), "ci95": estimate["ci95"], "n": len(pairs), "paired": True}
    if mine["stderr"] is None or other["stderr"] is None:
        return {"value": value, "stderr": None, "ci95": None, "n": mine["n"], "paired": False}
    stderr = math.hypot(mine["stderr"], other["stderr"])
    ci95 = [value - 1.96 * stderr, value + 1.96 * stderr]
    return {"value": value, "stderr": stderr, "ci95": ci95, "n": mine["n"], "paired": False}


def paired_values(ours: Found, theirs: Found, task: str, metric: str) -> list[tuple[float, float]]:
    """Return both policies' numbers for each document; [] unless all documents are the same."""
    leaves = leaf_tasks(ours, task)
    mine, other = (values_of(found, leaves, metric) for found in (ours, theirs))
    if not mine or mine.keys() != other.keys():
        return []
    return [(mine[key], other[key]) for key in mine]


def values_of(found: Found, tasks: Sequence[str], metric: str) -> dict[tuple[str, int, str], float]:
    """Return {(task, document's number, its digest): number} of the documents of some tasks."""
    name, _, kind = metric.partition(",")
    return {
        (row["task"], row["doc_id"], row["doc"]): row["metrics"][name]
        for row in found.samples
        if row["task"] in tasks and row["filter"] == kind and name in row["metrics"]
    }


def leaf_tasks(found: Found, name: str) -> list[str]:
    """Return the tasks that a group consists of, directly or not; of a task, itself."""
    parts = found.tasks.get(name, {}).get("of") or []
    return [leaf for part in parts for leaf in leaf_tasks(found, part)] if parts else [name]


def stderr_of(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Return the standard error of the mean difference of pairs; None with one pair."""
    if len(pairs) < 2:
        return None
    gaps = [a - b for a, b in pairs]
    mean = sum(gaps) / len(gaps)
    return math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1) / len(gaps))
