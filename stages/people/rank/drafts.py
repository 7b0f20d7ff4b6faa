"""Fold the moves of a labeler into a draft: pure functions, the state of a task in progress."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

from stages.people.store.rows import Draft
from stages.people.web.errors import Refused, number_of, text_of

LONGEST_NOTE = 4_000
"""Characters of a note."""
TRANSPARENT = ("tick", "submit", "skip", "reopen")
"""Moves that change nothing in the draft; undo looks past them."""
LIKERT = (1, 7)
CONFIDENCE = (1, 5)


@dataclass(frozen=True)
class Move:
    """One thing that a labeler did."""

    kind: str
    """What: see `apply`."""
    body: dict[str, Any]
    """With what."""


def effective(moves: Iterable[Move]) -> list[Move]:
    """Return the moves that are not undone and that change the draft."""
    kept: list[Move] = []
    for move in moves:
        if move.kind == "undo":
            if kept:
                kept.pop()
        elif move.kind not in TRANSPARENT:
            kept.append(move)
    return kept


def fold(moves: Iterable[Move], answers: Collection[int]) -> Draft:
    """Return the draft that moves lead to.

    Args:
        moves: All moves of an assignment in order.
        answers: The ids of the task's answers.
    """
    draft = Draft(tiers=((),) * len(answers))
    for move in effective(moves):
        draft = apply(draft, move, answers)
    return draft


def apply(draft: Draft, move: Move, answers: Collection[int]) -> Draft:
    """Return the draft after one more move, which is neither undone nor transparent.

    Args:
        draft: The draft before.
        move: The move. Its kinds and bodies: `place` {answer, tier: slot from 0, or null: not
            placed; new: whether in a slot of its own in front of that one}, `same` {answer, as},
            `aside` and `unaside` {answer}, `likert` {answer, overall: 1 to 7 or null}, `flag`
            {answer, flag, value}, `confidence` {value: 1 to 5 or null}, `note` {text}.
        answers: The ids of the task's answers.

    Raises:
        Refused: The move makes no sense; nothing of it counts.
    """
    body = move.body
    if move.kind == "note":
        return replace(draft, note=text_of(body, "text", LONGEST_NOTE, default=""))
    if move.kind == "confidence":
        value = None if body.get("value") is None else number_of(body, "value", *CONFIDENCE)
        return replace(draft, confidence=value)
    answer = answer_in(body, "answer", answers)
    if move.kind == "likert":
        overall = None if body.get("overall") is None else number_of(body, "overall", *LIKERT)
        return with_likert(draft, answer, {"overall": overall})
    if move.kind == "flag":
        return with_flag(draft, answer, body)
    if move.kind == "aside":
        return replace(without(draft, answer), set_aside=(*without(draft, answer).set_aside, answer))
    if move.kind == "unaside":
        return without(draft, answer)
    if move.kind == "place":
        if body.get("tier") is None:
            return without(draft, answer)
        return in_slot(draft, answer, number_of(body, "tier", 0, len(answers) - 1), is_new=body.get("new") is True)
    if move.kind == "same":
        other = answer_in(body, "as", answers)
        slot = next((number for number, tier in enumerate(draft.tiers) if other in tier), None)
        if slot is None or other == answer:
            raise Refused(400, "the other answer has no place yet; place it first")
        return in_slot(draft, answer, slot)
    raise Refused(400, f"{move.kind!r} is not a move; reload the page")


def answer_in(body: dict[str, Any], key: str, answers: Collection[int]) -> int:
    """Return the id of an answer in a body.

    Raises:
        Refused: It is not one of this task's.
    """
    value = body.get(key)
    if type(value) is not int or value not in answers:
        raise Refused(400, f"{key}: is not an answer of this task; reload the page")
    return value


def without(draft: Draft, answer: int) -> Draft:
    """Return the draft with an answer not placed."""
    tiers = tuple(tuple(other for other in tier if other != answer) for tier in draft.tiers)
    return replace(draft, tiers=tiers, set_aside=tuple(other for other in draft.set_aside if other != answer))


def in_slot(draft: Draft, answer: int, slot: int, is_new: bool = False) -> Draft:
    """Return the draft with an answer in a slot.

    Args:
        draft: The draft.
        answer: The answer.
        slot: The slot, from 0.
        is_new: Whether it gets a slot of its own in front of that one. An empty slot makes room:
            the first after it, otherwise the last before it.
    """
    rest = without(draft, answer)
    tiers = list(rest.tiers)
    if not is_new:
        tiers[slot] = (*tiers[slot], answer)
        return replace(rest, tiers=tuple(tiers))
    tiers.insert(slot, (answer,))
    empty = [number for number, tier in enumerate(tiers) if not tier]  # at least one: K answers, K slots
    behind = [number for number in empty if number > slot]
    del tiers[behind[0] if behind else empty[-1]]
    return replace(rest, tiers=tuple(tiers))


def with_likert(draft: Draft, answer: int, change: dict[str, Any]) -> Draft:
    """Return the draft with a change of what is said of one answer alone."""
    before = draft.likert.get(answer, {"overall": None, "flags": {}})
    return replace(draft, likert={**draft.likert, answer: {**before, **change}})


def with_flag(draft: Draft, answer: int, body: dict[str, Any]) -> Draft:
    """Return the draft with a flag of an answer set, or taken back by null."""
    name, value = text_of(body, "flag", 100), body.get("value")
    if value is not None and type(value) is not bool:
        raise Refused(400, "value: true, false or null is needed")
    flags = dict(draft.likert.get(answer, {}).get("flags", {}))
    flags.pop(name, None)
    if value is not None:
        flags[name] = value
    return with_likert(draft, answer, {"flags": flags})


def missing(draft: Draft, answers: Collection[int], needs_likert: bool) -> str | None:
    """Return what a draft lacks before it can be submitted; None if nothing.

    Args:
        draft: The draft.
        answers: The ids of the task's answers.
        needs_likert: Whether each answer has to be rated alone.
    """
    placed = {answer for tier in draft.tiers for answer in tier}
    left = len(set(answers) - placed - set(draft.set_aside))
    if left:
        return f"{left} of the answers have no place yet; place them, or say that they cannot be judged"
    if not placed:
        return "no answer is placed; place one, or skip the task and say why"
    if needs_likert:
        unrated = sum(draft.likert.get(answer, {}).get("overall") is None for answer in placed)
        if unrated:
            return f"{unrated} of the answers are not rated from 1 to 7 yet; rate each of them first"
    return None
