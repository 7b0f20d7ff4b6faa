"""Summarise what was measured of a policy into its entry in results.json. Pure.

Every figure is an estimate with an interval over clusters (`stages/evaluation/statistics.py`).
Array shapes: P prompts, S samples of each, N rows of pretraining text.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations

import numpy as np

from stages.evaluation.judges import GOLD as GOLD_JUDGE
from stages.evaluation.judges import HELD_OUT, REWARD_MODEL, Judge
from stages.evaluation.judging import preference_of
from stages.evaluation.statistics import jackknife_interval, mean_estimate, rights, share_estimate, win_rate

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
    scores: dict[str, list[list[float]]]
    """The scores of each judge except gold, with `missing_eos_score` applied; {} without one.

    The judge that is trusted most comes first (`stages/evaluation/judges.py`)."""
    kl: list[list[float]] | None
    """log π(y|x) − log π_SFT(y|x) of each response, in nats; None for best of n."""
    lengths: list[list[int]]
    """Tokens of each response, with EOS."""
    gold: list[list[dict[str, float]]] | None
    """{helpful, honest, harmless, overall} of each response; None without a gold scorer."""
    text_losses: list[float] | None
    """Mean cross-entropy per token of N rows of held-out pretraining text; None for best of n."""
    raw_scores: list[list[float]] | None = None
    """The reward model's scores before `missing_eos_score`; None without a reward model."""
    compared: dict[str, list[list[list[str | None]]]] = field(default_factory=dict)
    """Judge that compares → (P, S, 2) verdicts on its samples and SFT's (`evaluation/panel.py`)."""

    @property
    def reward_model_scores(self) -> list[list[float]] | None:
        """Return the scores of the model that PPO maximises; None without one."""
        return self.scores.get(REWARD_MODEL)

    @property
    def held_out_scores(self) -> list[list[float]] | None:
        """Return the scores of rm's held-out model; None if rm trained none."""
        return self.scores.get(HELD_OUT)

    @property
    def judges(self) -> list[str]:
        """Return the names of the judges, the one that is trusted most first."""
        return [*([GOLD_JUDGE] if self.gold is not None else []), *self.scores]

    def judged_by(self, judge: str) -> np.ndarray:
        """Return what a judge gives each response, (P, S)."""
        if judge == GOLD_JUDGE:
            assert self.gold is not None, "there is no gold scorer"
            return np.array([[parts["overall"] for parts in row] for row in self.gold], float)
        return np.array(self.scores[judge], float)

    def state(self) -> dict:
        """Return the fields as JSON values, for a checkpoint."""
        return asdict(self)


def summarise(
    name: str,
    policy: Measured,
    sft: Measured,
    clusters: Sequence[Hashable],
    known: Sequence[bool] | None,
    judges: Sequence[Judge],
) -> dict:
    """Compute a policy's entry in results.json.

    Args:
        name: The policy's name.
        policy: What was measured of the policy.
        sft: What was measured of SFT, on the same prompts.
        clusters: The cluster of each prompt: its task where tasks are known, otherwise the prompt.
        known: Whether training data sets each prompt's task; None where tasks are not known.
        judges: The judges; the first one decides.

    Returns:
        The figures, their 95 % intervals under "ci95" and standard errors under "se", their paired
        differences to SFT under "differences_to_sft" (None for SFT), what each judge says under
        "judges", and
        the deciding judge's verdict as "win_rate_vs_sft", "difference_to_sft" and "judge_climbed".
    """
    estimates = {
        "score": _estimate(policy.reward_model_scores, clusters),
        "kl_to_sft": _estimate(policy.kl, clusters),
        "length": _estimate(policy.lengths, clusters),
        "eos_rate": _estimate(policy.finished, clusters, share=True),
        "pretrain_perplexity": perplexity_estimate(policy.text_losses),
    }
    verdicts = {judge.name: verdict(name, policy, sft, clusters, judge) for judge in judges}
    deciding = verdicts[judges[0].name] if judges else {}
    return {
        **{key: estimate and estimate["value"] for key, estimate in estimates.items()},
        "ci95": {key: estimate and _proper(estimate["ci95"]) for key, estimate in estimates.items()},
        "se": {key: estimate and estimate["se"] for key, estimate in estimates.items()},
        "differences_to_sft": None if policy is sft else differences(policy, sft, clusters),
        "asked": policy.asked,
        "judge_climbed": bool(deciding.get("climbed")),
        "win_rate_vs_sft": deciding.get("win_rate_vs_sft"),
        "difference_to_sft": deciding.get("difference_to_sft"),
        "judges": verdicts,
        "gold": _gold(policy, clusters),
        "gold_known_tasks": _gold(policy, clusters, known, True),
        "gold_held_out_tasks": _gold(policy, clusters, known, False),
    }


def differences(policy: Measured, sft: Measured, clusters: Sequence[Hashable]) -> dict[str, dict | None]:
    """Estimate the differences of a policy's figures to SFT's, paired by prompt.

    Args:
        policy: What was measured of the policy.
        sft: What was measured of SFT, on the same prompts.
        clusters: The cluster of each prompt.

    Returns:
        {"score", "length", "eos_rate", "pretrain_perplexity"}: {"value", "ci95"}, or None where one
        of the two was not measured.
    """

    def of(ours: list[list] | None, theirs: list[list] | None, bounded: bool = False) -> dict | None:
        if ours is None or theirs is None:
            return None
        gaps = [float(np.mean(a)) - float(np.mean(b)) for a, b in zip(ours, theirs, strict=True)]
        return _difference(np.array(gaps), clusters, bounded)

    return {
        "score": of(policy.reward_model_scores, sft.reward_model_scores),
        "length": of(policy.lengths, sft.lengths),
        "eos_rate": of(policy.finished, sft.finished, bounded=True),
        "pretrain_perplexity": perplexity_difference(policy.text_losses, sft.text_losses),
    }


def perplexity_difference(ours: Sequence[float] | None, theirs: Sequence[float] | None) -> dict | None:
    """Estimate the difference of two perplexities of the same rows, with a jackknife over rows.

    Args:
        ours: Mean cross-entropy per token of each row, (N,).
        theirs: The same of the other model.

    Returns:
        {"value", "ci95"}; None without rows, or where a perplexity is too large for a float.
    """
    if not ours or not theirs:
        return None
    one, other = np.array(ours, float), np.array(theirs, float)

    def gap(keep: np.ndarray) -> float:
        return _exp(float(one[keep].mean())) - _exp(float(other[keep].mean()))

    value = gap(np.ones(len(one), bool))
    if not math.isfinite(value):
        return None
    return {"value": value, "ci95": _proper(jackknife_interval(gap, range(len(one))))}


def verdict(name: str, policy: Measured, sft: Measured, clusters: Sequence[Hashable], judge: Judge) -> dict:
    """Compare a policy with SFT by one judge.

    Args:
        name: The policy's name.
        policy: What was measured of the policy.
        sft: What was measured of SFT, on the same prompts.
        clusters: The cluster of each prompt.
        judge: The judge.

    Returns:
        "score": its mean value of the policy's responses; "win_rate_vs_sft": None for a policy that
        it selected; "difference_to_sft": paired, None for SFT; "climbed": whether the policy was
        trained to please it, or selected by it.
    """
    if judge.compares:
        return compared_verdict(name, policy, clusters, judge)
    ours, theirs = policy.judged_by(judge.name), sft.judged_by(judge.name)
    bounded = judge.name == GOLD_JUDGE
    score = _estimate(ours.tolist(), clusters, share=bounded)
    difference = None
    if policy is not sft:
        difference = _difference(ours.mean(1) - theirs.mean(1), clusters, bounded)
    return {
        "score": score and score | {"ci95": _proper(score["ci95"])},
        "win_rate_vs_sft": None if name in judge.selected else win_rate(ours, theirs, clusters),
        "difference_to_sft": difference,
        "climbed": name in judge.climbed,
    }


def compared_verdict(name: str, policy: Measured, clusters: Sequence[Hashable], judge: Judge) -> dict:
    """Compare a policy with SFT by a judge that compares; as of `verdict`, without scores."""
    rate = None
    if judge.name in policy.compared and name not in judge.selected:
        orders = policy.compared[judge.name]
        rate = share_estimate([np.mean([preference_of(*pair) for pair in row]) for row in orders], clusters)
    return {"score": None, "win_rate_vs_sft": rate, "difference_to_sft": None, "climbed": name in judge.climbed}


def order_by_gold(judge: str, sft: Measured, clusters: Sequence[Hashable], known: Sequence[bool] | None) -> dict | None:
    """Estimate how often a judge orders two of SFT's responses to a prompt as gold does.

    No model was trained on these prompts, so this measures a reward model on unseen tasks too.

    Args:
        judge: The judge's name.
        sft: What was measured of SFT, with several samples per prompt.
        clusters: The cluster of each prompt.
        known: Whether training data sets each prompt's task.

    Returns:
        {"known_tasks", "held_out_tasks"}: the share of correct pairs among those whose gold
        differs, as from `share_estimate`; equal scores count half. None for a half without such a
        pair, and None for both without gold.
    """
    if judge not in sft.scores or sft.gold is None or known is None:
        return None
    correct: dict[bool, list[float]] = {True: [], False: []}
    of_cluster: dict[bool, list[Hashable]] = {True: [], False: []}
    rows = zip(sft.scores[judge], sft.judged_by(GOLD_JUDGE), clusters, known, strict=True)
    for scores, gold, cluster, is_known in rows:
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
        {"value", "ci95", "se"}; None without rows. A value too large for a float is infinite.
    """
    if not losses:
        return None
    estimate = mean_estimate(losses, range(len(losses)))
    ci95 = estimate["ci95"] and [_exp(end) for end in estimate["ci95"]]
    value, error = _exp(estimate["value"]), estimate["se"]
    return {"value": value, "ci95": ci95, "se": None if error is None else value * error}


def _estimate(rows: list[list] | None, clusters: Sequence[Hashable], share: bool = False) -> dict | None:
    """Estimate the mean of (P, S) observations (`share`: they are in [0, 1]); None without any."""
    if rows is None:
        return None
    values = [float(value) for row in rows for value in row]
    of_cluster = [cluster for cluster, row in zip(clusters, rows, strict=True) for _ in row]
    return share_estimate(values, of_cluster) if share else mean_estimate(values, of_cluster)


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
        The mean of each part, its interval under "parts_ci95", and that of "overall" as "ci95";
        None without gold or without such prompts.
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
    parts = {part: estimate["ci95"] for part, estimate in estimates.items() if part != "overall"}
    return {**figures, "ci95": overall["ci95"], "parts_ci95": parts, "n": len(chosen), "clusters": overall["clusters"]}


def _exp(value: float) -> float:
    """Return e to a power; infinity if a float cannot hold it."""
    return math.exp(value) if value < 700 else math.inf
