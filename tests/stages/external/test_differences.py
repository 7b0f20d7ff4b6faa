"""Test differences of two policies by lm-eval's figures."""

import numpy as np
import pytest

from stages.external.differences import difference
from stages.external.harness import Found


def found(values, stderr=0.1, task="colors", metric="acc,none", value=None, docs=None, group=None):
    """Return what lm-eval would have found: a number per document, and their mean."""
    docs = docs or [f"doc {i}" for i in range(len(values))]
    name, _, kind = metric.partition(",")
    samples = [
        {"task": task, "doc_id": i, "doc": doc, "filter": kind, "metrics": {} if x is None else {name: x}}
        for i, (x, doc) in enumerate(zip(values, docs, strict=True))
    ]
    mean = np.mean(values) if value is None else value
    figure = {"value": float(mean), "stderr": stderr, "n": len(values)}
    tasks = {task: {"of": []}} | ({} if group is None else {group: {"of": [task]}})
    return Found({name: {metric: figure} for name in tasks}, samples, tasks, "chat")


def test_the_same_documents_are_paired():
    rng = np.random.default_rng(0)
    ours, theirs = rng.integers(0, 2, 50).astype(float), rng.integers(0, 2, 50).astype(float)
    gap = difference(found(ours.tolist()), found(theirs.tolist()), "colors", "acc,none")
    assert gap["paired"] and gap["n"] == 50
    assert gap["value"] == pytest.approx((ours - theirs).mean())
    assert gap["stderr"] == pytest.approx((ours - theirs).std(ddof=1) / np.sqrt(50))
    assert (gap["ci95"][0] + gap["ci95"][1]) / 2 == pytest.approx(gap["value"])
    assert (gap["ci95"][1] - gap["value"]) / gap["stderr"] == pytest.approx(2.0096, abs=1e-3), "t of 49 degrees"


def test_a_policy_that_always_gains_the_same_has_no_error():
    gap = difference(found([1.0, 0.5]), found([0.5, 0.0]), "colors", "acc,none")
    assert gap["stderr"] == 0 and gap["value"] == 0.5


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (found([1.0, 0.0], docs=["a", "b"]), found([1.0, 1.0], docs=["a", "c"])),  # other documents
        (found([1.0, 0.0, 1.0]), found([1.0, 1.0])),  # more documents
        (found([None, None], value=20.0), found([None, None], value=21.0)),  # no number per document
        (found([1.0, 0.0], value=0.7), found([1.0, 1.0])),  # the figure is not the mean
    ],
)
def test_other_figures_are_not_paired(ours, theirs):
    gap = difference(ours, theirs, "colors", "acc,none")
    assert not gap["paired"] and gap["stderr"] == pytest.approx(np.hypot(0.1, 0.1))
    values = [found.metrics["colors"]["acc,none"]["value"] for found in (ours, theirs)]
    assert gap["value"] == pytest.approx(values[0] - values[1])


def test_without_errors_there_is_no_interval():
    gap = difference(found([None], None, value=2.0), found([None], None, value=1.5), "colors", "acc,none")
    assert gap == {"value": 0.5, "stderr": None, "ci95": None, "n": 1, "paired": False}
    assert difference(found([1.0]), found([1.0], metric="f1,none"), "colors", "acc,none") is None


def test_a_group_is_paired_over_its_tasks():
    gap = difference(found([1.0, 0.0], group="all"), found([0.0, 0.0], group="all"), "all", "acc,none")
    assert gap["paired"] and gap["n"] == 2 and gap["value"] == 0.5
