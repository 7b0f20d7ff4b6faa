"""Measure how far a reward model can be trusted: accuracy, calibration, labelers' agreement."""

from collections.abc import Sequence
from typing import Any

from data.groups import Pair, PromptGroup
from data.records import Ranking
from stages.evaluation.statistics import (
    accuracy_by,
    agreements,
    expected_calibration_error,
    labeler_agreement,
    pair_accuracy,
    reliability,
)


def trust(
    margins: list[float],
    owners: list[tuple[int, Pair]],
    held: Sequence[PromptGroup],
    validation: list[Ranking],
    clusters: dict[str, str],
) -> dict[str, Any]:
    """Return accuracy, in all and broken down, calibration, and the labelers' agreement.

    Args:
        margins: For each held-out pair, the score of the preferred response minus the other one's.
        owners: Index of the held-out group, and the pair, of each margin.
        held: The held-out groups.
        validation: The rankings that they were made of.
        clusters: Cluster of each ranking, by its id; intervals are clustered by them.

    Returns:
        Figures for the manifest.
    """
    pair_clusters, ranks, labelers = [], [], []
    for g, pair in owners:
        group = held[g]  # it is read from a file
        pair_clusters.append(clusters[group.id])
        ranks.append(group.rankings()[pair.labeler])
        labelers.append(group.labelers[pair.labeler] or "unnamed")
    distance = [r[pair.loser] - r[pair.winner] for r, (_, pair) in zip(ranks, owners, strict=True)]
    return {
        **pair_accuracy(margins, pair_clusters),
        "ece": expected_calibration_error(margins),
        "reliability": reliability(margins),
        "accuracy_by_k": accuracy_by(margins, [sum(x is not None for x in r) for r in ranks], pair_clusters),
        "accuracy_by_rank_distance": accuracy_by(margins, distance, pair_clusters),
        "accuracy_by_labeler": accuracy_by(margins, labelers, pair_clusters),
        "labeler_agreement": labeler_agreement(validation),
        "agreement_by_labelers": {
            f"{one} / {other}": {"agreement": same / total, "n_pairs": total}
            for (one, other), (same, total) in sorted(agreements(validation).items())
        },
    }
