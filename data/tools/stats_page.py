"""Write charts as one HTML page that opens without a network, on any screen and on paper."""

from collections.abc import Sequence
from html import escape

from data.tools.charts import Chart

STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5b6577; --paper: #ffffff; --bar: #3b6fb6; --line: #dde2ea }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --soft: #9aa4b5; --paper: #14181f; --bar: #6fa0e6; --line: #2b323d }
}
body { margin: 0 auto; padding: 1.5rem; max-width: 80rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper) }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; overflow-wrap: anywhere; border-top: 1px solid var(--line);
  padding-top: 1rem }
p { color: var(--soft); margin: .2rem 0 .6rem }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 1.5rem 2.5rem }
figure { margin: 0; break-inside: avoid } figcaption { font-weight: 600 }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums }
th { font-weight: 400; text-align: right; white-space: nowrap; padding: 0 .6rem 0 0; max-width: 12rem; overflow: hidden;
  text-overflow: ellipsis }
td { padding: .1rem 0 } td.count { text-align: right; white-space: nowrap; padding: 0 0 0 .6rem; color: var(--soft) }
td.bar { width: 100% } td.bar div { height: .9rem; min-width: 1px; background: var(--bar); border-radius: 2px;
  print-color-adjust: exact; -webkit-print-color-adjust: exact }
@media print { body { max-width: none; padding: 0; font-size: 11pt } :root { --ink: #000; --soft: #444; --paper: #fff;
  --bar: #3b6fb6; --line: #bbb } }
"""


def page(sections: Sequence[tuple[str, str, Sequence[Chart]]]) -> str:
    """Return the page.

    Args:
        sections: (heading, sentence under it, charts) of each source.
    """
    parts = []
    for heading, sentence, charts in sections:
        figures = "\n".join(figure(chart) for chart in charts)
        parts.append(
            f"<section><h2>{escape(heading)}</h2><p>{escape(sentence)}</p>\n"
            f'<div class="charts">\n{figures}\n</div></section>'
        )
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>Data</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>Data</h1>\n{body}\n</body>\n</html>\n"
    )


def figure(chart: Chart) -> str:
    """Return a chart as a table whose cells have bars."""
    largest = max((count for _, count in chart.bars), default=0) or 1
    total = sum(count for _, count in chart.bars) or 1
    rows = "\n".join(
        f'<tr><th scope="row" title="{escape(label)}">{escape(label)}</th>'
        f'<td class="bar">{bar(count / largest)}</td><td class="count">{count:,} · {count / total:.0%}</td></tr>'
        for label, count in chart.bars
    )
    note = f"<p>{escape(chart.note)}</p>" if chart.note else ""
    return f"<figure><figcaption>{escape(chart.title)}</figcaption>{note}<table>\n{rows}\n</table></figure>"


def bar(share: float) -> str:
    """Return a bar of a share of the width; nothing for 0."""
    return f'<div style="width:{share:.1%}"></div>' if share else ""
