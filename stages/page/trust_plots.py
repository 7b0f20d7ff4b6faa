"""Choose the plots that show whether the score still measures what it should."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.evaluation.statistics import mean_estimate, share_estimate
from stages.page.numbers import number
from stages.page.plot import Cloud, Curves, Dots, Key, Label, Line, Mark, Plot, Spans
from stages.page.trust import cluster_of

FEWEST_RESPONSES = 10
"""Finished responses below which a policy has no curve of score against length."""
SCORE, GOLD = "score of the reward model", "gold, overall (0 to 1)"


@dataclass(frozen=True)
class Bin:
    """A group of points by x, with the mean of their y."""

    x: float
    """The mean x."""
    y: float
    """The mean y."""
    low: float
    """The lower end of the 95 % interval of the mean y; the mean where there is none."""
    high: float
    """The upper end."""


def length_plots(samples: list[dict[str, Any]], policies: Sequence[str], names: dict[str, str]) -> list[Plot]:
    """Return score against length over the responses that ended.

    Args:
        samples: Rows of responses.jsonl.
        policies: The policies, in order.
        names: Policy → its name on the page.

    Returns:
        The plot, or none for samples of an older version or without scores.
    """
    rows = [r for r in samples if r.get("finished") and number(r.get("score")) is not None and "length" in r]
    curves = {}
    for name in policies:
        points = [(row["length"], row["score"], cluster_of(row)) for row in rows if row["policy"] == name]
        if len(points) >= FEWEST_RESPONSES:
            curves[name] = binned(points, 5, mean_estimate)
    if not curves:
        return []
    marks: list[Mark] = []
    for name, bins in curves.items():
        tips = [f"{names[name]}: mean score {group.y:.2f} at {group.x:.1f} tokens" for group in bins]
        marks += [Line([(group.x, group.y) for group in bins], name, faint=name == "base"),
                  Spans([(group.x, group.low, group.high) for group in bins], name),
                  Dots([(group.x, group.y) for group in bins], name, tips=tips)]  # fmt: skip
    caption = (
        "Each policy's finished responses in five equal groups by length, with 95 % intervals. A steep rise means "
        "that the reward model pays for length."
    )
    keys = tuple(Key(names[name], name, "dot") for name in curves)
    drawing = Curves(marks, "length, tokens", "score")
    return [Plot("score-against-length", "Score against length", caption, drawing, keys, size="large")]


def gold_plots(samples: list[dict[str, Any]], policies: Sequence[str], names: dict[str, str]) -> list[Plot]:
    """Return gold against score, over all samples and policy by policy; no plots without gold.

    Args:
        samples: Rows of responses.jsonl.
        policies: The policies, in order.
        names: Policy → its name on the page.
    """
    rows = [row for row in samples if row.get("gold") and number(row.get("score")) is not None]
    points = {
        name: [(row["score"], row["gold"]["overall"], cluster_of(row)) for row in rows if row["policy"] == name]
        for name in policies
    }
    points = {name: some for name, some in points.items() if some}
    if not points:
        return []
    return [gold_over_all(points, names), gold_by_policy(points, names)]


def gold_over_all(points: dict[str, list[tuple[float, float, str]]], names: dict[str, str]) -> Plot:
    """Return gold against score over all samples.

    Args:
        points: Policy → (score, gold, cluster) of each sample.
        names: Policy → its name on the page.
    """
    bins = binned([point for some in points.values() for point in some], 10)
    marks: list[Mark] = [Cloud([(x, y) for x, y, _ in some], name) for name, some in points.items()]
    tips = [f"mean gold {group.y:.3f} at score {group.x:.2f}" for group in bins]
    means = [(group.x, group.y) for group in bins]
    spans = [(group.x, group.low, group.high) for group in bins]
    marks += [Line(means, "ink"), Spans(spans, "ink"), Dots(means, "ink", 7, tips)]
    caption = (
        "Each small dot is a response. The line is mean gold in ten equal groups by score, with 95 % intervals. It "
        "should rise all the way: where it bends down, a higher score means a worse response."
    )
    keys = tuple(Key(names[name], name, "dot") for name in points)
    drawing = Curves(marks, SCORE, GOLD, y_includes=(0.0, 1.0))
    return Plot("gold-against-score", "Gold against score, all samples", caption, drawing, keys, size="large")


def gold_by_policy(points: dict[str, list[tuple[float, float, str]]], names: dict[str, str]) -> Plot:
    """Return gold against score, policy by policy.

    Args:
        points: Policy → (score, gold, cluster) of each sample.
        names: Policy → its name on the page.
    """
    marks: list[Mark] = []
    for name, some in points.items():
        bins = [(group.x, group.y) for group in binned(some, 5)]
        marks += [Line(bins, name, faint=name == "base"), Dots(bins, name, 4.5)]
    labels = []
    for name, some in points.items():
        score, gold = (float(np.mean([point[i] for point in some])) for i in (0, 1))
        marks.append(Dots([(score, gold)], name, 11, [f"{names[name]}: mean gold {gold:.3f}, mean score {score:.2f}"]))
        labels.append(Label(score, gold, names[name], name))
    caption = (
        "Each policy's samples in five equal groups by score, and their mean as the large marker. Where the line of a "
        "trained policy runs below SFT's, the reward model overrates it at the same score: over-optimisation."
    )
    drawing = Curves([*marks, *labels], SCORE, GOLD)
    return Plot("gold-against-score-by-policy", "Gold against score, policy by policy", caption, drawing, size="large")


def calibration(rm: dict[str, Any]) -> list[Plot]:
    """Return the reward model's accuracy by its confidence, and by the distance of ranks.

    Args:
        rm: Metrics of the manifest of rm. What an older version lacks is left out.
    """
    plots = []
    if groups := rm.get("reliability"):
        points = [(group["confidence"], group["accuracy"]) for group in groups]
        tips = [f"correct on {g['accuracy']:.1%} of {g['n_pairs']} pairs at confidence {g['confidence']:.3f}"
                for g in groups]  # fmt: skip
        marks = [Line([(0.5, 0.5), (1.0, 1.0)], "soft", faint=True), Line(points, "rm"), Dots(points, "rm", 7, tips)]
        caption = (
            "Held-out pairs in groups by confidence. On the pale line, the reward model is correct as often as it "
            "claims; below it, it is overconfident."
        )
        drawing = Curves(marks, "confidence: σ(score difference)", "share of pairs correct", y_includes=(0.4, 1.0))
        keys = (Key("reward model", "rm"), Key("perfect calibration", "soft", "faint"))
        title = "How well is the reward model calibrated?"
        plots.append(Plot("rm-calibration", title, caption, drawing, keys, size="large"))
    distances = rm.get("accuracy_by_rank_distance") or {}
    if len(distances) > 1:
        points = [(float(distance), group["accuracy"]) for distance, group in distances.items()]
        tips = [f"correct on {group['accuracy']:.1%} of {group['n_pairs']} pairs {distance} apart"
                for distance, group in distances.items()]  # fmt: skip
        caption = "Neighbours in a ranking are the hard pairs; the first and the last are the easy ones."
        drawing = Curves([Line(points, "rm"), Dots(points, "rm", 7, tips)], "ranks apart", "share of pairs correct",
                         y_includes=(0.5, 1.0))  # fmt: skip
        plots.append(Plot("rm-rank-distance", "Accuracy by rank distance", caption, drawing, size="large"))
    return plots


def binned(
    points: Sequence[tuple[float, float, str]],
    bins: int,
    estimate: Callable[[Sequence[float], Sequence[str]], dict[str, Any]] = share_estimate,
) -> list[Bin]:
    """Group points by x and estimate the mean of y in each group.

    Args:
        points: (x, y, cluster) of each; y is in [0, 1] where the estimate is that of a share.
        bins: How many groups of equal size.
        estimate: `share_estimate` or `mean_estimate`, whose intervals are over clusters.
    """
    ordered = sorted(points)
    groups = []
    for indices in np.array_split(np.arange(len(ordered)), min(bins, len(ordered))):
        xs, ys, clusters = zip(*(ordered[i] for i in indices), strict=True)
        mean = estimate(ys, clusters)
        low, high = mean["ci95"] or (mean["value"], mean["value"])
        groups.append(Bin(float(np.mean(xs)), mean["value"], low, high))
    return groups
