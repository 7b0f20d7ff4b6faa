"""Write variants on one HTML page with plots and tables, in the report's style.

The page opens without a network.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path

import stages.page
from stages.page.drawing import picture
from stages.page.numbers import fixed, percent
from stages.page.plot import Curves, Dots, Label, Line, Mark, Plot, Spans
from sweeps.estimates import unit_of
from sweeps.points import Variant
from sweeps.text import span

NAMES = {"ppo": ("PPO", "kl_coef"), "dpo": ("DPO", "beta"), "best_of_n": ("best of n", "best of")}
"""Method → its name, and the setting that is varied."""
CAPTIONS = {
    "gold": "Gold is what the reward model should measure, and nothing is trained on it. Over-optimisation is where a "
    "line bends down while the score below keeps rising. The sentences above say whether one does, beyond chance.",
    "score": "The same policies by the score that they were trained on or chosen by. Up is better, right is further "
    "from SFT; at the same KL the upper policy is the better one.",
}
NOTE = (
    "Best of n is drawn at its theoretical KL, ln n − (n − 1)/n, which is too large where samples coincide; best of 1 "
    "is SFT itself. The KL of PPO and DPO is estimated on their samples."
)


def short(variant: Variant) -> str:
    """Return the name of a setting: kl_coef 0.1"""
    return f"{NAMES[variant.method][1]} {variant.value:g}"


def full(variant: Variant) -> str:
    """Return the name of a policy and its setting: PPO, kl_coef 0.1"""
    return short(variant) if variant.method == "best_of_n" else f"{NAMES[variant.method][0]}, {short(variant)}"


def curves(variants: Sequence[Variant]) -> dict[str, list[Variant]]:
    """Return method → its variants, from the nearest to SFT to the furthest.

    A larger n moves further from SFT, a larger penalty less far.
    """
    by_method = {name: [v for v in variants if v.method == name] for name in NAMES}
    return {
        name: sorted(curve, key=lambda v: v.value, reverse=name != "best_of_n")
        for name, curve in by_method.items()
        if curve
    }


def plot_of(variants: Sequence[Variant], what: str) -> Plot:
    """Return a plot of every variant against its KL to SFT.

    Args:
        variants: The variants.
        what: "gold" or "score".
    """
    marks: list[Mark] = []
    ends, others = [], []
    for method, curve in curves(variants).items():
        points, spans, tips = [], [], []
        for variant in curve:
            estimate, kl = variant.estimate(what), variant.mean("kl")
            points.append((kl, estimate["value"]))
            spans.append((kl, *estimate["ci95"]))
            tips.append(f"{full(variant)}: {what} {estimate['value']:.3f} ({span(estimate['ci95'])}) at {kl:.2f} nats")
            others.append(Label(kl, estimate["value"], f"{variant.value:g}", method))
        marks += [Spans(spans, method), Line(points, method), Dots(points, method, 8, tips)]
        # A curve is named where it ends; its other points have only their values.
        last = others.pop()
        ends.append(Label(last.x, last.y, full(curve[-1]), method))
    unit = "gold, overall (0 to 1)" if what == "gold" else "score of the reward model"
    drawing = Curves([*marks, *ends, *others], "KL to SFT, nats per response (√ axis)", unit,
                     root_x=True, x_includes=(0.0,))  # fmt: skip
    title = "Gold against KL" if what == "gold" else "Reward model score against KL"
    bars = f"Bars: 95\u00a0% intervals over {unit_of(variants[0].series(what))}."
    return Plot(f"{what}-against-kl", title, f"{CAPTIONS[what]} {bars} {NOTE}", drawing, size="full")


def plots_of(variants: Sequence[Variant]) -> list[Plot]:
    """Return the plots of gold (if there is any) and score against KL."""
    shown = ["gold", "score"] if variants[0].series("gold") else ["score"]
    return [plot_of(variants, what) for what in shown]


def table(variants: Sequence[Variant]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of text, for the page and for the terminal."""
    shown = {"gold": "gold", "held_out": "on held-out tasks", "score": "score"}
    shown = {figure: heading for figure, heading in shown.items() if variants[0].series(figure)}
    headings = ["policy"]
    for heading in shown.values():
        headings += [heading, "95\u00a0% interval"]
    rows = []
    for curve in curves(variants).values():
        for variant in curve:
            cells = [full(variant)]
            for figure in shown:
                estimate = variant.estimate(figure)
                cells += [fixed(estimate["value"], 3), span(estimate["ci95"])]
            cells += [fixed(variant.mean("kl"), 2), fixed(variant.mean("length"), 1), percent(variant.mean("eos_rate"))]
            rows.append([*cells, fixed(variant.mean("perplexity"), 2)])
    return [*headings, "KL to SFT", "length", "ended", "perplexity"], rows


def page(
    title: str,
    meta: str,
    sentences: Sequence[str],
    plots: Sequence[Plot],
    tables: Sequence[tuple[list[str], list[list[str]]]],
) -> str:
    """Return the whole page.

    Args:
        title: The heading of the page.
        meta: A line below it.
        sentences: The paragraphs at the top.
        plots: The plots.
        tables: The headings and rows of each table.
    """
    drawn = "".join(
        f"<figure><h2>{escape(plot.title)}</h2>{picture(plot).svg}<figcaption>{escape(plot.caption)}</figcaption>"
        "</figure>"
        for plot in plots
    )
    paragraphs = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
    shown = "".join(_html_table(headings, rows) for headings, rows in tables)
    style = "figure { margin: 1rem 0; } figure h2 { margin: 0; }"
    return document(title, meta, f"{paragraphs}{drawn}\n{shown}", style)


def document(title: str, meta: str, main: str, style: str = "") -> str:
    """Return a page in the report's style, which loads nothing.

    Args:
        title: The heading of the page.
        meta: A line below it.
        main: Everything else, as HTML.
        style: Further rules of style.
    """
    rules = Path(stages.page.__file__).with_name("style.j2").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{rules} {style}</style></head><body>
<header><h1>{escape(title)}</h1><div class="meta">{escape(meta)}</div></header>
<main>{main}</main>
</body></html>
"""


def _html_table(headings: list[str], rows: list[list[str]]) -> str:
    """Return a table as HTML."""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
