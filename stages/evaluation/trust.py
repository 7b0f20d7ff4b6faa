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

MANY_SOURCES = 50
"""Sources of rankings above which accuracy is not given for each."""


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
    source_of = {ranking.id: ranking.source for ranking in validation}
    pair_clusters, ranks, labelers, sources, longer = [], [], [], [], []
    for g, pair in owners:
        group = held[g]  # it is read from a file
        pair_clusters.append(clusters[group.id])
        ranks.append(group.rankings()[pair.labeler])
        labelers.append(group.labelers[pair.labeler] or "unnamed")
        sources.append(source_of.get(group.id) or "unnamed")
        # the prior that any score has to beat: the longer response is better
        longer.append(float(len(group.responses[pair.winner]) - len(group.responses[pair.loser])))
    distance = [r[pair.loser] - r[pair.winner] for r, (_, pair) in zip(ranks, owners, strict=True)]
    return {
        **pair_accuracy(margins, pair_clusters),
        "longer_wins": pair_accuracy(longer, pair_clusters),
        "ece": expected_calibration_error(margins),
        "reliability": reliability(margins),
        "accuracy_by_k": accuracy_by(margins, [sum(x is not None for x in r) for r in ranks], pair_clusters),
        "accuracy_by_rank_distance": accuracy_by(margins, distance, pair_clusters),
        "accuracy_by_labeler": accuracy_by(margins, labelers, pair_clusters),
        **by_source(margins, longer, sources, pair_clusters),
        "labeler_agreement": labeler_agreement(validation),
        "agreement_by_labelers": {
            f"{one} / {other}": {"agreement": same / total, "n_pairs": total}
            for (one, other), (same, total) in sorted(agreements(validation).items())
        },
    }


def by_source(
    margins: list[float], longer: list[float], sources: list[str], clusters: list[str]
) -> dict[str, dict[str, Any]]:
    """Return accuracy, and that of "the longer response is better", for each source of the pairs.

    Args:
        margins: As of `trust`.
        longer: For each pair, the preferred response's tokens minus the other one's.
        sources: The data set that each pair comes from.
        clusters: The cluster of each pair.

    Returns:
        {"accuracy_by_source", "longer_wins_by_source"}; nothing if there is one source, or if
        there are more than MANY_SOURCES, whose names then say something else.
    """
    if not 1 < len(set(sources)) <= MANY_SOURCES:
        return {}
    return {
        "accuracy_by_source": accuracy_by(margins, sources, clusters),
        "longer_wins_by_source": accuracy_by(longer, sources, clusters),
    }
