"""Estimate means, win rates and correlations with intervals, and the calibration of a reward model.

Every interval is a 95 % confidence interval for the mean of a population of *clusters*: tasks in
the embedded world, otherwise prompts; seeds in a table over seeds. Samples for one prompt, prompts
of one task and pairs of one ranking are not independent, so they form one cluster. The standard
error comes from the jackknife: the estimate is computed again without each cluster in turn, and the
spread of these values is its error. `tests/stages/evaluation/test_intervals.py` simulates how often
the intervals contain the true value.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from data.records import Ranking

PSEUDO_CLUSTERS = 2
"""Clusters at 1, and as many at 0, added to a share before its error (Agresti & Coull 1998)."""
MAX_GROUPS = 200
"""Most groups of clusters a general statistic is computed without, one at a time: it is slow."""
EDGE = 1e-9
"""Means that differ by less count as equal: the rest is rounding."""


def mean_estimate(values: Sequence[float], clusters: Sequence[Hashable]) -> dict:
    """Estimate a mean with a jackknife interval over clusters.

    The means without one of the G clusters give the standard error; Student's t with G − 1 degrees
    of freedom gives the width (delete-one jackknife; Cameron & Miller 2015, CV3).

    Args:
        values: N observations.
        clusters: The cluster of each observation.

    Returns:
        {"value": the mean over observations, "ci95": [low, high], or None with one cluster, "se":
        the standard error, or None, "n": N, "clusters": G}. The interval is a point if all clusters
        are equal; that of `share_estimate` is not.
    """
    sums, counts = cluster_sums(values, clusters)
    value, error = float(sums.sum() / counts.sum()), standard_error(sums, counts)
    half_width = None if error is None else _t_quantile(len(sums)) * error
    ci95 = None if half_width is None else [value - half_width, value + half_width]
    return {"value": value, "ci95": ci95, "se": error, "n": len(values), "clusters": len(sums)}


def share_estimate(values: Sequence[float], clusters: Sequence[Hashable]) -> dict:
    """Estimate the mean of observations in [0, 1], such as wins or gold.

    Near 0 and 1 the interval of `mean_estimate` contains the true value too rarely, and if all
    observations are equal it is a point. So the narrower of two other intervals is returned:

    - The jackknife of the logit of the mean, transformed back. It lies within [0, 1], and is longer
      on the side towards ½. It does not exist if all clusters are equal, or if all but one are 0,
      or 1.
    - The jackknife of the mean with two clusters at 1 and two at 0 added, each of mean size
      (Agresti & Coull 1998 add as much to a binomial share): 16 wins of 16 give [0.76, 1] and not
      [1, 1]; 16 ties give [0.39, 0.61].

    Args:
        values: N observations: 1 for a success, 0 for a failure, or between them (a tie is ½).
        clusters: The cluster of each observation.

    Returns:
        As from `mean_estimate`; "ci95" lies in [0, 1] and contains "value".
    """
    return share_of_sums(*cluster_sums(values, clusters))


def share_of_sums(sums: np.ndarray, counts: np.ndarray) -> dict:
    """Estimate a share as `share_estimate` does, from the clusters' sums.

    Args:
        sums: (G,) the sum of each cluster's observations.
        counts: (G,) their number.
    """
    value = float(sums.sum() / counts.sum())
    intervals = []
    for interval in (_pseudo_cluster_interval(sums, counts), _logit_interval(sums, counts)):
        if interval is not None:
            low, high = interval
            intervals.append([max(0.0, min(value, low)), min(1.0, max(value, high))])
    narrower = min(intervals, key=lambda interval: interval[1] - interval[0])
    error = standard_error(sums, counts)
    return {"value": value, "ci95": narrower, "se": error, "n": int(counts.sum()), "clusters": len(sums)}


def difference_estimate(ours: Sequence[float], theirs: Sequence[float], clusters: Sequence[Hashable]) -> dict:
    """Estimate the mean of paired differences, ours − theirs, as `mean_estimate` does."""
    return mean_estimate([a - b for a, b in zip(ours, theirs, strict=True)], clusters)


def win_rate(ours: np.ndarray, theirs: np.ndarray, clusters: Sequence[Hashable]) -> dict:
    """Estimate how often our response beats theirs to the same prompt; ties count half.

    Each of our samples is compared with each of theirs, which is more precise than one comparison
    per prompt.

    Args:
        ours: (P, n) scores of our n samples for each of P prompts; higher is better.
        theirs: (P, m) scores of the other policy's m samples.
        clusters: The cluster of each prompt.

    Returns:
        As from `share_estimate`; "n" is the number of prompts.
    """
    return share_estimate(wins(ours, theirs), clusters)


def wins(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Return the share of comparisons that our samples win, for each prompt; ties count half.

    Args:
        ours: (P, n) scores.
        theirs: (P, m) scores.

    Returns:
        (P,) shares.
    """
    ours, theirs = np.asarray(ours, float), np.asarray(theirs, float)
    if len(ours) != len(theirs):
        raise ValueError(f"ours has {len(ours)} prompts and theirs {len(theirs)}")
    gaps = ours[:, :, None] - theirs[:, None, :]
    return rights(gaps).mean(axis=(1, 2))


def correlation_estimate(xs: Sequence[float], ys: Sequence[float], clusters: Sequence[Hashable]) -> dict:
    """Estimate Spearman's rank correlation with an interval over clusters.

    The jackknife runs on Fisher's z = artanh ρ, whose spread hardly depends on ρ. The interval is
    transformed back, so it lies within [−1, 1].

    Args:
        xs: The first quantity of each of N observations.
        ys: The second one.
        clusters: The cluster of each observation.

    Returns:
        {"value": ρ, or None if a quantity is constant or N < 3, "ci95": [low, high] or None, "n":
        N}.
    """
    xs, ys = np.asarray(xs, float), np.asarray(ys, float)

    def fisher_z(keep: np.ndarray) -> float:
        return np.arctanh(np.clip(_spearman(xs[keep], ys[keep]), EDGE - 1, 1 - EDGE))

    value, ci95 = _spearman(xs, ys), jackknife_interval(fisher_z, clusters)
    return {
        "value": None if np.isnan(value) else value,
        "ci95": None if ci95 is None else [float(np.tanh(end)) for end in ci95],
        "n": len(xs),
    }


def contrast_estimate(values: Sequence[float], flags: Sequence[bool], clusters: Sequence[Hashable]) -> dict:
    """Estimate the mean of flagged observations minus the mean of the others.

    Args:
        values: N observations.
        flags: (N,) flags, some set and some not. A cluster may contain both kinds.
        clusters: The cluster of each observation.

    Returns:
        {"value", "ci95": [low, high], or None if one cluster contains all of a kind, "n": N}.
    """
    values, flags = np.asarray(values, float), np.asarray(flags, bool)

    def gap(keep: np.ndarray) -> float:
        flagged, others = values[keep & flags], values[keep & ~flags]
        if len(flagged) == 0 or len(others) == 0:
            return float("nan")
        return float(flagged.mean() - others.mean())

    return {"value": gap(np.ones(len(values), bool)), "ci95": jackknife_interval(gap, clusters), "n": len(values)}


def rank_correlation(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Return Spearman's ρ; None if a quantity is constant or there are fewer than three values.

    Ties share their mean rank.
    """
    value = _spearman(np.asarray(xs, float), np.asarray(ys, float))
    return None if np.isnan(value) else value


def cluster_sums(values: Sequence[float], clusters: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum and the number of observations of each cluster, (G,) each."""
    index: dict[Hashable, int] = {}
    of_cluster = [index.setdefault(cluster, len(index)) for cluster in clusters]
    values = np.asarray(values, float)
    if len(of_cluster) != len(values):
        raise ValueError(f"there are {len(values)} values and {len(of_cluster)} clusters")
    sums = np.bincount(of_cluster, values, len(index))
    return sums, np.bincount(of_cluster, minlength=len(index)).astype(float)


def _spearman(xs: np.ndarray, ys: np.ndarray) -> float:
    """Return Spearman's ρ; NaN if it is not defined."""
    if len(xs) < 3:
        return float("nan")
    x, y = _ranks(xs), _ranks(ys)
    if x.std() == 0 or y.std() == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of each value; ties share their mean rank."""
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[index]


def jackknife_interval(statistic: Callable[[np.ndarray], float], clusters: Sequence[Hashable]) -> list[float] | None:
    """Return the jackknife interval of any statistic of the observations.

    Args:
        statistic: Computes the statistic, given (N,) flags of the observations to keep.
        clusters: The cluster of each observation. More than MAX_GROUPS clusters are put into
            groups, and a group is left out at a time.

    Returns:
        [low, high]; None with fewer than three groups, or if the statistic is not finite without
        some group.
    """
    index: dict[Hashable, int] = {}
    of_group = np.array([index.setdefault(cluster, len(index)) for cluster in clusters]) % MAX_GROUPS
    groups = min(len(index), MAX_GROUPS)
    whole = statistic(np.ones(len(of_group), bool))
    if groups < 3 or not np.isfinite(whole):
        return None
    without = np.array([statistic(of_group != group) for group in range(groups)])
    if not np.isfinite(without).all():
        return None
    half_width = _t_quantile(groups) * _jackknife_error(without, whole)
    return [float(whole - half_width), float(whole + half_width)]


def standard_error(sums: np.ndarray, counts: np.ndarray) -> float | None:
    """Return the jackknife's standard error of a mean; None with one cluster.

    Args:
        sums: (G,) the sum of each cluster's observations.
        counts: (G,) their number.
    """
    if len(sums) < 2:
        return None
    return _jackknife_error(_leave_one_out(sums, counts), sums.sum() / counts.sum())


def _logit_interval(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float] | None:
    """Return the jackknife interval of the logit of a mean, transformed back.

    Returns:
        (low, high); None if it does not exist (see `share_estimate`).
    """
    if len(sums) < 2:
        return None
    without = _leave_one_out(sums, counts)
    if without.min() < EDGE or without.max() > 1 - EDGE or np.ptp(without) < EDGE:
        return None
    mean = sums.sum() / counts.sum()
    center = np.log(mean / (1 - mean))
    half_width = _t_quantile(len(sums)) * _jackknife_error(np.log(without / (1 - without)), center)
    return float(1 / (1 + np.exp(half_width - center))), float(1 / (1 + np.exp(-half_width - center)))


def _pseudo_cluster_interval(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Return the jackknife interval of a mean with PSEUDO_CLUSTERS at 1 and as many at 0 added."""
    size = counts.mean()
    sums = np.concatenate([sums, np.full(PSEUDO_CLUSTERS, size), np.zeros(PSEUDO_CLUSTERS)])
    counts = np.concatenate([counts, np.full(2 * PSEUDO_CLUSTERS, size)])
    error = standard_error(sums, counts)
    assert error is not None, "there are several clusters"
    center, half_width = float(sums.sum() / counts.sum()), _t_quantile(len(sums)) * error
    return center - half_width, center + half_width


def _leave_one_out(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the mean over observations without each cluster in turn, (G,)."""
    return (sums.sum() - sums) / (counts.sum() - counts)


def _jackknife_error(without: np.ndarray, whole: float) -> float:
    """Return the standard error of an estimate.

    Args:
        without: (G,) the estimate without each cluster in turn.
        whole: The estimate from all clusters.
    """
    clusters = len(without)
    return float(np.sqrt((clusters - 1) / clusters * ((without - whole) ** 2).sum()))


def _t_quantile(clusters: int) -> float:
    """Return the 0.975 quantile of Student's t with clusters − 1 degrees of freedom."""
    from scipy.special import stdtrit  # importing scipy.stats takes a second

    return float(stdtrit(clusters - 1, 0.975))


def rights(margins: Sequence[float]) -> np.ndarray:
    """Return 1 for each positive margin, ½ for 0 and 0 for a negative one."""
    margins = np.asarray(margins, float)
    return (margins > 0) + 0.5 * (margins == 0)


def pair_accuracy(margins: Sequence[float], clusters: Sequence[Hashable]) -> dict:
    """Estimate the share of pairs whose preferred response scores higher.

    Args:
        margins: The score of each pair's preferred response minus that of the other one; 0 counts
            half.
        clusters: The cluster of each pair.

    Returns:
        {"accuracy", "accuracy_ci95", "n_pairs", "n_clusters"}.
    """
    estimate = share_estimate(rights(margins), clusters)
    return {
        "accuracy": estimate["value"],
        "accuracy_ci95": estimate["ci95"],
        "n_pairs": estimate["n"],
        "n_clusters": estimate["clusters"],
    }


def accuracy_by(margins: Sequence[float], keys: Sequence, clusters: Sequence[Hashable]) -> dict[str, dict]:
    """Estimate the accuracy of pairs for each value of a key.

    Args:
        margins: As in `pair_accuracy`.
        keys: The key of each pair, such as K, a labeler or a rank distance.
        clusters: The cluster of each pair.

    Returns:
        {key: {"accuracy", "accuracy_ci95", "n_pairs", "n_clusters"}}, sorted by key.
    """
    by_key: dict[Any, tuple[list, list]] = {}
    for margin, key, cluster in zip(margins, keys, clusters, strict=True):
        key_margins, key_clusters = by_key.setdefault(key, ([], []))
        key_margins.append(margin)
        key_clusters.append(cluster)
    return {str(key): pair_accuracy(*by_key[key]) for key in sorted(by_key)}


def reliability(margins: Sequence[float], bins: int = 10) -> list[dict]:
    """Compute the reliability curve of σ(margin) as a probability of the labeler's preference.

    Each pair is taken from the side that the model prefers, so its confidence σ(|margin|) is in [½,
    1].

    Args:
        margins: As in `pair_accuracy`.
        bins: Bins of equal width between ½ and 1.

    Returns:
        {confidence, accuracy, n_pairs} of each bin that contains a pair.
    """
    margins = np.asarray(margins, float)
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    correct = rights(margins)
    which = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    return [
        {
            "confidence": float(confidence[which == b].mean()),
            "accuracy": float(correct[which == b].mean()),
            "n_pairs": int((which == b).sum()),
        }
        for b in range(bins)
        if (which == b).any()
    ]


def calibration_interval(margins: Sequence[float], clusters: Sequence[Hashable]) -> list[float] | None:
    """Return the jackknife interval of the expected calibration error; None with few clusters.

    Args:
        margins: As in `pair_accuracy`.
        clusters: The cluster of each pair.
    """
    values = np.asarray(margins, float)
    interval = jackknife_interval(lambda keep: expected_calibration_error(values[keep]), clusters)
    return None if interval is None else [max(0.0, interval[0]), min(1.0, interval[1])]


def expected_calibration_error(margins: Sequence[float], bins: int = 10) -> float:
    """Compute the expected calibration error of σ(margin) (Guo et al. 2017, eq. 3)."""
    curve = reliability(margins, bins)
    return sum(b["n_pairs"] * abs(b["accuracy"] - b["confidence"]) for b in curve) / len(margins)


def prompt_of(ranking: Ranking) -> str:
    """Return a ranking's prompt as the cluster that it belongs to."""
    return str(ranking.prompt)


def agreements(
    rankings: Iterable[Ranking], cluster_of: Callable[[Ranking], str] = prompt_of
) -> dict[tuple[str, str], dict[str, tuple[int, int]]]:
    """Count how often each two labelers agree on responses that both ranked.

    Args:
        rankings: The rankings.
        cluster_of: Returns the cluster of a ranking.

    Returns:
        {(labeler, labeler): {cluster: (pairs of responses that they order alike, pairs that both
        judged without a tie)}}; each two labelers in alphabetical order.
    """
    clusters: dict[tuple, str] = {}
    by_prompt: dict[tuple, dict[str, tuple]] = {}
    for ranking in rankings:
        if ranking.labeler is not None:
            key = (str(ranking.prompt), ranking.answers)
            by_prompt.setdefault(key, {})[ranking.labeler] = ranking.ranks
            clusters[key] = cluster_of(ranking)
    counts: dict[tuple[str, str], dict[str, tuple[int, int]]] = {}
    for key, by_labeler in by_prompt.items():
        for (first, first_ranks), (second, second_ranks) in combinations(sorted(by_labeler.items()), 2):
            for i, j in combinations(range(len(first_ranks)), 2):
                x, y = (first_ranks[i], first_ranks[j]), (second_ranks[i], second_ranks[j])
                if None in x or None in y or x[0] == x[1] or y[0] == y[1]:
                    continue
                of_pair = counts.setdefault((first, second), {})
                agree, total = of_pair.get(clusters[key], (0, 0))
                of_pair[clusters[key]] = (agree + ((x[0] < x[1]) == (y[0] < y[1])), total + 1)
    return counts


def labeler_agreement(rankings: Iterable[Ranking], cluster_of: Callable[[Ranking], str] = prompt_of) -> dict | None:
    """Estimate the share of pairs that two labelers order alike; None if no pair has two.

    Args:
        rankings: The rankings.
        cluster_of: Returns the cluster of a ranking.

    Returns:
        As from `share_estimate`.
    """
    whole: dict[str, tuple[int, int]] = {}
    for by_cluster in agreements(rankings, cluster_of).values():
        for cluster, (agree, total) in by_cluster.items():
            agreed, of = whole.get(cluster, (0, 0))
            whole[cluster] = (agreed + agree, of + total)
    return share_of_counts(whole) if whole else None


def share_of_counts(counts: Mapping[str, tuple[float, int]]) -> dict:
    """Estimate a share from (successes, tries) of each cluster, as `share_estimate` does."""
    sums, totals = zip(*counts.values(), strict=True)
    return share_of_sums(np.array(sums, float), np.array(totals, float))


def agreement_figures(rankings: Iterable[Ranking], cluster_of: Callable[[Ranking], str] = prompt_of) -> dict[str, Any]:
    """Return `labeler_agreement` and its interval; both are None where no pair has two labelers.

    Args:
        rankings: The rankings.
        cluster_of: Returns the cluster of a ranking.
    """
    estimate = labeler_agreement(rankings, cluster_of) or {}
    return {"labeler_agreement": estimate.get("value"), "labeler_agreement_ci95": estimate.get("ci95")}
