"""Compare two experiments on the evaluation prompts that both answered. Pure.

Prompts are matched by their content, so that the order of the files does not matter. The unit is
the cluster: the task in the embedded world, otherwise the prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.evaluation.statistics import mean_estimate, share_estimate, win_rate
from stages.page.compare_read import Row, Side
from stages.page.samples import key

PLAIN = ("length", "finished")
"""The figures of a response that no judge gives."""


@dataclass(frozen=True)
class Answers:
    """Hold what a policy of one experiment answered to a prompt."""

    rows: list[Row]
    """Its samples: rows of responses.jsonl."""

    @property
    def cluster(self) -> str:
        """Return the unit that the prompt belongs to."""
        return str(self.rows[0].get("cluster") or key(self.rows[0]["prompt"]))

    def values(self, figure: str) -> list[float] | None:
        """Return a figure of each sample; None if any has none."""
        found = [value_of(row, figure) for row in self.rows]
        return None if any(value is None for value in found) else [float(value) for value in found]


@dataclass(frozen=True)
class Pairing:
    """Hold the prompts that a policy of two experiments answered."""

    ours: list[Answers]
    """Our answers to the common prompts."""
    theirs: list[Answers]
    """The other experiment's answers to the same prompts, in the same order."""
    total: int
    """Number of prompts that at least one of the two answered."""
    problems: list[str]
    """Why some figures cannot be compared, one phrase each."""
    same_judge: bool
    """Whether one and the same reward model scored both."""


def value_of(row: Row, figure: str) -> Any:
    """Return a figure of a response: length, finished or what a judge says; None if missing."""
    if figure == "gold":
        return (row.get("gold") or {}).get("overall")
    if figure == "reward_model":
        return row.get("score")
    return row.get(figure) if figure in PLAIN else (row.get("judges") or {}).get(figure)


def judges_of(side: Side, policy: str | None = None) -> list[str]:
    """Return the judges of an experiment, the one that is trusted most first.

    Args:
        side: The experiment.
        policy: Leave out the judges that selected this policy's answers: they prefer them however
            poor they are.
    """
    judges = {} if side.results is None else side.results["judges"]
    return [name for name, judge in judges.items() if policy not in judge["selected"]]


def answers_of(side: Side, policy: str) -> dict[str, Answers]:
    """Return the answers of a policy, by the content of the prompt."""
    rows: dict[str, list[Row]] = {}
    for row in side.responses:
        if row["policy"] == policy:
            rows.setdefault(key(row["prompt"]), []).append(row)
    return {prompt: Answers(own) for prompt, own in rows.items()}


def pair(ours: Side, theirs: Side, policy: str) -> Pairing:
    """Match the answers of a policy in two experiments."""
    mine, others = answers_of(ours, policy), answers_of(theirs, policy)
    common = [prompt for prompt in mine if prompt in others]
    problems = sampling_differences(ours, theirs)
    return Pairing(
        [mine[prompt] for prompt in common],
        [others[prompt] for prompt in common],
        len(mine.keys() | others.keys()),
        problems,
        same_judge(ours, theirs),
    )


def same_judge(ours: Side, theirs: Side) -> bool:
    """Return whether the same judges, besides gold, scored both experiments in one way."""
    one, other = (judging(side) for side in (ours, theirs))
    return one is not None and one == other


def judging(side: Side) -> dict[str, Any] | None:
    """Return what the judges of an experiment are made of; None if nothing but gold judged it."""
    manifest = side.manifests.get("evaluate")
    if manifest is None:
        return None
    settings = manifest["config"].get("evaluate") or {}
    made_of = {key: digest for key, digest in manifest["inputs"].items() if key == "rm" or key.startswith("folder:")}
    rules = {key: settings.get(key) for key in ("missing_eos_score", "reward_ensemble", "judges")}
    return made_of | rules if made_of or rules["judges"] else None


def sampling_differences(ours: Side, theirs: Side) -> list[str]:
    """Return the settings of sampling in which two evaluations differ, one phrase each."""
    settings = [(side.manifests.get("evaluate", {}).get("config", {}).get("evaluate") or {}) for side in (ours, theirs)]
    names = ("temperature", "top_p", "top_k", "response_length", "max_length")
    return [f"evaluate.{name} is {settings[0].get(name)} here and {settings[1].get(name)} there"
            for name in names if settings[0].get(name) != settings[1].get(name)]  # fmt: skip


def difference(pairing: Pairing, figure: str) -> dict[str, Any] | None:
    """Estimate the mean of paired differences, ours − theirs.

    Args:
        pairing: The common prompts.
        figure: "gold" or "finished", which are in [0, 1], "length" or another judge.

    Returns:
        {value, ci95, n}; None if the figure was not measured, or if other judges gave the scores.
    """
    if not pairing.ours or (figure not in ("gold", *PLAIN) and not pairing.same_judge):
        return None
    gaps, clusters = [], []
    for mine, others in zip(pairing.ours, pairing.theirs, strict=True):
        one, other = mine.values(figure), others.values(figure)
        if one is None or other is None:
            return None
        gaps.append(sum(one) / len(one) - sum(other) / len(other))
        clusters.append(mine.cluster)
    if figure in ("gold", "finished"):  # bounded: the interval has a width even if all are equal
        estimate = share_estimate([(gap + 1) / 2 for gap in gaps], clusters)
        ends = None if estimate["ci95"] is None else [2 * end - 1 for end in estimate["ci95"]]
        return {"value": 2 * estimate["value"] - 1, "ci95": ends, "n": len(gaps)}
    return mean_estimate(gaps, clusters)


def wins_over(pairing: Pairing, judges: Sequence[str]) -> dict[str, Any] | None:
    """Estimate how often our answer beats theirs to the same prompt.

    Args:
        pairing: The common prompts.
        judges: The judges of both, the one that is trusted most first; the first that can judge
            both decides.

    Returns:
        {value, ci95, n, by}, where `by` names the judge; None without one that judged both.
    """
    for judge in judges:
        if judge != "gold" and not pairing.same_judge:
            continue
        ours, theirs = (columns(answers, judge) for answers in (pairing.ours, pairing.theirs))
        if ours is not None and theirs is not None:
            clusters = [answers.cluster for answers in pairing.ours]
            return win_rate(ours, theirs, clusters) | {"by": judge}
    return None


def columns(answers: Sequence[Answers], figure: str) -> np.ndarray | None:
    """Return a figure as (prompts, samples); None if it was not measured of every sample.

    Where prompts have different numbers of samples, the smallest number counts.
    """
    values = [own.values(figure) for own in answers]
    if not values or any(row is None for row in values):
        return None
    fewest = min(len(row) for row in values if row is not None)
    return np.array([row[:fewest] for row in values if row is not None], float)
