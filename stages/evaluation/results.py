"""From what was measured of each policy to its entry in results.json: estimates with clustered intervals. Pure.

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
    """What a policy answered to the evaluation prompts, and what was said of it. (P, S) lists, a row a prompt."""

    asked: str
    """The form in which it was asked, as in `stages/evaluation/asking.py`."""
    responses: list[list[str]]
    finished: list[list[bool]]
    """Whether each response ended by itself."""
    scores: list[list[float]] | None
    """Reward model scores, `missing_eos_score` applied; None where no reward model scores."""
    kl: list[list[float]] | None
    """log π(y|x) − log π_SFT(y|x) in nats a response; None for best of n, whose probabilities are not known."""
    lengths: list[list[int]]
    """Tokens a response, EOS included."""
    gold: list[list[dict[str, float]]] | None
    """{helpful, honest, harmless, overall} a response; None where there is no gold scorer."""
    text_losses: list[float] | None
    """Mean cross-entropy a token of each row of held-out pretraining text, (N,); None for best of n."""
    raw_scores: list[list[float]] | None = None
    """Reward model scores before `missing_eos_score`; None for what an older version measured."""
    held_out_scores: list[list[float]] | None = None
    """Scores of rm's held-out model, `missing_eos_score` applied; None where rm trained none."""

    def state(self) -> dict:
        """Return the fields as JSON values, for a checkpoint."""
        return asdict(self)


def summarise(
    own: Measured,
    sft: Measured,
    clusters: Sequence[Hashable],
    known: Sequence[bool] | None,
    judge_climbed: bool = False,
    selected: bool = False,
) -> dict:
    """Compute a policy's entry in results.json.

    Args:
        own: What was measured of the policy.
        sft: The same of SFT, on the same prompts.
        clusters: The cluster of each prompt: its task where tasks are known, otherwise the prompt.
        known: Whether training data set each prompt's task; None where tasks are not known.
        judge_climbed: Whether the judge is the model that this policy was trained to please or selected by.
        selected: Whether the policy is the best of n by the judge itself. Its win rate is then n / (n + 1) whatever
            the judge is worth (with one sample of SFT to beat), so none is given.

    Returns:
        The entry: figures, their 95 % intervals under "ci95", paired differences to SFT under "difference_to_sft".
    """
    quantities = {"score": own.scores, "kl_to_sft": own.kl, "length": own.lengths, "eos_rate": own.finished}
    estimates = {name: _estimate(rows, clusters, share=name == "eos_rate") for name, rows in quantities.items()}
    estimates["pretrain_perplexity"] = perplexity_estimate(own.text_losses)
    is_judged = own.gold is not None or own.scores is not None
    judged, baseline = (_judged(own), _judged(sft)) if is_judged else (None, None)
    gaps = judged.mean(1) - baseline.mean(1) if is_judged else None
    return {
        **{name: found and found["value"] for name, found in estimates.items()},
        "ci95": {name: found and _spread(found["ci95"]) for name, found in estimates.items()},
        "asked": own.asked,
        "judge_climbed": judge_climbed,
        "win_rate_vs_sft": None if selected or not is_judged else win_rate(judged, baseline, clusters),
        "difference_to_sft": (
            None if own is sft or not is_judged else _difference(gaps, clusters, bounded=own.gold is not None)
        ),
        "gold": _gold(own, clusters),
        "gold_known_tasks": _gold(own, clusters, known, True),
        "gold_held_out_tasks": _gold(own, clusters, known, False),
    }


def order_by_gold(sft: Measured, clusters: Sequence[Hashable], known: Sequence[bool] | None) -> dict | None:
    """Estimate how often the reward model orders two of SFT's responses to a prompt as gold does.

    Nothing was trained on these prompts, so it says how the reward model does on tasks that its labels never touched.

    Args:
        sft: What was measured of SFT, several samples a prompt.
        clusters: The cluster of each prompt.
        known: Whether training data set each prompt's task.

    Returns:
        {"known_tasks", "held_out_tasks"}: share of the pairs whose gold differs, equal scores counting half, as
        `share_estimate`; None for a half without such a pair. None altogether without gold.
    """
    if sft.gold is None or sft.scores is None or known is None:
        return None
    right: dict[bool, tuple[list, list]] = {True: ([], []), False: ([], [])}
    for scores, gold, cluster, which in zip(sft.scores, _judged(sft), clusters, known, strict=True):
        for i, j in combinations(range(len(scores)), 2):
            if gold[i] != gold[j]:
                margin = (scores[i] - scores[j]) * (1 if gold[i] > gold[j] else -1)
                right[which][0].append(float(rights([margin])[0]))
                right[which][1].append(cluster)
    return {
        name: share_estimate(*right[which]) if right[which][0] else None
        for name, which in (("known_tasks", True), ("held_out_tasks", False))
    }


def perplexity_estimate(losses: Sequence[float] | None) -> dict | None:
    """Estimate the perplexity of pretraining text: exp of the mean loss, and of its interval over rows.

    Args:
        losses: Mean cross-entropy a token of each row, (N,), all of the same length.

    Returns:
        {"value", "ci95"}; None without rows. Infinite where a float cannot hold it.
    """
    if not losses:
        return None
    found = mean_estimate(losses, range(len(losses)))
    ci95 = found["ci95"] and [_exp(x) for x in found["ci95"]]
    return {"value": _exp(found["value"]), "ci95": ci95}


def _estimate(rows: list[list] | None, clusters: Sequence[Hashable], share: bool) -> dict | None:
    """Estimate the mean of (P, S) observations; None where there are none."""
    if rows is None:
        return None
    values = [float(value) for row in rows for value in row]
    repeated = [cluster for cluster, row in zip(clusters, rows, strict=True) for _ in row]
    return (share_estimate if share else mean_estimate)(values, repeated)


def _judged(measured: Measured) -> np.ndarray:
    """Return what the judge says of each response, (P, S): gold where there is any, otherwise the score."""
    if measured.gold is None:
        return np.array(measured.scores, float)
    return np.array([[parts["overall"] for parts in row] for row in measured.gold], float)


def _difference(gaps: np.ndarray, clusters: Sequence[Hashable], bounded: bool) -> dict:
    """Estimate the mean of paired differences (P,).

    Differences of gold are bounded by ±1, so they are estimated as shares, whose interval is no point where all are
    equal. Those of scores have no bound: where all are equal their spread says nothing, and there is no interval.
    """
    if bounded:
        found = share_estimate((gaps + 1) / 2, clusters)
        return {"value": 2 * found["value"] - 1, "ci95": [2 * end - 1 for end in found["ci95"]]}
    found = mean_estimate(gaps, clusters)
    return {"value": found["value"], "ci95": _spread(found["ci95"])}


def _spread(ci95: list[float] | None) -> list[float] | None:
    """Return an interval, or None where it is a point: observations that are all equal say nothing of their spread."""
    return None if ci95 is None or ci95[0] == ci95[1] else ci95


def _gold(
    own: Measured, clusters: Sequence[Hashable], known: Sequence[bool] | None = None, which: bool | None = None
) -> dict | None:
    """Estimate gold and its parts over all prompts, or over those whose `known` is `which`; None without any.

    The interval is that of "overall".
    """
    if own.gold is None or (which is not None and known is None):
        return None
    chosen = [i for i in range(len(own.gold)) if which is None or known[i] == which]
    if not chosen:
        return None
    parts = {
        name: _estimate([[g[name] for g in own.gold[i]] for i in chosen], [clusters[i] for i in chosen], share=True)
        for name in GOLD
    }
    overall = parts["overall"]
    figures = {name: found["value"] for name, found in parts.items()}
    return {**figures, "ci95": overall["ci95"], "n": len(chosen), "clusters": overall["clusters"]}


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
