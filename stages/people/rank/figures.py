"""Compute the lead's figures from what was judged. Pure functions; nothing here reads a database.

Every interval is a 95 % interval over tasks (`stages/evaluation/statistics.py`): pairs of answers
of one task are not independent. A share that has no observations is None.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import combinations
from statistics import correlation
from typing import Any

import numpy as np

from data.records import Ranking
from stages.evaluation.statistics import agreements, share_estimate, share_of_counts
from stages.people.rank.judged import Facts, Judged, Tiers, ranks_of

TRAINED = ("first", "overlap")
"""Reasons of rankings that train something, and by which labelers are compared."""
Counts = dict[str, tuple[float, int]]
"""{task: (successes, tries)}: what a share is estimated from."""
Observed = tuple[str, float, float]
"""(task, what was seen, what chance would give)."""


# -- what counts ---------------------------------------------------------------------------------


def ranked(rows: Iterable[Judged]) -> list[Judged]:
    """Return the rows that are not skipped."""
    return [row for row in rows if row.skipped is None]


def share(counts: Counts) -> dict[str, Any] | None:
    """Estimate a share from counts by task; None if nothing was tried."""
    tried = {task: (successes, tries) for task, (successes, tries) in counts.items() if tries}
    return share_of_counts(tried) if tried else None


def merged(parts: Iterable[Mapping[str, tuple[float, int]]]) -> Counts:
    """Return the sum of counts by task."""
    whole: Counts = {}
    for part in parts:
        for task, (successes, tries) in part.items():
            before = whole.get(task, (0.0, 0))
            whole[task] = (before[0] + successes, before[1] + tries)
    return whole


def as_ranking(row: Judged, labeler: str) -> Ranking:
    """Return what was judged as a ranking whose texts are the ids of task and answers."""
    ranks, answers = row.ranks, sorted(row.shown)
    return Ranking(
        id=str(row.assignment),
        prompt=str(row.task),
        responses=tuple(str(answer) for answer in answers),
        ranks=tuple(ranks[answer] + 1 if answer in ranks else None for answer in answers),
        labeler=labeler,
    )


# -- between labelers ----------------------------------------------------------------------------


def agreement_by_pair(rows: Iterable[Judged], names: Mapping[int, str]) -> dict[tuple[str, str], Counts]:
    """Count how often each two labelers order answers alike, of pairs that neither tied.

    Args:
        rows: What was judged.
        names: The code of each labeler.

    Returns:
        {(code, code): {task: (pairs of answers ordered alike, pairs that both judged)}}.
    """
    compared = [as_ranking(row, names[row.labeler]) for row in ranked(rows) if row.reason in TRAINED]
    return {pair: merged([counts]) for pair, counts in agreements(compared).items()}


def kendall(rows: Iterable[Judged]) -> dict[str, Any] | None:
    """Estimate Kendall's τ-b between two labelers' rankings of a task, the mean over tasks.

    Unlike the share of pairs ordered alike it is corrected for chance, which gives 0, and counts
    ties: a place shared by one of two labelers lowers it. 1 is full agreement.

    Returns:
        As from `mean_correlation`; None if no task has been ranked twice, ties apart.
    """
    by_task: dict[int, list[Judged]] = {}
    for row in ranked(rows):
        if row.reason in TRAINED:
            by_task.setdefault(row.task, []).append(row)
    values, tasks = [], []
    for task, judged in by_task.items():
        for one, other in combinations(judged, 2):
            both = one.ranks.keys() & other.ranks.keys()
            found = tau_b(tuple(sorted((one.ranks[answer], other.ranks[answer]) for answer in both)))
            if found is not None:
                values.append(found)
                tasks.append(task)
    return mean_correlation(values, tasks) if values else None


def mean_correlation(values: Sequence[float], tasks: Sequence[int]) -> dict[str, Any]:
    """Estimate the mean of correlations as 2 s − 1 of a share s: no interval leaves [−1, 1].

    Args:
        values: The correlations.
        tasks: The task of each.

    Returns:
        As from `share_estimate`.
    """
    estimate = share_estimate([(1 + value) / 2 for value in values], tasks)
    error, interval = estimate["se"], estimate["ci95"]
    return estimate | {
        "value": 2 * estimate["value"] - 1,
        "se": None if error is None else 2 * error,
        "ci95": None if interval is None else [2 * bound - 1 for bound in interval],
    }


@lru_cache(maxsize=50_000)  # few rankings of few answers differ, and scipy takes 2 ms for each
def tau_b(ranks: tuple[tuple[int, int], ...]) -> float | None:
    """Return Kendall's τ-b of sorted pairs of ranks; None where one side is all tied."""
    from scipy.stats import kendalltau  # heavy

    ours, theirs = [one for one, _ in ranks], [other for _, other in ranks]
    if len(set(ours)) < 2 or len(set(theirs)) < 2:
        return None
    return float(kendalltau(ours, theirs, method="asymptotic").statistic)


def mean_ranks(tiers: Tiers, among: Iterable[int]) -> dict[int, float]:
    """Return the rank of some answers among themselves, from 1; ties share their mean rank."""
    wanted, better, ranks = set(among), 0, {}
    for tier in tiers:
        own = [answer for answer in tier if answer in wanted]
        ranks.update(dict.fromkeys(own, better + (len(own) + 1) / 2))
        better += len(own)
    return ranks


# -- of one labeler, or of all -------------------------------------------------------------------


def self_agreement(rows: Sequence[Judged]) -> Counts:
    """Count how often labelers order answers as they did the first time, of pairs never tied."""
    first = {(row.labeler, row.task): row for row in ranked(rows) if row.reason in TRAINED}
    both = []
    for row in ranked(rows):
        before = first.get((row.labeler, row.task))
        if row.reason == "repeat" and before is not None:
            both.append(agreements([as_ranking(before, "before"), as_ranking(row, "repeated")]))
    return merged(counts for by_pair in both for counts in by_pair.values())


def known_accuracy(rows: Iterable[Judged], known: Mapping[int, Tiers]) -> Counts:
    """Count the pairs whose known order a labeler gives; a tie counts half."""
    parts = []
    for row in ranked(rows):
        if row.reason == "known":
            parts.append({str(row.task): compare(ranks_of(known[row.task]), row.ranks)})
    return merged(parts)


def compare(right: Mapping[int, int], said: Mapping[int, int]) -> tuple[float, int]:
    """Return (pairs ordered rightly, ties half; pairs that both judge and the first orders)."""
    successes, tries = 0.0, 0
    for one, other in combinations(sorted(right.keys() & said.keys()), 2):
        if right[one] != right[other]:
            tries += 1
            if said[one] == said[other]:
                successes += 0.5
            else:
                successes += (said[one] < said[other]) == (right[one] < right[other])
    return successes, tries


def ties(rows: Iterable[Judged]) -> Counts:
    """Count the pairs of judged answers that share a place."""
    parts = []
    for row in ranked(rows):
        sizes, judged = [len(tier) for tier in row.tiers], len(row.ranks)
        tied = sum(size * (size - 1) // 2 for size in sizes)
        parts.append({str(row.task): (float(tied), judged * (judged - 1) // 2)})
    return merged(parts)


def best_share(row: Judged, answer: int) -> float:
    """Return an answer's share of the first place: 1, a fraction if it is tied there, or 0."""
    best = row.tiers[0] if row.tiers else ()
    return 1 / len(best) if answer in best else 0.0


def first_best(rows: Iterable[Judged]) -> dict[str, Any] | None:
    """Estimate how often the answer that was shown first is ranked best.

    Returns:
        As from `share`, and "expected": the mean of 1 over the number of judged answers, which is
        what somebody reaches to whom the order shown means nothing.
    """
    values: list[Observed] = []
    for row in ranked(rows):
        if row.on_page and len(row.ranks) > 1 and row.shown[0] in row.ranks:
            values.append((str(row.task), best_share(row, row.shown[0]), 1 / len(row.ranks)))
    return against_chance(values)


def longest_best(rows: Iterable[Judged], lengths: Mapping[int, int]) -> list[Observed]:
    """Return how much of the first place the longest answer has; answers as long as it share that.

    Unlike order, length may deserve it: it says something beside other labelers.
    """
    values: list[Observed] = []
    for row in ranked(rows):
        sizes = {answer: lengths[answer] for answer in row.ranks}
        longest = [answer for answer, size in sizes.items() if size == max(sizes.values())]
        if 0 < len(longest) < len(sizes):
            value = sum(best_share(row, answer) for answer in longest) / len(longest)
            values.append((str(row.task), value, 1 / len(sizes)))
    return values


def against_chance(values: Sequence[Observed]) -> dict[str, Any] | None:
    """Estimate a share and what chance would give; None without any observation."""
    estimate = share(counted(values))
    if estimate is None:
        return None
    return {**estimate, "expected": sum(expected for *_, expected in values) / len(values)}


def counted(values: Iterable[Observed]) -> Counts:
    """Return observations as counts by task."""
    return merged({task: (value, 1)} for task, value, _ in values)


def length_correlation(rows: Iterable[Judged], lengths: Mapping[int, int]) -> dict[str, Any] | None:
    """Estimate the mean rank correlation between length and preference within a ranking.

    Returns:
        As from `mean_correlation`: 1 if longer is always better; None if it is nowhere defined.
    """
    values, tasks = [], []
    for row in ranked(rows):
        answers = sorted(row.ranks)
        preferred, by_length = mean_ranks(row.tiers, answers), mean_ranks(shortest_last(answers, lengths), answers)
        if len(answers) > 2 and len(set(preferred.values())) > 1 and len(set(by_length.values())) > 1:
            # plain Python: numpy takes ten times as long for so few numbers
            values.append(correlation([preferred[one] for one in answers], [by_length[one] for one in answers]))
            tasks.append(row.task)
    return mean_correlation(values, tasks) if values else None


def shortest_last(answers: Iterable[int], lengths: Mapping[int, int]) -> Tiers:
    """Return answers in tiers of equal length, the longest first."""
    tiers: dict[int, list[int]] = {}
    for answer in answers:
        tiers.setdefault(lengths[answer], []).append(answer)
    return tuple(tuple(tiers[length]) for length in sorted(tiers, reverse=True))


def seconds(rows: Iterable[Judged]) -> dict[str, Any] | None:
    """Return median and quartiles of the seconds of a ranking; None without any."""
    values = [row.seconds for row in ranked(rows) if row.on_page]
    if not values:
        return None
    low, median, high = (float(value) for value in np.quantile(values, (0.25, 0.5, 0.75)))
    return {"median": median, "quartiles": [low, high], "n": len(values)}


def skipped(rows: Iterable[Judged]) -> Counts:
    """Count the tasks that were skipped."""
    return merged({str(row.task): (float(row.skipped is not None), 1)} for row in rows)


def skips_by_reason(rows: Iterable[Judged]) -> list[dict[str, Any]]:
    """Return how often each reason was given for a skip, the most frequent first."""
    counts = Counter(row.skipped for row in rows if row.skipped is not None)
    ordered = sorted(counts.items(), key=by_count)
    return [{"reason": reason, "count": count} for reason, count in ordered]


def by_count(item: tuple[str, int]) -> tuple[int, str]:
    """Return what sorts (reason, count): the largest first, then by name."""
    return -item[1], item[0]


def shares(rows: Sequence[Judged], facts: Facts) -> dict[str, Counts]:
    """Return the counts of the figures by which labelers are compared."""
    return {
        "ties": ties(rows),
        "self_agreement": self_agreement(rows),
        "known_accuracy": known_accuracy(rows, facts.known),
        "skipped": skipped(rows),
        "longest_best": counted(longest_best(rows, facts.lengths)),
    }


def describe(rows: Sequence[Judged], facts: Facts) -> dict[str, Any]:
    """Return all figures of some rows, those of one labeler or of all, but for agreement."""
    return {
        **{name: share(counts) for name, counts in shares(rows, facts).items()},
        "seconds": seconds(rows),
        "first_best": first_best(rows),
        "longest_best": against_chance(longest_best(rows, facts.lengths)),
        "length_correlation": length_correlation(rows, facts.lengths),
    }


def pairs_of(by_pair: Mapping[tuple[str, str], Counts]) -> Iterator[dict[str, Any]]:
    """Yield the agreement of each two labelers, those with the most pairs in common first."""
    found = [{"labelers": list(pair), **(share(counts) or {})} for pair, counts in by_pair.items()]
    yield from sorted(found, key=by_size)


def by_size(pair: Mapping[str, Any]) -> tuple[int, list[str]]:
    """Return what sorts the agreement of two labelers."""
    return -pair["n"], pair["labelers"]
