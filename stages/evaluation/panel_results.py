"""Say what each judge is worth, and what each says of the policies: `panel` of results.json. Pure.

The pairs of an evaluation are each policy's samples with SFT's of the same number. Lengths are in
characters, as judges see them.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from stages.evaluation import judging
from stages.evaluation.panel import Opinion, PeoplesPairs
from stages.evaluation.results import Measured


@dataclass(frozen=True)
class Pairs:
    """Pairs of a policy's samples with SFT's, or of responses that people ranked."""

    gaps: list[float]
    """The length of the first response minus that of the second, in characters."""
    clusters: list[Hashable]
    """The cluster of each pair."""


def panel_figures(
    measured: Mapping[str, Measured],
    clusters: Sequence[Hashable],
    opinions: Mapping[str, Opinion],
    people: PeoplesPairs,
    people_scores: Mapping[str, list[list[float]]],
) -> dict[str, Any]:
    """Return what the judges say, and what they are worth.

    Args:
        measured: What was measured of each policy, with the scores of every judge that gives any.
        clusters: The cluster of each prompt.
        opinions: What each judge of the settings said.
        people: The pairs that people ranked.
        people_scores: Judge that is no judge of the settings → its scores of people's pairs.

    Returns:
        "judges": judge → {"asked", "invalid", "position": {"first", "consistent"}, "longer",
        "people", "people_longer", "longer_than_people",
        "repeatability"}; "policies": policy → judge →
        {"length_controlled_win_rate", "longer"}; "agreement": {"judges": two names, …} of each two;
        "people": {"pairs", "longer"}. Each figure is a share with its interval, or None.
    """
    policies = [name for name in measured if name != "sft"]
    pairs = {name: pairs_of(measured[name], measured["sft"], clusters) for name in policies}
    names = [*measured["sft"].judges, *(name for name in opinions if opinions[name].compared)]
    names = list(dict.fromkeys(names))
    preferences = {
        judge: {name: preferences_of(judge, measured[name], measured["sft"]) for name in policies} for judge in names
    }
    of_people = Pairs(
        [len(better[0]) - len(worse[0]) for better, worse in zip(people.better, people.worse, strict=True)],
        list(people.clusters),
    )
    all_gaps = [gap for name in policies for gap in pairs[name].gaps]
    all_clusters = [cluster for name in policies for cluster in pairs[name].clusters]
    whole = {judge: [x for name in policies for x in preferences[judge][name]] for judge in names}
    judges: dict[str, Any] = {}
    for judge in names:
        opinion = opinions.get(judge)
        said = people_preferences(opinion, people_scores.get(judge))
        judges[judge] = {
            "asked": None if opinion is None else opinion.asked,
            "invalid": None if opinion is None else opinion.invalid,
            "position": position(opinion, clusters, of_people.clusters),
            "longer": judging.longer_preferred(whole[judge], all_gaps, all_clusters),
            "people": judging.accuracy(said, of_people.clusters) if said else None,
            "people_longer": judging.longer_preferred(said, of_people.gaps, of_people.clusters) if said else None,
            "longer_than_people": judging.longer_than_people(said, of_people.gaps, of_people.clusters)
            if said
            else None,
            "repeatability": repeatability(opinion, clusters),
        }
    agreement = []
    for one, other in combinations(names, 2):
        found = judging.agreement(whole[one], whole[other], all_clusters)
        if found is not None:
            agreement.append({"judges": [one, other], **found})
    theirs = judging.longer_preferred([1.0] * len(of_people.gaps), of_people.gaps, of_people.clusters)
    return {
        "judges": judges,
        "policies": {
            name: {
                judge: {
                    "length_controlled_win_rate": judging.length_controlled(
                        preferences[judge][name], pairs[name].gaps, pairs[name].clusters
                    ),
                    "longer": judging.longer_preferred(
                        preferences[judge][name], pairs[name].gaps, pairs[name].clusters
                    ),
                }
                for judge in names
            }
            for name in policies
        },
        "agreement": agreement,
        "people": {"pairs": len(of_people.gaps), "longer": theirs},
    }


def pairs_of(policy: Measured, sft: Measured, clusters: Sequence[Hashable]) -> Pairs:
    """Return the pairs of a policy's samples with SFT's of the same number."""
    gaps, of_pair = [], []
    for ours, theirs, cluster in zip(policy.responses, sft.responses, clusters, strict=True):
        for a, b in zip(ours, theirs, strict=False):  # best of n has one sample
            gaps.append(float(len(a) - len(b)))
            of_pair.append(cluster)
    return Pairs(gaps, of_pair)


def preferences_of(judge: str, policy: Measured, sft: Measured) -> list[float]:
    """Return a judge's preferences for a policy's responses, in the order of `pairs_of`."""
    if judge in policy.compared:
        return [judging.preference_of(*orders) for row in policy.compared[judge] for orders in row]
    ours, theirs = policy.judged_by(judge).tolist(), sft.judged_by(judge).tolist()
    return [
        judging.preference_by_score(x, y)
        for row, sft_row in zip(ours, theirs, strict=True)
        for x, y in zip(row, sft_row, strict=False)
    ]


def people_preferences(opinion: Opinion | None, scores: list[list[float]] | None) -> list[float]:
    """Return a judge's preferences for the responses that people preferred.

    Args:
        opinion: What it said, if it is a judge of the settings.
        scores: Otherwise its scores of both responses.
    """
    if opinion is None:
        return [judging.preference_by_score(*pair) for pair in scores or []]
    if opinion.compared:
        return [judging.preference_of(*orders) for orders in opinion.people]
    return [judging.preference_by_score(*pair) for pair in opinion.people]


def position(
    opinion: Opinion | None, clusters: Sequence[Hashable], people_clusters: Sequence[Hashable]
) -> dict[str, Any] | None:
    """Return how far the order of two responses decides; None for a judge that gives scores."""
    if opinion is None or not opinion.compared:
        return None
    orders, of_pair = [], []
    for rows in opinion.compared.values():
        for row, cluster in zip(rows, clusters, strict=True):
            orders += [tuple(pair) for pair in row]
            of_pair += [cluster] * len(row)
    orders += [tuple(pair) for pair in opinion.people]
    return judging.position_bias(orders, [*of_pair, *people_clusters])  # type: ignore[arg-type]


def repeatability(opinion: Opinion | None, clusters: Sequence[Hashable]) -> dict | None:
    """Return how often a judge says the same again; None if it was not asked again."""
    if opinion is None or not opinion.repeated:
        return None
    first, second = zip(*opinion.repeated, strict=True)
    return judging.repeatability(first, second, [clusters[i] for i in opinion.repeated_prompts])
