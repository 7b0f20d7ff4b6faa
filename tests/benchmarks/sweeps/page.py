"""Points → one HTML page with the pictures and the table, drawn by the report's helpers; opens without a network."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from stages import report_svg
from stages.report import fixed, percent
from stages.report_svg import Axes, Figure
from sweeps.points import Point

NAMES = {"ppo": ("PPO", "kl_coef"), "dpo": ("DPO", "beta"), "best_of_n": ("best of n", "best of")}  # what, varied by
CAPTIONS = {
    "gold": "Gold is what the reward model should stand for, and nothing is trained on it. Where a line bends down "
    "while the score below goes on rising, the policy lives off the reward model's mistakes: over-optimisation.",
    "score": "The same policies by the score that they were trained on, or chosen by. Up is better, right is further "
    "from SFT; at the same KL the upper policy is the better one.",
}
NOTE = (
    " Bars: 95 % intervals over prompts. Best of n stands at its theoretical KL, ln n − (n − 1)/n, which is too much "
    "where samples coincide; best of 1 is SFT itself. The KL of PPO and DPO is estimated on their samples."
)


def value_of(point: Point) -> float:
    return next(iter(point.setting.values()))


def short(point: Point) -> str:
    """kl_coef 0.1"""
    return f"{NAMES[point.method][1]} {value_of(point):g}"


def full(point: Point) -> str:
    """PPO, kl_coef 0.1"""
    return short(point) if point.method == "best_of_n" else f"{NAMES[point.method][0]}, {short(point)}"


def curves(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Method → its points, from the nearest to SFT to the furthest."""
    methods = [name for name in NAMES if any(p.method == name for p in points)]
    nearest_first = {"best_of_n": value_of}  # its n; a penalty holds nearer the larger it is
    return {
        name: sorted((p for p in points if p.method == name), key=nearest_first.get(name, lambda p: -value_of(p)))
        for name in methods
    }


def picture(points: Sequence[Point], what: str) -> Figure:
    """Gold or score of every point against its KL to SFT."""
    y = (lambda p: p.gold) if what == "gold" else (lambda p: p.score)
    ci = (lambda p: p.gold_ci95) if what == "gold" else (lambda p: p.score_ci95)
    unit = "gold, overall (0 to 1)" if what == "gold" else "score of the reward model"
    axes = Axes(
        [p.kl for p in points] + [0.0],
        [v for p in points for v in ci(p)],
        "KL to SFT, nats a response (square-root axis)",
        unit,
        width=940,
        height=430,
        root_x=True,
    )
    firsts, others = [], []
    for method, curve in curves(points).items():
        for p in curve:
            axes.bar(p.kl, *ci(p), method)
        axes.line([(p.kl, y(p)) for p in curve], method)
        for p in curve:
            low, high = ci(p)
            title = f"{full(p)}: {what} {y(p):.3f} ({low:.3f} to {high:.3f}) at {p.kl:.2f} nats"
            axes.dots([(p.kl, y(p))], method, 4.5, title)
        last = curve[-1]  # the series is named where it ends, the rest by their values alone
        firsts.append((last.kl, y(last), full(last), method))
        others += [(p.kl, y(p), f"{value_of(p):g}", method) for p in curve[:-1]]
    axes.names([*firsts, *others])
    title = "Gold against KL" if what == "gold" else "Reward model score against KL"
    return Figure(title, axes.svg(title), CAPTIONS[what] + NOTE)


def pictures(points: Sequence[Point]) -> list[Figure]:
    """Gold (where there is any) and score against KL."""
    return [picture(points, what) for what in ("gold", "score") if what == "score" or points[0].gold is not None]


def table(points: Sequence[Point]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of text, for the page and for the terminal."""
    gold = any(p.gold is not None for p in points)
    span = lambda ci: f"{fixed(ci[0], 3)} to {fixed(ci[1], 3)}"  # noqa: E731
    headings = ["policy", *["gold", "95 % interval"] * gold, "score", "KL to SFT", "length", "ended", "perplexity"]
    rows = []
    for p in (p for curve in curves(points).values() for p in curve):
        cells = [full(p)]
        cells += [fixed(p.gold, 3), span(p.gold_ci95)] if gold else []
        cells += [fixed(p.score, 2), fixed(p.kl, 2), fixed(p.length, 1), percent(p.eos_rate)]
        rows.append([*cells, fixed(p.perplexity, 2)])
    return headings, rows


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
