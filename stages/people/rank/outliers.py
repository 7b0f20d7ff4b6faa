"""Name the labelers who stand out, each with the reason in words.

Among m labelers and several figures some interval always misses by chance. So intervals are made
wider until 1 in 20 *groups* of m would show one, and a labeler stands out only where the wider
interval and that of the others do not meet.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from stages.people.rank.figures import Counts, merged, share, shares
from stages.people.rank.judged import Facts, Judged

FEWEST = 8
"""Rankings of a labeler before anything is said of them."""
SPEED = 3.0
"""How many times faster than the others' median counts as too fast."""
COMPARED = {
    "known_accuracy": (True, "orders {} of the pairs with a known answer rightly"),
    "self_agreement": (True, "orders {} of the pairs of a repeated task as the first time"),
    "longest_best": (False, "ranks the longest answer best in {}"),
    "ties": (False, "gives the same place to {} of the pairs"),
    "skipped": (False, "skips {} of the tasks"),
}
"""Figure → whether a low value is the bad one, and the words for it."""
RISK = 0.05
"""How often a group without outliers may show one, for each figure."""


def widening(labelers: int) -> float:
    """Return how many times wider than a 95 % interval one for so many labelers is (Bonferroni)."""
    from scipy.special import ndtri  # heavy

    return float(ndtri(1 - RISK / (2 * max(1, labelers))) / ndtri(0.975))


def widened(estimate: Mapping[str, Any], factor: float) -> tuple[float, float]:
    """Return an estimate's interval, each side so many times longer."""
    value, (low, high) = estimate["value"], estimate["ci95"]
    return value - factor * (value - low), value + factor * (high - value)


def is_below(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None, factor: float) -> bool:
    """Return whether one share is clearly lower than another; never if one of them is missing."""
    if one is None or other is None:
        return False
    return widened(one, factor)[1] < widened(other, factor)[0]


def is_chance(own: Mapping[str, Any] | None, others: Mapping[str, Any] | None, factor: float) -> bool:
    """Return whether a labeler agrees as by a coin, where the others clearly agree more than that.

    It also finds somebody whose absence leaves others who disagree among themselves.
    """
    if own is None or others is None:
        return False
    low, high = own["ci95"]
    return low <= 0.5 and high < others["value"] and widened(others, factor)[0] > 0.5


def outliers(
    by_labeler: Mapping[str, Sequence[Judged]], figures: Mapping[str, Mapping[str, Any]], facts: Facts
) -> dict[str, list[str]]:
    """Return {code: why each labeler stands out}, only those who do.

    Args:
        by_labeler: The rows of each labeler, by code.
        figures: Those of each labeler: of `describe`, with "agreement" with all others and
            "agreement_of_others", theirs without the labeler.
        facts: The rest.
    """
    people = [name for name, rows in by_labeler.items() if rows]
    counts = {name: shares(by_labeler[name], facts) for name in people}
    whole = {key: merged(of_one[key] for of_one in counts.values()) for key in COMPARED}
    factor, found = widening(len(people)), {}
    for name in people:
        own, others = figures[name], {key: share(without(whole[key], counts[name][key])) for key in COMPARED}
        reasons = [*reasons_alone(own, factor), *reasons_beside(own, others, factor)]
        reasons += reasons_of_speed(own, [figures[other] for other in people if other != name])
        if reasons and len(by_labeler[name]) >= FEWEST:
            found[name] = reasons
    return found


def without(whole: Counts, part: Counts) -> Counts:
    """Return counts without those of one labeler."""
    rest = dict(whole)
    for task, (successes, tries) in part.items():
        rest[task] = (whole[task][0] - successes, whole[task][1] - tries)
    return rest


def reasons_alone(own: Mapping[str, Any], factor: float) -> list[str]:
    """Return why a labeler's own figures stand out."""
    first = own["first_best"]
    if first is None:
        return []
    low, high = widened(first, factor)
    if low <= first["expected"] <= high:
        return []
    how = "more" if first["value"] > first["expected"] else "less"
    return [
        f"ranks the answer that is shown first best {how} often than chance: {percent(first)}, "
        f"{round(100 * first['expected'])} % would be chance"
    ]


def reasons_beside(own: Mapping[str, Any], others: Mapping[str, Mapping[str, Any] | None], factor: float) -> list[str]:
    """Return why a labeler's figures stand out beside those of all others together."""
    reasons = []
    mine, theirs = own["agreement"], own["agreement_of_others"]
    if is_below(mine, theirs, factor) or is_chance(mine, theirs, factor):
        reasons.append(f"agrees with others on {percent(mine)} of pairs; they with each other on {percent(theirs)}")
    for key, (worse_if_low, sentence) in COMPARED.items():
        mine, theirs = own[key], others[key]
        low, high = (mine, theirs) if worse_if_low else (theirs, mine)
        if is_below(low, high, factor):
            reasons.append(f"{sentence.format(percent(mine))}; the others {percent(theirs)}")
    return reasons


def reasons_of_speed(own: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return whether a labeler is much faster than the others' median labeler, in words."""
    medians = sorted(one["seconds"]["median"] for one in others if one["seconds"] and one["seconds"]["n"] >= FEWEST)
    mine = own["seconds"]
    if not medians or mine is None or mine["n"] < FEWEST:
        return []
    middle = medians[len(medians) // 2]
    if mine["median"] * SPEED >= middle:
        return []
    return [f"takes {mine['median']:.0f} seconds a task (median); the others {middle:.0f}"]


def percent(estimate: Mapping[str, Any] | None) -> str:
    """Return a share with its interval, in percent."""
    assert estimate is not None, "it was compared"
    low, high = (round(100 * end) for end in estimate["ci95"])
    return f"{round(100 * estimate['value'])} % ({low} to {high})"
