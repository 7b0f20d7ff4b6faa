"""Show the judges of `evaluate.judges`: what each says of the policies, and what it is worth."""

from typing import Any

from stages.page.numbers import NONE, interval, percent
from stages.page.results import JUDGES
from stages.page.table import Cell, Table, dense, policy_cell, share_cell

CHANCE = 0.5
MANY = 30
"""Pairs of labelers from which on a missing agreement says something about the judge."""
VERY_OFTEN = 0.8
"""A share of longer responses preferred above which it is said also without labelers."""


def shown_name(judge: str) -> str:
    """Return a judge's name on the page."""
    return JUDGES.get(judge, judge)


def estimate(given: dict[str, Any] | None) -> Cell:
    """Return a cell with a share and its interval in percent; empty where there is none."""
    known = given or {}
    return share_cell(known.get("value"), known.get("ci95"))


def ordered(results: dict[str, Any]) -> list[str]:
    """Return the judges, those that are trusted most first."""
    return [name for name in results["judges"] if name in results["panel"]["judges"]]


# -- tables ----------------------------------------------------------------------------------------


def tables(results: dict[str, Any], names: dict[str, str]) -> list[Table]:
    """Return what the judges are worth, the length-controlled win rates and the agreement.

    Args:
        results: results.json, completed.
        names: Policy → its name on the page.

    Returns:
        Three tables; none where the settings name no judges.
    """
    panel = results.get("panel")
    if not panel:
        return []
    judges = ordered(results)
    found = [length_controlled_table(panel, results, names), worth_table(panel, judges), agreement_table(panel, judges)]
    return [dense(table) for table in found if table.rows]


def length_controlled_table(panel: dict[str, Any], results: dict[str, Any], names: dict[str, str]) -> Table:
    """Return the win rates that policies would have with responses as long as SFT's."""
    judges = ordered(results)
    rows = []
    for name, by_judge in panel["policies"].items():
        cells = []
        for judge in judges:
            about = results["judges"].get(judge) or {}
            if name in about.get("selected", []):
                cells.append(Cell("selected by it"))
                continue
            cell = estimate(by_judge[judge]["length_controlled_win_rate"])
            mark = " †" if name in about.get("climbed", []) else ""
            cells.append(Cell(cell.text + mark, cell.small))
        rows.append((policy_cell(name, names), *cells))
    label = "Win rate against SFT if all responses were equally long, by each judge, 95 % intervals"
    return Table(label, ("policy", *map(shown_name, judges)), tuple(rows))


def worth_table(panel: dict[str, Any], judges: list[str]) -> Table:
    """Return how far each judge can be trusted."""
    people = panel["people"]["longer"]
    columns = ("judge", "agrees with labelers", "prefers the response that it reads first",
               "both orders agree", "prefers the longer response", "the same of labelers' pairs",
               "says the same again", "without a valid verdict")  # fmt: skip
    rows = []
    for name in judges:
        judge = panel["judges"][name]
        position = judge["position"] or {}
        invalid = NONE
        if judge["invalid"] is not None and judge["asked"]:
            invalid = f"{judge['invalid']:,} of {judge['asked']:,}"
        rows.append((
            Cell(shown_name(name)),
            estimate(judge["people"]),
            estimate(position.get("first")),
            estimate(position.get("consistent")),
            estimate(judge["longer"]),
            estimate(judge["people_longer"]),
            estimate(judge["repeatability"]),
            Cell(invalid),
        ))  # fmt: skip
    if people is not None:
        cell = estimate(people)
        rows.append((Cell("labelers"), *(Cell(NONE) for _ in range(4)), cell, Cell(NONE), Cell(NONE)))
    label = f"What each judge is worth; labelers ranked {panel['people']['pairs']:,} of the pairs, 95 % intervals"
    return Table(label, columns, tuple(rows))


def agreement_table(panel: dict[str, Any], judges: list[str]) -> Table:
    """Return how often each two judges prefer the same response."""
    found = {frozenset(entry["judges"]): entry for entry in panel["agreement"]}
    rows = []
    for index, one in enumerate(judges[:-1]):
        cells = [
            estimate(found.get(frozenset((one, other)))) if k > index else Cell("") for k, other in enumerate(judges)
        ]
        rows.append((Cell(shown_name(one)), *cells[1:]))
    label = "How often two judges prefer the same response, ties left out, 95 % intervals"
    return Table(label, ("judge", *map(shown_name, judges[1:])), tuple(rows))


# -- sentences -------------------------------------------------------------------------------------


def sentences(results: dict[str, Any]) -> list[str]:
    """Return what speaks against a judge, one sentence a judge and reason.

    Args:
        results: results.json, completed.
    """
    panel = results.get("panel")
    if not panel:
        return []
    people = panel["people"]["longer"]
    lines = []
    for name in ordered(results):
        judge = panel["judges"][name]
        checks = (by_position(judge), by_length(judge, people), by_repetition(judge), by_labelers(judge))
        reasons = [line for line in checks if line]
        if judge["invalid"] and judge["invalid"] > judge["asked"] / 20:
            reasons.append(f"gives no valid verdict in {percent(judge['invalid'] / judge['asked'])} of cases")
        if reasons:
            lines.append(f"{shown_name(name)}: {'; '.join(reasons)}.")
    return lines


def by_position(judge: dict[str, Any]) -> str:
    """Return a clause if the order of two responses decides more than chance would, or ""."""
    first = (judge["position"] or {}).get("first")
    consistent = (judge["position"] or {}).get("consistent")
    if first is None or apart(first, CHANCE) == 0:
        if consistent is None or consistent["ci95"][1] >= VERY_OFTEN:
            return ""
        return (
            f"has the same outcome in both orders on only {percent(consistent['value'])} "
            f"({interval(*consistent['ci95'])}) of pairs"
        )
    which = "first" if first["value"] > CHANCE else "second"
    share = first["value"] if which == "first" else 1 - first["value"]
    line = f"prefers the response that it reads {which} in {percent(share)} of its verdicts"
    if consistent is not None:
        line += f", so that only {percent(consistent['value'])} of pairs have the same outcome in both orders"
    return line


def by_length(judge: dict[str, Any], people: dict[str, Any] | None) -> str:
    """Return a clause if a judge prefers the longer response more often than labelers do, or "".

    Where labelers do not show it, only a very strong preference counts: the longer response may be
    the better one.
    """
    more, own = judge["longer_than_people"], judge["people_longer"]
    if more is not None and more["ci95"][0] > 0 and people is not None:
        return (
            f"prefers the longer response in {percent(own['value'])} of the pairs that labelers ranked, and labelers "
            f"in {percent(people['value'])} (difference {interval(*more['ci95'])}\u00a0%)"
        )
    own = judge["longer"]
    if own is None or own["ci95"][0] < VERY_OFTEN:
        return ""
    return f"prefers the longer response in {percent(own['value'])} ({interval(*own['ci95'])}) of pairs"


def by_repetition(judge: dict[str, Any]) -> str:
    """Return a clause if a judge often says something else when asked again; otherwise ""."""
    same = judge["repeatability"]
    if same is None or same["ci95"][1] >= 0.9:
        return ""
    return f"says the same again in only {percent(same['value'])} ({interval(*same['ci95'])}) of cases"


def by_labelers(judge: dict[str, Any]) -> str:
    """Return a clause if a judge may agree with labelers by chance alone, or ""."""
    agrees = judge["people"]
    if agrees is None or agrees["ci95"][0] > CHANCE or agrees["n"] < MANY:
        return ""
    return (
        f"agrees with labelers on {percent(agrees['value'])} ({interval(*agrees['ci95'])}) of pairs, which could be "
        f"chance"
    )


def apart(given: dict[str, Any], value: float) -> int:
    """Return 1 or −1 if an interval lies above or below a value; 0 if it contains it."""
    low, high = given["ci95"]
    return (low > value) - (high < value)
