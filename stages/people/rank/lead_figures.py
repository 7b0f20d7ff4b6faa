"""Put together what the lead's page shows of all labelers."""

import sqlite3
from typing import Any

from stages.people.rank.figures import (
    Counts,
    agreement_by_pair,
    describe,
    kendall,
    merged,
    pairs_of,
    share,
    skips_by_reason,
)
from stages.people.rank.judged import Facts, Judged, read_facts, read_judged
from stages.people.rank.outliers import outliers
from stages.people.rank.progress import decisions, progress
from stages.people.rank.rules import Rules
from stages.people.store.rows import Labeler, read_labelers


def read_all(
    connection: sqlite3.Connection, rules: Rules, now: float
) -> tuple[list[Judged], Facts, dict[int, Labeler], dict[str, Any]]:
    """Read what the figures are made of: rows, facts, labelers and progress, of one state."""
    judged = read_judged(connection)
    return judged, read_facts(connection), read_labelers(connection), progress(connection, rules, judged, now)


def overview(judged: list[Judged], facts: Facts, labelers: dict[int, Labeler], with_excluded: bool) -> dict[str, Any]:
    """Return the figures of all labelers together, of each, and of each two.

    Args:
        judged: What was judged.
        facts: The rest.
        labelers: The labelers by id.
        with_excluded: Whether rows that the lead excluded or sent back count, too.

    Returns:
        {all, agreement, kendall, pairs, skips, labelers: [{id, code, name, state, decisions,
        figures, outliers}]}.
    """
    rows = judged if with_excluded else [row for row in judged if row.counts]
    names = {labeler.id: labeler.code for labeler in labelers.values()}
    by_labeler: dict[str, list[Judged]] = {name: [] for name in names.values()}
    for row in rows:
        by_labeler[names[row.labeler]].append(row)
    by_pair = agreement_by_pair(rows, names)
    figures = {name: {**describe(own, facts), **beside(by_pair, name)} for name, own in by_labeler.items()}
    why = outliers(by_labeler, figures, facts)
    of_people: dict[int, list[Judged]] = {labeler: [] for labeler in labelers}
    for row in judged:
        of_people[row.labeler].append(row)
    people = [
        {
            "id": labeler.id,
            "code": labeler.code,
            "name": labeler.name,
            "state": labeler.state,
            "decisions": decisions(of_people[labeler.id]),
            "figures": figures[labeler.code],
            "outliers": why.get(labeler.code, []),
        }
        for labeler in labelers.values()
    ]
    return {
        "all": describe(rows, facts),
        "agreement": share(merged(by_pair.values())),
        "kendall": kendall(rows),
        "pairs": list(pairs_of(by_pair)),
        "skips": skips_by_reason(rows),
        "labelers": people,
    }


def beside(by_pair: dict[tuple[str, str], Counts], name: str) -> dict[str, Any]:
    """Return a labeler's agreement with all others, and that of the others with each other."""
    return {
        "agreement": share(merged(counts for pair, counts in by_pair.items() if name in pair)),
        "agreement_of_others": share(merged(counts for pair, counts in by_pair.items() if name not in pair)),
    }
