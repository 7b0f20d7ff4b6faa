"""Choose the prompts whose answers are shown to people, by a rule instead of by hand. Pure.

The stage evaluate answers these prompts greedily, and the report shows the answers.
"""

from collections.abc import Sequence

from stages.evaluation.judges import REWARD_MODEL
from stages.evaluation.results import Measured

GAINS, BETWEEN, LOSES, FLATTERED = "gains", "between", "loses", "flattered"


def main_policy(names: Sequence[str]) -> str:
    """Return the policy that prompts are chosen by: PPO, otherwise DPO, otherwise the last one."""
    return next((name for name in ("ppo", "dpo") if name in names), list(names)[-1])


def chosen_prompts(measured: dict[str, Measured], count: int) -> list[tuple[str, list[int]]]:
    """Choose the prompts to show.

    Args:
        measured: What was measured of each policy, with SFT. The first sample of each prompt
            counts.
        count: The most prompts to choose.

    Returns:
        Pairs of a group (GAINS, BETWEEN, LOSES or FLATTERED) and the indices of its prompts; no
        prompt is in two groups. Without a judge only BETWEEN, with prompts at equal distances.
    """
    if count == 0:
        return []
    policy, sft = measured[main_policy(list(measured))], measured["sft"]
    scores = None
    if policy.reward_model_scores is not None and policy.judges[0] != REWARD_MODEL:
        scores = [row[0] for row in policy.reward_model_scores]
    return choose(first_judgements(policy), first_judgements(sft), scores, len(sft.responses), count)


def first_judgements(measured: Measured) -> list[float] | None:
    """Return the deciding judge's value of each prompt's first sample; None without a judge."""
    return measured.judged_by(measured.judges[0])[:, 0].tolist() if measured.judges else None


def choose(
    ours: Sequence[float] | None, sft: Sequence[float] | None, scores: Sequence[float] | None, total: int, count: int
) -> list[tuple[str, list[int]]]:
    """Choose prompts by the judge's values of the main policy's and SFT's answers.

    GAINS and LOSES are the prompts at which the main policy gains and loses most. FLATTERED are
    those whose reward model score ranks highest compared with the judge's value. BETWEEN are spread
    over the rest.

    Args:
        ours: The judge's value of the main policy's answer to each prompt; None without a judge.
        sft: The judge's value of SFT's answers.
        scores: The reward model's scores of the main policy's answers; None if it is the judge.
        total: The number of prompts.
        count: The most prompts to choose.

    Returns:
        As from `chosen_prompts`.
    """
    count = min(count, total)
    if ours is None or sft is None:
        return [(BETWEEN, [(2 * k + 1) * total // (2 * count) for k in range(count)])] if count else []
    order = sorted(range(total), key=lambda i: (sft[i] - ours[i], i))
    size = max(1, count // (3 if scores is None else 4))
    gains = order[:size]
    loses = [i for i in order[::-1] if i not in gains][:size]
    taken = {*gains, *loses}
    flattered: list[int] = []
    if scores is not None:
        by_score, by_judge = positions(scores), positions(ours)
        most_flattered_first = sorted(range(total), key=lambda i: by_judge[i] - by_score[i])
        flattered = [i for i in most_flattered_first if i not in taken][:size]
        taken |= set(flattered)
    rest = [i for i in order if i not in taken]
    between: list[int] = []
    if rest:
        between = list(dict.fromkeys(rest[(2 * k + 1) * len(rest) // (2 * size)] for k in range(size)))
    groups = [(GAINS, gains), (BETWEEN, between), (LOSES, loses), (FLATTERED, flattered)]
    return [(name, chosen) for name, chosen in groups if chosen]


def positions(values: Sequence[float]) -> dict[int, int]:
    """Return the position of each index when the values are sorted in ascending order."""
    order = sorted(range(len(values)), key=lambda i: (values[i], i))
    return {i: position for position, i in enumerate(order)}
