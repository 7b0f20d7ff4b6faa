"""Estimates with their uncertainty: clustered intervals, win rates, reliability of a reward model.

Every interval is a 95 % interval for the mean of a population of *clusters*: tasks of the embedded world, prompts
elsewhere, seeds in a table over seeds. Several samples of a prompt, several prompts of a task and several pairs of a
ranking are not independent, so they count as one cluster. `tests/stages/test_intervals.py` simulates how often the
intervals cover the truth.
"""

from collections.abc import Callable, Hashable, Sequence
from itertools import combinations

import numpy as np

PSEUDO_CLUSTERS = 2
"""Clusters won, and as many lost, that are added to a share before its spread is computed (Agresti & Coull 1998)."""
MOST_GROUPS = 200
"""Groups of clusters that are left out in turn where a statistic has no sums to compute it from (more take long)."""
EDGE = 1e-9
"""Means that differ by less are taken for equal: they differ by rounding alone."""


def mean_estimate(values: Sequence[float], clusters: Sequence[Hashable]) -> dict:
    """Estimate a mean with a jackknife interval over clusters.

    Leaving out one cluster at a time gives G means; their spread gives the standard error of the whole mean, and
    Student's t with G − 1 degrees of freedom the interval (delete-one jackknife; Cameron & Miller 2015, CV3).

    Args:
        values: The N observations.
        clusters: The cluster of each observation.

    Returns:
        {"value": mean over the observations, "ci95": [low, high] or None where there is one cluster, "n": N,
        "clusters": G}. The interval is a point where all clusters are alike; `share_estimate` has one that is not.
    """
    sums, counts = cluster_sums(values, clusters)
    half = _half_width(sums, counts)
    value = float(sums.sum() / counts.sum())
    ci95 = None if half is None else [value - half, value + half]
    return {"value": value, "ci95": ci95, "n": len(values), "clusters": len(sums)}


def share_estimate(values: Sequence[float], clusters: Sequence[Hashable]) -> dict:
    """Estimate the mean of observations in [0, 1], such as wins or gold, with an interval sensible at the edges.

    Close to 0 or 1 the interval of `mean_estimate` covers the truth too rarely, and where all observations are equal it
    is a point. So the narrower of two others is taken:

    - The jackknife of the logit of the mean, transformed back: within [0, 1], and longer towards ½. It does not exist
      where the clusters are all alike, or all but one are 0, or all but one are 1.
    - The jackknife of the mean after two clusters at 1 and two at 0, of the mean size, are added (Agresti & Coull 1998
      add as much to a binomial share): 16 wins of 16 give [0.76, 1] and not [1, 1]; 16 ties give [0.39, 0.61].

    Args:
        values: The N observations: 1 for a success, 0 for a failure, anything between (a tie is ½).
        clusters: The cluster of each observation.

    Returns:
        As `mean_estimate`; "ci95" lies in [0, 1] and holds "value".
    """
    sums, counts = cluster_sums(values, clusters)
    value = float(sums.sum() / counts.sum())
    found = [_pseudo_cluster_interval(sums, counts), _logit_interval(sums, counts)]
    within = [[max(0.0, min(value, ci[0])), min(1.0, max(value, ci[1]))] for ci in found if ci is not None]
    narrower = min(within, key=lambda ci: ci[1] - ci[0])
    return {"value": value, "ci95": narrower, "n": len(values), "clusters": len(sums)}


def difference_estimate(ours: Sequence[float], theirs: Sequence[float], clusters: Sequence[Hashable]) -> dict:
    """Estimate the mean of paired differences ours − theirs; as `mean_estimate`."""
    return mean_estimate([a - b for a, b in zip(ours, theirs, strict=True)], clusters)


def win_rate(ours: np.ndarray, theirs: np.ndarray, clusters: Sequence[Hashable]) -> dict:
    """Estimate how often a response of ours beats one of theirs to the same prompt; ties count half.

    All of a prompt's samples are compared with all of the other policy's, which uses them better than one comparison.

    Args:
        ours: (P, n) judgements of n samples of P prompts, higher is better.
        theirs: (P, m) judgements of the other policy's m samples.
        clusters: The cluster of each of the P prompts.

    Returns:
        As `share_estimate`; "n" is the number of prompts.
    """
    return share_estimate(wins(ours, theirs), clusters)


def wins(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Return each prompt's share of won comparisons, (P,), of all samples (P, n) with all others (P, m); ties half."""
    ours, theirs = np.asarray(ours, float), np.asarray(theirs, float)
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} prompts of ours and {len(theirs)} of theirs")
    gaps = ours[:, :, None] - theirs[:, None, :]
    return rights(gaps).mean(axis=(1, 2))


def correlation_estimate(xs: Sequence[float], ys: Sequence[float], clusters: Sequence[Hashable]) -> dict:
    """Estimate Spearman's rank correlation with an interval over clusters.

    The jackknife is of Fisher's z = artanh ρ, whose spread hardly depends on ρ, transformed back: within [−1, 1].

    Args:
        xs: One quantity of each of the N observations.
        ys: The other one.
        clusters: The cluster of each observation.

    Returns:
        {"value": ρ or None where one side does not vary or N < 3, "ci95": [low, high] or None, "n": N}.
    """
    xs, ys = np.asarray(xs, float), np.asarray(ys, float)
    z = lambda keep: np.arctanh(np.clip(_spearman(xs[keep], ys[keep]), EDGE - 1, 1 - EDGE))  # noqa: E731
    value, ci95 = _spearman(xs, ys), _left_out_interval(z, clusters)
    return {
        "value": None if np.isnan(value) else value,
        "ci95": None if ci95 is None else [float(np.tanh(end)) for end in ci95],
        "n": len(xs),
    }


def contrast_estimate(values: Sequence[float], flags: Sequence[bool], clusters: Sequence[Hashable]) -> dict:
    """Estimate how much higher the mean is where a flag is set than where it is not; a cluster may have both.

    Args:
        values: The N observations.
        flags: (N,) which of the two kinds each is of; there are some of both.
        clusters: The cluster of each observation.

    Returns:
        {"value", "ci95": [low, high], or None where one cluster has all of a kind, "n": N}.
    """
    values, flags = np.asarray(values, float), np.asarray(flags, bool)

    def gap(keep: np.ndarray) -> float:
        kinds = values[keep & flags], values[keep & ~flags]
        return float(kinds[0].mean() - kinds[1].mean()) if all(map(len, kinds)) else float("nan")

    return {"value": gap(np.ones(len(values), bool)), "ci95": _left_out_interval(gap, clusters), "n": len(values)}


def rank_correlation(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Return Spearman's ρ, ties sharing their mean rank; None where one side does not vary, or of fewer than three."""
    value = _spearman(np.asarray(xs, float), np.asarray(ys, float))
    return None if np.isnan(value) else value


def cluster_sums(values: Sequence[float], clusters: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum and the number of the observations of each cluster, (G,) each."""
    index: dict[Hashable, int] = {}
    of = [index.setdefault(cluster, len(index)) for cluster in clusters]
    values = np.asarray(values, float)
    if len(of) != len(values):
        raise ValueError(f"{len(values)} values and {len(of)} clusters")
    return np.bincount(of, values, len(index)), np.bincount(of, minlength=len(index)).astype(float)


def _spearman(xs: np.ndarray, ys: np.ndarray) -> float:
    """Return Spearman's ρ; NaN where it is not defined."""
    if len(xs) < 3:
        return float("nan")
    x, y = _ranks(xs), _ranks(ys)
    if x.std() == 0 or y.std() == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[index]


def _left_out_interval(statistic: Callable[[np.ndarray], float], clusters: Sequence[Hashable]) -> list[float] | None:
    """Return the jackknife interval of any statistic of the observations.

    Args:
        statistic: (N,) flags of the observations that are kept → the statistic.
        clusters: The cluster of each observation. Of more than MOST_GROUPS, groups are left out in turn.

    Returns:
        [low, high]; None where there are fewer than three groups, or one without which the statistic is not finite.
    """
    index: dict[Hashable, int] = {}
    of = np.array([index.setdefault(cluster, len(index)) for cluster in clusters]) % MOST_GROUPS
    groups = min(len(index), MOST_GROUPS)
    whole = statistic(np.ones(len(of), bool))
    if groups < 3 or not np.isfinite(whole):
        return None
    without = np.array([statistic(of != group) for group in range(groups)])
    if not np.isfinite(without).all():
        return None
    half = _t_quantile(groups) * _jackknife_error(without, whole)
    return [float(whole - half), float(whole + half)]


def _half_width(sums: np.ndarray, counts: np.ndarray) -> float | None:
    """Return half the width of the jackknife interval of Σ sums / Σ counts; None where there is one cluster."""
    if len(sums) < 2:
        return None
    return _t_quantile(len(sums)) * _jackknife_error(_leave_one_out(sums, counts), sums.sum() / counts.sum())


def _logit_interval(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float] | None:
    """Return the interval of Σ sums / Σ counts whose logit is jackknifed; None where the spread says nothing."""
    if len(sums) < 2:
        return None
    without = _leave_one_out(sums, counts)
    if without.min() < EDGE or without.max() > 1 - EDGE or np.ptp(without) < EDGE:
        return None
    mean = sums.sum() / counts.sum()
    center = np.log(mean / (1 - mean))
    half = _t_quantile(len(sums)) * _jackknife_error(np.log(without / (1 - without)), center)
    return float(1 / (1 + np.exp(half - center))), float(1 / (1 + np.exp(-half - center)))


def _pseudo_cluster_interval(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Return the jackknife interval of Σ sums / Σ counts with `PSEUDO_CLUSTERS` at 1 and as many at 0 added."""
    size = counts.mean()
    sums = np.concatenate([sums, np.full(PSEUDO_CLUSTERS, size), np.zeros(PSEUDO_CLUSTERS)])
    counts = np.concatenate([counts, np.full(2 * PSEUDO_CLUSTERS, size)])
    center, half = float(sums.sum() / counts.sum()), _half_width(sums, counts)
    return center - half, center + half


def _leave_one_out(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the mean over the observations without each cluster in turn, (G,)."""
    return (sums.sum() - sums) / (counts.sum() - counts)


def _jackknife_error(without: np.ndarray, whole: float) -> float:
    """Return the standard error of an estimate, `whole`, from its values without each cluster in turn, (G,)."""
    clusters = len(without)
    return float(np.sqrt((clusters - 1) / clusters * ((without - whole) ** 2).sum()))


def _t_quantile(clusters: int) -> float:
    """Return the 0.975 quantile of Student's t with clusters − 1 degrees of freedom."""
    from scipy.special import stdtrit  # scipy.stats takes a second to import

    return float(stdtrit(clusters - 1, 0.975))


def rights(margins: Sequence[float]) -> np.ndarray:
    """Return 1 for each margin above 0, ½ for 0, otherwise 0."""
    margins = np.asarray(margins, float)
    return (margins > 0) + 0.5 * (margins == 0)


def pair_accuracy(margins: Sequence[float], clusters: Sequence[Hashable]) -> dict:
    """Estimate the share of pairs whose preferred response scores higher.

    Args:
        margins: Score of the preferred response minus score of the other one, a pair each; 0 counts half.
        clusters: The cluster of each pair.

    Returns:
        {"accuracy", "accuracy_ci95", "n_pairs", "n_clusters"}.
    """
    found = share_estimate(rights(margins), clusters)
    return {
        "accuracy": found["value"],
        "accuracy_ci95": found["ci95"],
        "n_pairs": found["n"],
        "n_clusters": found["clusters"],
    }


def accuracy_by(margins: Sequence[float], keys: Sequence, clusters: Sequence[Hashable]) -> dict[str, dict]:
    """Estimate the accuracy of the pairs that share a key.

    Args:
        margins: As in `pair_accuracy`.
        keys: The key of each pair, such as K, a labeler or a rank distance.
        clusters: The cluster of each pair.

    Returns:
        {key: {"accuracy", "accuracy_ci95", "n_pairs", "n_clusters"}}, in the order of the keys.
    """
    parts: dict = {}
    for margin, key, cluster in zip(margins, keys, clusters, strict=True):
        parts.setdefault(key, ([], []))
        parts[key][0].append(margin)
        parts[key][1].append(cluster)
    return {str(key): pair_accuracy(*parts[key]) for key in sorted(parts)}


def reliability(margins: Sequence[float], bins: int = 10) -> list[dict]:
    """The reliability curve of σ(margin) as the probability of the labelled winner: {confidence, accuracy, n_pairs}
    of each bin that has a pair.

    Each pair is read from the side that the model prefers: confidence σ(|margin|) in [½, 1] against being right.
    """
    margins = np.asarray(margins, float)
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    right = rights(margins)
    which = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    return [
        {
            "confidence": float(confidence[which == b].mean()),
            "accuracy": float(right[which == b].mean()),
            "n_pairs": int((which == b).sum()),
        }
        for b in range(bins)
        if (which == b).any()
    ]


def expected_calibration_error(margins: Sequence[float], bins: int = 10) -> float:
    """ECE of σ(margin) as the probability of the labelled winner (Guo 2017, eq. 3)."""
    return sum(b["n_pairs"] * abs(b["accuracy"] - b["confidence"]) for b in reliability(margins, bins)) / len(margins)


def agreements(rankings) -> dict[tuple[str, str], tuple[float, int]]:
    """(labeler, labeler), in order → (pairs on which they agree, untied pairs that both judged)."""
    by_prompt: dict = {}
    for r in rankings:
        if r.labeler is not None:
            by_prompt.setdefault((str(r.prompt), r.answers), {})[r.labeler] = r.ranks
    found: dict = {}
    for by_labeler in by_prompt.values():
        for (a, one), (b, other) in combinations(sorted(by_labeler.items()), 2):
            for i, j in combinations(range(len(one)), 2):
                x, y = (one[i], one[j]), (other[i], other[j])
                if None in x or None in y or x[0] == x[1] or y[0] == y[1]:
                    continue
                same, total = found.get((a, b), (0, 0))
                found[a, b] = (same + ((x[0] < x[1]) == (y[0] < y[1])), total + 1)
    return found


def labeler_agreement(rankings) -> float | None:
    """Share of untied pairs on which two labelers of the same prompt and responses agree; None if nobody shared one."""
    same, total = (sum(counts) for counts in zip((0, 0), *agreements(rankings).values(), strict=True))
    return same / total if total else None
