"""Variants → one HTML page with the pictures and the table, drawn by the report's helpers; opens without a network."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from stages.page.svg import Axes, Figure

from stages.page import svg as report_svg
from stages.page.numbers import fixed, percent
from sweeps.estimates import unit_of
from sweeps.points import Variant
from sweeps.words import span

NAMES = {"ppo": ("PPO", "kl_coef"), "dpo": ("DPO", "beta"), "best_of_n": ("best of n", "best of")}  # what, varied by
CAPTIONS = {
    "gold": "Gold is what the reward model should stand for, and nothing is trained on it. Over-optimisation is where "
    "a line bends down while the score below goes on rising; whether one does, beyond chance, the sentences above say.",
    "score": "The same policies by the score that they were trained on, or chosen by. Up is better, right is further "
    "from SFT; at the same KL the upper policy is the better one.",
}
NOTE = (
    "Best of n stands at its theoretical KL, ln n − (n − 1)/n, which is too much where samples coincide; best of 1 is "
    "SFT itself. The KL of PPO and DPO is estimated on their samples."
)


def short(variant: Variant) -> str:
    """Name a setting: kl_coef 0.1"""
    return f"{NAMES[variant.method][1]} {variant.value:g}"


def full(variant: Variant) -> str:
    """Name a policy and its setting: PPO, kl_coef 0.1"""
    return short(variant) if variant.method == "best_of_n" else f"{NAMES[variant.method][0]}, {short(variant)}"


def curves(variants: Sequence[Variant]) -> dict[str, list[Variant]]:
    """Return method → its variants, from the nearest to SFT to the furthest: n rises, a penalty falls."""
    found = {name: [v for v in variants if v.method == name] for name in NAMES}
    return {
        name: sorted(curve, key=lambda v: v.value, reverse=name != "best_of_n")
        for name, curve in found.items()
        if curve
    }


def picture(variants: Sequence[Variant], what: str) -> Figure:
    """Draw gold or score of every variant against its KL to SFT."""
    found = {id(v): v.estimate(what) for v in variants}

    def height(variant):
        return found[id(variant)]["value"]

    def bar(variant):
        return found[id(variant)]["ci95"]

    axes = Axes(
        [v.mean("kl") for v in variants] + [0.0],
        [end for v in variants for end in bar(v)],
        "KL to SFT, nats a response (square-root axis)",
        "gold, overall (0 to 1)" if what == "gold" else "score of the reward model",
        width=940,
        height=430,
        root_x=True,
    )
    firsts, others = [], []
    for method, curve in curves(variants).items():
        for v in curve:
            axes.bar(v.mean("kl"), *bar(v), method)
        axes.line([(v.mean("kl"), height(v)) for v in curve], method)
        for v in curve:
            title = f"{full(v)}: {what} {height(v):.3f} ({span(bar(v))}) at {v.mean('kl'):.2f} nats"
            axes.dots([(v.mean("kl"), height(v))], method, 4.5, title)
        last = curve[-1]  # the curve is named where it ends, the rest by their values alone
        firsts.append((last.mean("kl"), height(last), full(last), method))
        others += [(v.mean("kl"), height(v), f"{v.value:g}", method) for v in curve[:-1]]
    axes.names([*firsts, *others])
    title = "Gold against KL" if what == "gold" else "Reward model score against KL"
    bars = f"Bars: 95\u00a0% intervals over {unit_of(variants[0].series(what))}."
    return Figure(title, axes.svg(title), f"{CAPTIONS[what]} {bars} {NOTE}")


def pictures(variants: Sequence[Variant]) -> list[Figure]:
    """Draw gold (where there is any) and score against KL."""
    shown = ["gold", "score"] if variants[0].series("gold") else ["score"]
    return [picture(variants, what) for what in shown]


def table(variants: Sequence[Variant]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of text, for the page and for the terminal."""
    shown = {"gold": "gold", "held_out": "on held-out tasks", "score": "score"}
    shown = {figure: heading for figure, heading in shown.items() if variants[0].series(figure)}
    headings = ["policy"]
    for heading in shown.values():
        headings += [heading, "95\u00a0% interval"]
    rows = []
    for v in (v for curve in curves(variants).values() for v in curve):
        cells = [full(v)]
        for found in map(v.estimate, shown):
            cells += [fixed(found["value"], 3), span(found["ci95"])]
        cells += [fixed(v.mean("kl"), 2), fixed(v.mean("length"), 1), percent(v.mean("eos_rate"))]
        rows.append([*cells, fixed(v.mean("perplexity"), 2)])
    return [*headings, "KL to SFT", "length", "ended", "perplexity"], rows


def page(
    title: str,
    meta: str,
    sentences: Sequence[str],
    figures: Sequence[Figure],
    tables: Sequence[tuple[list[str], list[list[str]]]],
) -> str:
    """The whole page, in the report's style; a table is headings and rows."""
    template = Path(report_svg.__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    style = template.partition("<style>")[2].partition("</style>")[0]
    assert style, "report.html.j2 has no <style>"
    drawn = "".join(
        f"<figure><h4>{escape(f.title)}</h4>{f.svg}<figcaption>{escape(f.caption)}</figcaption></figure>"
        for f in figures
    )
    says = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)}</title><style>{style}figure {{ margin: 1rem 0; }}</style></head><body>
<header><h1>{escape(title)}</h1><div class="meta">{escape(meta)}</div></header>
<main>{says}{drawn}
{"".join(_html_table(*one) for one in tables)}</main>
</body></html>
"""


def _html_table(headings: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
