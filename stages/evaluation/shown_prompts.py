"""Which prompts show most: chosen by rule, so that nobody picks the nice ones. `evaluate` answers them greedily, and
the report shows them. Pure."""

from collections.abc import Sequence

from stages.evaluation.results import Measured

GAINS, BETWEEN, LOSES, FLATTERED = "gains", "between", "loses", "flattered"


def main_policy(names: Sequence[str]) -> str:
    """Return the policy that samples are chosen by: PPO, otherwise DPO, otherwise the last one."""
    return next((name for name in ("ppo", "dpo") if name in names), list(names)[-1])


def chosen_prompts(done: dict[str, Measured], count: int) -> list[tuple[str, list[int]]]:
    """Choose prompts to show, by rule: so nobody picks the nice ones.

    Args:
        done: What was measured of each policy, SFT among them. The first sample to each prompt counts.
        count: How many prompts, at most.

    Returns:
        (GAINS, BETWEEN, LOSES or FLATTERED, prompts by number) of each group, none twice. Where nothing was judged:
        only BETWEEN, at even distances.
    """
    if count == 0:
        return []
    judged = {name: first_judgements(done[name]) for name in {main_policy(list(done)), "sft"}}
    measured = done[main_policy(list(done))]
    scores = None if measured.gold is None or measured.scores is None else [row[0] for row in measured.scores]
    return choose(judged[main_policy(list(done))], judged["sft"], scores, len(done["sft"].responses), count)


def first_judgements(measured: Measured) -> list[float] | None:
    """Return what the judge says of the first sample to each prompt; None where there is no judge."""
    if measured.gold is not None:
        return [row[0]["overall"] for row in measured.gold]
    return None if measured.scores is None else [row[0] for row in measured.scores]


def choose(
    ours: Sequence[float] | None, sft: Sequence[float] | None, scores: Sequence[float] | None, total: int, count: int
) -> list[tuple[str, list[int]]]:
    """Choose prompts by what the judge says of both answers to each; as `chosen_prompts`.

    Args:
        ours: The judge's word on the main policy's answers; None where there is no judge.
        sft: The same of SFT's.
        scores: Where the judge is gold: the reward model's scores of the main policy's answers, otherwise None.
        total: How many prompts there are.
        count: How many are wanted.
    """
    count = min(count, total)
    if ours is None or sft is None:
        return [(BETWEEN, [(2 * k + 1) * total // (2 * count) for k in range(count)])] if count else []
    order = sorted(range(total), key=lambda i: (sft[i] - ours[i], i))
    part = max(1, count // (3 if scores is None else 4))
    gains, loses = order[:part], [i for i in order[::-1] if i not in order[:part]][:part]
    taken = {*gains, *loses}
    flattered: list[int] = []
    if scores is not None:
        by_score, by_judge = places(scores), places(ours)
        doubtful = sorted(range(total), key=lambda i: by_judge[i] - by_score[i])
        flattered = [i for i in doubtful if i not in taken][:part]
        taken |= set(flattered)
    rest = [i for i in order if i not in taken]
    some = list(dict.fromkeys(rest[(2 * k + 1) * len(rest) // (2 * part)] for k in range(part))) if rest else []
    groups = [(GAINS, gains), (BETWEEN, some), (LOSES, loses), (FLATTERED, flattered)]
    return [(name, chosen) for name, chosen in groups if chosen]


def places(values: Sequence[float]) -> dict[int, int]:
    """Return the place of each index when the values are sorted."""
    return {i: place for place, i in enumerate(sorted(range(len(values)), key=lambda i: (values[i], i)))}
