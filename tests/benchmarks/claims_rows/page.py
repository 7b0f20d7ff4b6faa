"""Write the page of claims: a table of verdicts, then a section for each row.

It has the report's style and opens without a network.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from sweeps.page import document
from sweeps.text import span, with_interval

from claims_rows.row import Row
from claims_rows.verdicts import FEWEST_SEEDS, NOT_RUN, VERDICTS, claims_difference, expected_by_chance
from stages.page.drawing import picture
from stages.page.numbers import capitalised, fixed, listed
from stages.page.plot import Key, Plot

TITLE = "What the papers claim, measured"
STYLE = """
.verdict { font-weight: 600; white-space: nowrap; }
.verdict::before { content: var(--mark); content: var(--mark) / ""; margin-right: .4rem; }
.v-holds { color: var(--best_of_n); --mark: "✓"; } .v-weaker { color: var(--ppo); --mark: "≈"; }
.v-does-not-hold { color: var(--dpo); --mark: "✕"; } .v-cannot-be-told { color: var(--soft); --mark: "?"; }
.v-not-run { color: var(--soft); --mark: "–"; }
td.left a { color: inherit; text-decoration-color: var(--line); }
td.left.narrow { min-width: 0; white-space: nowrap; }
th.left { text-align: left; }
section { border-top: 1px solid var(--line); margin-top: 2.5rem; } section h3 { font-size: 1.15rem; }
section dl.facts { margin: 1rem 0; } .ours td.left { min-width: 14rem; }
h2 + section { border-top: 0; margin-top: 0; }
@media print { section { margin-top: 14pt; } .ours td:not(.left) { white-space: nowrap; } }
"""


@dataclass(frozen=True)
class Entry:
    """Hold a row with what was found for it."""

    row: Row
    """The row."""
    finding: dict[str, Any]
    """As of `finding_of`."""
    plots: Sequence[Plot]
    """Its pictures; none if it has not run."""
    quick: bool
    """Whether fewer seeds or smaller sizes were used than a claim needs."""
    command: str
    """The command that makes this row alone."""
    minutes: float | None
    """What its measurement took on all seeds; None if it has not run."""
    commit: str
    """The commit of its measurement; several are joined."""
    date: str
    """When it was measured last."""
    failed: str = ""
    """Why it could not be measured."""
    digest: str = ""
    """Digest of the settings on the seeds that were found, without the content of data."""


def page(meta: str, entries: Sequence[Entry]) -> str:
    """Return the whole page.

    Args:
        meta: A line below the heading.
        entries: The rows in their order.
    """
    parts = [f'<p class="summary">{escape(sentence)}</p>' for sentence in summary(entries)]
    parts += [f"<p>{escape(sentence)}</p>" for sentence in ground_rules(entries)]
    parts.append(verdict_table(entries))
    at = ""
    for entry in entries:
        if entry.row.part != at:
            at = entry.row.part
            parts.append(f"<h2>{escape(at)}</h2>")
        parts.append(section(entry))
    return document(TITLE, meta, "\n".join(parts), STYLE)


def summary(entries: Sequence[Entry]) -> list[str]:
    """Return how often each verdict was given."""
    counts = Counter(entry.finding["verdict"] for entry in entries)
    said = listed([f"{verdict} {counts[verdict]}" for verdict in VERDICTS if counts[verdict]])
    quick = sum(entry.quick and entry.finding["verdict"] != NOT_RUN for entry in entries)
    sentences = [f"{len(entries)} claims: {said}."]
    if quick:
        sentences.append(
            f"{quick} of the verdicts are marked quick: they come from smaller sizes or fewer than {FEWEST_SEEDS} "
            "seeds, and show only that the row runs."
        )
    return sentences


def ground_rules(entries: Sequence[Entry]) -> list[str]:
    """Return how verdicts come about, and what chance does to so many of them."""
    intervals = [figure["ci95"] for entry in entries for figure in entry.finding["figures"]]
    known = sum(ci95 is not None for ci95 in intervals)
    main = [entry for entry in entries if entry.finding["figures"][0]["ci95"] is not None]
    differing = sum(claims_difference(entry.row.figures[0].rule) for entry in main)
    return [
        "Each interval is 95\u00a0%, Student's t over seeds, of shares such that it stays between 0 and 1; differences "
        "are paired by seed. Each seed has a world of its own; rows of a real model have the same data on every seed. "
        "Settings were chosen on seeds 0 to 2 (a few on 10 and 30), and other benchmarks have shown seeds up to 7, so "
        "a whole run reports others. The rule of a row was written before it was run on them; it is shown in its "
        "section.",
        f"Chance: {known} figures in {len(main)} rows have an interval. If all were independent, "
        f"{fixed(expected_by_chance(known), 1)} of the intervals would miss the true value, and "
        f"{fixed(expected_by_chance(differing) / 2, 1)} of the {differing} rows that claim a difference would hold or "
        "be weaker if there were none at all. A row that claims no loss holds where there is no difference. Rows that "
        "share a measurement are not independent: they err together.",
    ]


def badge(entry: Entry) -> str:
    """Return a row's verdict as HTML."""
    return verdict_badge(entry.finding["verdict"], entry.quick)


def verdict_badge(verdict: str, quick: bool) -> str:
    """Return a verdict as HTML, marked where it is quick."""
    mark = " <small>quick</small>" if quick and verdict != NOT_RUN else ""
    return f'<span class="verdict v-{verdict.replace(" ", "-")}">{verdict}</span>{mark}'


def seeds_text(seeds: Sequence[int]) -> str:
    """Return seeds as text: 3 to 7, or 3, 5."""
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds)) or "–"


def ours_text(entry: Entry) -> str:
    """Return the main figure with its interval."""
    figure = entry.finding["figures"][0]
    if figure["value"] is None:
        return "not run" if entry.finding["verdict"] == NOT_RUN else "not defined"
    return with_interval(figure, figure["digits"])


def verdict_table(entries: Sequence[Entry]) -> str:
    """Return the table at the top: claim, verdict, ours, source, seeds."""
    rows = []
    for entry in entries:
        figure = entry.finding["figures"][0]
        rows.append(
            f'<tr><td class="left"><a href="#{entry.row.key}">{escape(entry.row.claim)}</a></td>'
            f'<td class="left narrow">{badge(entry)}</td>'
            f'<td class="left">{escape(ours_text(entry))}<br><small>{escape(figure["name"])}</small></td>'
            f'<td class="left">{escape(entry.row.source)}</td>'
            f'<td class="left narrow">{seeds_text(entry.finding["seeds"])}</td></tr>'
        )
    head = "".join(
        f'<th scope="col" class="left">{heading}</th>'
        for heading in ("claim", "verdict", "ours, 95\u00a0% interval", "source", "seeds")
    )
    return (
        '<p class="hint">The table scrolls sideways.</p><div class="scroll" tabindex="0" role="region" '
        'aria-label="Verdicts">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def section(entry: Entry) -> str:
    """Return the section of a row."""
    row, finding = entry.row, entry.finding
    facts = {
        "verdict": badge(entry),
        "seeds": seeds_text(finding["seeds"]),
        "minutes": "–" if entry.minutes is None else fixed(entry.minutes, 1),
        "commit, date": escape(", ".join(filter(None, [entry.commit, entry.date])) or "–"),
        "this row alone": f"<code>{escape(entry.command)}</code>",
    }
    here = f"{capitalised(finding['figures'][0]['name'])}: {ours_text(entry)}."
    listed_facts = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items())
    said = [f"<p><b>{escape(row.source)}:</b> {escape(row.paper)}</p>"]
    if finding["verdict"] != NOT_RUN:
        said.append(f"<p><b>Here, seeds {seeds_text(finding['seeds'])}:</b> {escape(here)}</p>")
    if row.note:
        said.append(f'<p class="note-text">{escape(row.note)}</p>')
    if entry.failed:
        said.append(f"<p><b>Could not be measured:</b> {escape(entry.failed)}</p>")
    return (
        f'<section id="{row.key}"><h3>{escape(row.claim)}</h3>{"".join(said)}<dl class="facts">{listed_facts}</dl>'
        f'{figures_table(entry)}<div class="grid2">{"".join(map(drawn, entry.plots))}</div></section>'
    )


def figures_table(entry: Entry) -> str:
    """Return the table of a row's figures with their rules."""
    rows = []
    for figure in entry.finding["figures"]:
        value = "–" if figure["value"] is None else fixed(figure["value"], figure["digits"])
        rows.append(
            f'<tr><td class="left">{escape(capitalised(figure["name"]))}</td><td>{value}</td>'
            f"<td>{span(figure['ci95'], figure['digits'])}</td>"
            f'<td class="left">{verdict_badge(figure["verdict"], entry.quick)}</td>'
            f'<td class="left"><small>{escape(figure["rule"])}</small></td></tr>'
        )
    head = (
        '<th scope="col">figure</th><th scope="col">mean</th><th scope="col">95\u00a0% interval</th>'
        '<th scope="col" class="left">by its rule</th><th scope="col" class="left">rule, written before the run</th>'
    )
    return (
        '<div class="scroll ours" tabindex="0" role="region" aria-label="Figures and rules"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def drawn(plot: Plot) -> str:
    """Return a plot with its heading, legend and caption."""
    legend = "".join(key_html(key) for key in plot.keys)
    return (
        f'<figure><h3>{escape(plot.title)}</h3><div class="keys">{legend}</div>{picture(plot).svg}'
        f"<figcaption>{escape(plot.caption)}</figcaption></figure>"
    )


def key_html(key: Key) -> str:
    """Return an entry of a legend."""
    return f'<span><i class="{key.kind} t-{key.tone}"></i>{escape(key.text)}</span>'
