"""Measure how far a reward model can be trusted: accuracy, calibration, labelers' agreement."""

from collections.abc import Sequence
from typing import Any

from data.groups import Pair, PromptGroup
from data.records import Ranking
from stages.evaluation.statistics import (
    accuracy_by,
    agreement_figures,
    agreements,
    calibration_interval,
    expected_calibration_error,
    pair_accuracy,
    reliability,
    share_of_counts,
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

    def cluster_of(ranking: Ranking) -> str:
        return clusters[ranking.id]

    distance = [r[pair.loser] - r[pair.winner] for r, (_, pair) in zip(ranks, owners, strict=True)]
    return {
        **pair_accuracy(margins, pair_clusters),
        "longer_wins": pair_accuracy(longer, pair_clusters),
        "ece": expected_calibration_error(margins),
        "ece_ci95": calibration_interval(margins, pair_clusters),
        "reliability": reliability(margins),
        "accuracy_by_k": accuracy_by(margins, [sum(x is not None for x in r) for r in ranks], pair_clusters),
        "accuracy_by_rank_distance": accuracy_by(margins, distance, pair_clusters),
        "accuracy_by_labeler": accuracy_by(margins, labelers, pair_clusters),
        **by_source(margins, longer, sources, pair_clusters),
        **agreement_figures(validation, cluster_of),
        "agreement_by_labelers": {
            f"{one} / {other}": two_labelers(by_prompt)
            for (one, other), by_prompt in sorted(agreements(validation, cluster_of).items())
        },
    }


def two_labelers(by_prompt: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """Return how often two labelers agree.

    Args:
        by_prompt: As of `agreements`.
    """
    estimate = share_of_counts(by_prompt)
    return {"agreement": estimate["value"], "agreement_ci95": estimate["ci95"], "n_pairs": estimate["n"]}


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
