"""Draw what was found, each seed as a thin line, with the mean over seeds on top."""

from collections.abc import Callable, Sequence

import numpy as np
from sweeps.estimates import over_seeds

from claims_rows.row import Observed, Read
from stages.page.plot import Curves, Dots, Key, Label, Level, Line, Mark, Plot, Spans

FEWEST = 3
"""Seeds from which intervals are drawn; that of two is many times as long as their distance."""
Points = list[tuple[float, float]]
"""(x, y) pairs of one seed."""


def steps(
    name: str, title: str, unit: str, names: Sequence[tuple[str, str, Read] | None], observed: Observed, *,
    caption: str = "", level: tuple[float, str] | None = None, x_label: str = "",
) -> Plot:  # fmt: skip
    """Return a plot with a position for each of several conditions.

    Args:
        name: Name of the plot.
        title: Its heading.
        unit: What the y axis shows.
        names: (name, tone, how it is read) of each condition; None: a gap.
        observed: What was found on each seed.
        caption: What else must be said.
        level: Height and text of a dashed line.
        x_label: What the conditions have in common.
    """
    marks: list[Mark] = [Level(*level)] if level else []
    for found in observed.values():
        marks.append(Line([(i, one and one[2](found)) for i, one in enumerate(names)], "soft", faint=True))
    for i, (label, tone, read) in [(i, one) for i, one in enumerate(names) if one is not None]:
        values = [value for found in observed.values() if (value := read(found)) is not None]
        if values:
            mean = over_seeds(values)
            if len(values) >= FEWEST:
                marks.append(Spans([(i, *mean["ci95"])], tone))
            marks.append(Dots([(i, mean["value"])], tone, 8, [f"{label}: {mean['value']:.3f}"]))
    seeds = Key(f"one seed each ({len(observed)})", "soft", "faint")
    bars = ", bars: 95\u00a0% intervals over seeds" if len(observed) >= FEWEST else " over seeds"
    text = f"{caption} Dots: means{bars}.".strip()
    drawing = Curves(marks, x_label, unit, x_names=[one[0] if one else "" for one in names])
    return Plot(name, title, text, drawing, (seeds,), size="large")


def against_kl(
    name: str, title: str, unit: str, curves: dict[str, tuple[str, dict[int, Points]]], *, caption: str = "",
    fits: Sequence[tuple[str, Callable[[np.ndarray], np.ndarray]]] = (),
) -> Plot:  # fmt: skip
    """Return a plot of curves over KL to SFT, on an axis of its root.

    Args:
        name: Name of the plot.
        title: Its heading.
        unit: What the y axis shows.
        curves: Name of a method → (its tone, seed → (KL, y) points in the order of its setting).
        caption: What else must be said.
        fits: (tone, √KL → y) of curves that are drawn over the range of that tone.
    """
    marks: list[Mark] = []
    for label, (tone, by_seed) in curves.items():
        lines = [[(max(kl, 0.0), y) for kl, y in points] for points in by_seed.values()]
        marks += [Line(points, tone, faint=True) for points in lines]
        means = [tuple(map(float, np.mean(at, axis=0))) for at in zip(*lines, strict=True)]
        marks += [Line(means, tone), Dots(means, tone, 8, [f"{label}: {y:.3f} at {kl:.2f} nats" for kl, y in means])]
        if means:
            marks.append(Label(*means[-1], label, tone))
        for curve in [curve for of, curve in fits if of == tone]:
            roots = np.linspace(0.0, np.sqrt(max(kl for points in lines for kl, _ in points)), 60)
            marks.append(Line(list(zip((roots**2).tolist(), curve(roots).tolist(), strict=True)), "ink"))
    keys = [Key("one seed each", tone, "faint") for tone, _ in list(curves.values())[:1]]
    keys += [Key("fitted to all seeds", "ink")] if fits else []
    drawing = Curves(marks, "KL to SFT, nats per response (√ axis)", unit, root_x=True, x_includes=(0.0,))
    return Plot(name, title, f"{caption} Thick: means over seeds.".strip(), drawing, tuple(keys), size="large")
