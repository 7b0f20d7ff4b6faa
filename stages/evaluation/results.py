"""Summarise what was measured of a policy into its entry in results.json. Pure.

Every figure is an estimate with an interval over clusters (`stages/evaluation/statistics.py`).
Array shapes: P prompts, S samples of each, N rows of pretraining text.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations

import numpy as np

from stages.evaluation.statistics import mean_estimate, rights, share_estimate, win_rate

GOLD = ("helpful", "honest", "harmless", "overall")


@dataclass(frozen=True)
class Measured:
    """A policy's answers to the evaluation prompts, and their scores, as (P, S) lists."""

    asked: str
    """The form in which the policy was prompted, as in `stages/evaluation/forms.py`."""
    responses: list[list[str]]
    """The text of each response."""
    finished: list[list[bool]]
    """Whether each response ended by itself."""
    scores: list[list[float]] | None
    """Reward model scores with `missing_eos_score` applied; None without a reward model."""
    kl: list[list[float]] | None
    """log π(y|x) − log π_SFT(y|x) of each response, in nats; None for best of n."""
    lengths: list[list[int]]
    """Tokens of each response, with EOS."""
    gold: list[list[dict[str, float]]] | None
    """{helpful, honest, harmless, overall} of each response; None without a gold scorer."""
    text_losses: list[float] | None
    """Mean cross-entropy per token of N rows of held-out pretraining text; None for best of n."""
    raw_scores: list[list[float]] | None = None
    """Reward model scores before `missing_eos_score`; None in measurements of an older version."""
    held_out_scores: list[list[float]] | None = None
    """Scores of rm's held-out model with `missing_eos_score` applied; None if rm trained none."""

    def state(self) -> dict:
        """Return the fields as JSON values, for a checkpoint."""
        return asdict(self)


def summarise(
    policy: Measured,
    sft: Measured,
    clusters: Sequence[Hashable],
    known: Sequence[bool] | None,
    judge_climbed: bool = False,
    selected: bool = False,
) -> dict:
    """Compute a policy's entry in results.json.

    Args:
        policy: What was measured of the policy.
        sft: What was measured of SFT, on the same prompts.
        clusters: The cluster of each prompt: its task where tasks are known, otherwise the prompt.
        known: Whether training data sets each prompt's task; None where tasks are not known.
        judge_climbed: Whether the policy was trained to please the judge, or selected by it.
        selected: Whether the policy is best of n by the judge itself. It then wins n / (n + 1) of
            the comparisons with one SFT sample however poor the judge is, so no win rate is given.

    Returns:
        The figures, their 95 % intervals under "ci95", and paired differences under
        "difference_to_sft".
    """
    estimates = {
        "score": _estimate(policy.scores, clusters),
        "kl_to_sft": _estimate(policy.kl, clusters),
        "length": _estimate(policy.lengths, clusters),
        "eos_rate": _estimate(policy.finished, clusters, share=True),
        "pretrain_perplexity": perplexity_estimate(policy.text_losses),
    }
    versus_sft = difference = None
    if policy.gold is not None or policy.scores is not None:
        judged, baseline = _judged(policy), _judged(sft)
        if not selected:
            versus_sft = win_rate(judged, baseline, clusters)
        if policy is not sft:
            gaps = judged.mean(1) - baseline.mean(1)
            difference = _difference(gaps, clusters, bounded=policy.gold is not None)
    return {
        **{name: estimate and estimate["value"] for name, estimate in estimates.items()},
        "ci95": {name: estimate and _proper(estimate["ci95"]) for name, estimate in estimates.items()},
        "asked": policy.asked,
        "judge_climbed": judge_climbed,
        "win_rate_vs_sft": versus_sft,
        "difference_to_sft": difference,
        "gold": _gold(policy, clusters),
        "gold_known_tasks": _gold(policy, clusters, known, True),
        "gold_held_out_tasks": _gold(policy, clusters, known, False),
    }


def order_by_gold(sft: Measured, clusters: Sequence[Hashable], known: Sequence[bool] | None) -> dict | None:
    """Estimate how often the reward model orders two of SFT's responses to a prompt as gold does.

    No model was trained on these prompts, so this measures the reward model on unseen tasks too.

    Args:
        sft: What was measured of SFT, with several samples per prompt.
        clusters: The cluster of each prompt.
        known: Whether training data sets each prompt's task.

    Returns:
        {"known_tasks", "held_out_tasks"}: the share of correct pairs among those whose gold
        differs, as from `share_estimate`; equal scores count half. None for a half without such a
        pair, and None for both without gold.
    """
    if sft.gold is None or sft.scores is None or known is None:
        return None
    correct: dict[bool, list[float]] = {True: [], False: []}
    of_cluster: dict[bool, list[Hashable]] = {True: [], False: []}
    for scores, gold, cluster, is_known in zip(sft.scores, _judged(sft), clusters, known, strict=True):
        for i, j in combinations(range(len(scores)), 2):
            if gold[i] != gold[j]:
                margin = (scores[i] - scores[j]) * (1 if gold[i] > gold[j] else -1)
                correct[is_known].append(float(rights([margin])[0]))
                of_cluster[is_known].append(cluster)
    return {
        name: share_estimate(correct[is_known], of_cluster[is_known]) if correct[is_known] else None
        for name, is_known in (("known_tasks", True), ("held_out_tasks", False))
    }


def perplexity_estimate(losses: Sequence[float] | None) -> dict | None:
    """Estimate the perplexity of pretraining text: exp of the mean loss and of its interval.

    Args:
        losses: Mean cross-entropy per token of each row, (N,); all rows have one length.

    Returns:
        {"value", "ci95"}; None without rows. A value too large for a float is infinite.
    """
    if not losses:
        return None
    estimate = mean_estimate(losses, range(len(losses)))
    ci95 = estimate["ci95"] and [_exp(end) for end in estimate["ci95"]]
    return {"value": _exp(estimate["value"]), "ci95": ci95}


def _estimate(rows: list[list] | None, clusters: Sequence[Hashable], share: bool = False) -> dict | None:
    """Estimate the mean of (P, S) observations (`share`: they are in [0, 1]); None without any."""
    if rows is None:
        return None
    values = [float(value) for row in rows for value in row]
    of_cluster = [cluster for cluster, row in zip(clusters, rows, strict=True) for _ in row]
    return share_estimate(values, of_cluster) if share else mean_estimate(values, of_cluster)


def _judged(measured: Measured) -> np.ndarray:
    """Return what the judge gives each response, (P, S): gold, or the score without gold."""
    if measured.gold is None:
        return np.array(measured.scores, float)
    return np.array([[parts["overall"] for parts in row] for row in measured.gold], float)


def _difference(gaps: np.ndarray, clusters: Sequence[Hashable], bounded: bool) -> dict:
    """Estimate the mean of paired differences (P,).

    Differences of gold are in [−1, 1], so they are estimated as shares, whose interval has a width
    even if all are equal. Differences of scores are unbounded: if all are equal, their spread is
    unknown and there is no interval.
    """
    if bounded:
        estimate = share_estimate((gaps + 1) / 2, clusters)
        return {"value": 2 * estimate["value"] - 1, "ci95": [2 * end - 1 for end in estimate["ci95"]]}
    estimate = mean_estimate(gaps, clusters)
    return {"value": estimate["value"], "ci95": _proper(estimate["ci95"])}


def _proper(ci95: list[float] | None) -> list[float] | None:
    """Return an interval, or None if it is a point: equal observations show no spread."""
    return None if ci95 is None or ci95[0] == ci95[1] else ci95


def _gold(
    policy: Measured, clusters: Sequence[Hashable], known: Sequence[bool] | None = None, which: bool | None = None
) -> dict | None:
    """Estimate gold and its parts.

    Args:
        policy: What was measured of the policy.
        clusters: The cluster of each prompt.
        known: Whether training data sets each prompt's task.
        which: Take only the prompts whose `known` is this; None takes all.

    Returns:
        The mean of each part, and the interval of "overall"; None without gold or without such
        prompts.
    """
    if policy.gold is None or (which is not None and known is None):
        return None
    chosen = [i for i in range(len(policy.gold)) if which is None or known[i] == which]
    if not chosen:
        return None
    of_cluster = [clusters[i] for i in chosen]
    estimates = {
        part: _estimate([[gold[part] for gold in policy.gold[i]] for i in chosen], of_cluster, share=True)
        for part in GOLD
    }
    overall = estimates["overall"]
    figures = {part: estimate["value"] for part, estimate in estimates.items()}
    return {**figures, "ci95": overall["ci95"], "n": len(chosen), "clusters": overall["clusters"]}


def _exp(value: float) -> float:
    """Return e to a power; infinity if a float cannot hold it."""
    return math.exp(value) if value < 700 else math.inf
