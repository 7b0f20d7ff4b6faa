"""Choose prompts, and put the answers of several experiments beside each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stages.evaluation.shown_prompts import BETWEEN, GAINS, LOSES, choose
from stages.page.compare_pairs import Answers, answers_of, judges_of, same_judge
from stages.page.compare_read import Row, Side


@dataclass(frozen=True)
class Said:
    """Hold the answers of one experiment's policy."""

    label: str
    """The experiment."""
    tone: str
    """Its tone."""
    row: Row | None
    """The first sample, a row of responses.jsonl; None if the prompt was not asked there."""


@dataclass(frozen=True)
class Asked:
    """A prompt and the answers of all experiments."""

    turns: list[dict[str, Any]]
    """The messages of the prompt."""
    answers: list[Said]
    """An answer of each experiment."""


def side_by_side(
    sides: Sequence[Side], policy: str, tones: Sequence[str], ends: tuple[int, int], count: int
) -> list[tuple[str, list[Asked]]]:
    """Choose prompts by rule, and put the answers of all experiments side by side.

    Args:
        sides: The experiments.
        policy: The policy that answers.
        tones: Tone of each experiment.
        ends: Indices of the two experiments whose judgements choose: the other one, the baseline.
        count: The most prompts.

    Returns:
        (title, prompts) of each group: where the one gains and loses most against the baseline, and
        some in between; without a judge of both, prompts at regular intervals.
    """
    by_side = [answers_of(side, policy) for side in sides]
    ours, theirs = (by_side[end] for end in ends)
    common = [prompt for prompt in theirs if prompt in ours]
    if not common:
        return []
    judged = judgements([ours[p] for p in common], [theirs[p] for p in common], sides[ends[0]], sides[ends[1]])
    names = sides[ends[0]].label, sides[ends[1]].label
    titles = {
        GAINS: f"Where {names[0]} gains most over {names[1]}",
        BETWEEN: "In between" if judged[0] else "At regular intervals in the file",
        LOSES: f"Where {names[0]} loses most against {names[1]}",
    }
    groups = []
    for group, indices in choose(*judged, None, len(common), count):
        prompts = []
        for index in indices:
            prompt = common[index]
            told = theirs[prompt].rows[0]["prompt"]
            turns = [{"role": "user", "content": told}] if isinstance(told, str) else told
            rows = [own[prompt].rows[0] if prompt in own else None for own in by_side]
            answers = [Said(side.label, tone, row) for side, tone, row in zip(sides, tones, rows, strict=True)]
            prompts.append(Asked(turns, answers))
        groups.append((titles[group], prompts))
    return groups


def judgements(
    ours: Sequence[Answers], theirs: Sequence[Answers], one: Side, other: Side
) -> tuple[list[float] | None, list[float] | None]:
    """Return the judge's value of the first answer to each prompt; None without a judge of both."""
    for judge in judges_of(other):
        if judge != "gold" and not same_judge(one, other):
            continue
        columns = [[own.values(judge) for own in answers] for answers in (ours, theirs)]
        if all(values is not None for column in columns for values in column):
            first, second = ([values[0] for values in column if values] for column in columns)
            return first, second
    return None, None
