"""Draw plots with matplotlib, as inline SVG for the page and as PNG files.

matplotlib is imported only when a picture is made. Nothing here depends on the machine's settings,
fonts or clock, so the same plots give the same bytes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.page.graph import draw_graph
from stages.page.inline import TIPS, inline_svg
from stages.page.palette import COLOURS, MARKER_SCALES, SHAPES, colour
from stages.page.plot import Cloud, Curves, Dots, Graph, Label, Level, Line, Mark, Plot, Rows, Spans, known_points

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and takes the page's font
    "svg.hashsalt": "rlhf",  # ids come from the drawing and not from a random number
    "text.parse_math": False,
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 12,
    "lines.solid_capstyle": "round",
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.edgecolor": COLOURS["line"],
    "axes.labelcolor": COLOURS["soft"],
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": COLOURS["grid"],
    "xtick.color": COLOURS["line"],
    "xtick.labelcolor": COLOURS["soft"],
    "ytick.color": COLOURS["line"],
    "ytick.labelcolor": COLOURS["soft"],
    "ytick.major.size": 0,
    "ytick.major.pad": 7,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 11,
    "legend.labelcolor": COLOURS["soft"],
}
SIZES = {"small": (320, 225), "large": (520, 320), "full": (940, 430)}
"""Size of a plot → its width and height in CSS pixels; text is 12 pixels high in all of them."""
DPI = 200
"""Resolution of the PNG files, of which a CSS pixel is 1/72 inch."""
ROW_HEIGHT = 38
"""Height of a row of a dot plot in pixels."""
SPREAD = 0.14
"""Vertical distance between the markers of a row, in rows, so that equal values stay visible."""
CHARACTER = 7.3
"""Width of a character of a label in pixels, on average."""


@dataclass(frozen=True)
class Picture:
    """A plot that is ready for the page."""

    plot: Plot
    """The plot."""
    svg: str
    """One `<svg>` element, or a small and a large one of which the page shows the one that fits."""


def picture(plot: Plot, folder: Path | None = None) -> Picture:
    """Draw a plot.

    Args:
        plot: The plot.
        folder: Where `NAME.png` is written; None for no file.

    Returns:
        The plot with its inline SVG.
    """
    import matplotlib.style

    with matplotlib.style.context(["default", STYLE]):
        if folder is not None:
            folder.mkdir(exist_ok=True)
            figure = draw(plot, plot.size, is_alone=True)
            figure.savefig(folder / f"{plot.name}.png", dpi=DPI, facecolor="white", metadata={"Software": None})
        if plot.size == "small":
            svg = inline_svg(draw(plot, "small"), plot, "")
        else:
            svg = inline_svg(draw(plot, "small"), plot, "narrow") + inline_svg(draw(plot, plot.size), plot, "wide")
    return Picture(plot, svg)


def draw(plot: Plot, size: str, *, is_alone: bool = False) -> "Figure":
    """Draw a plot with matplotlib.

    Args:
        plot: The plot.
        size: A key of `SIZES`.
        is_alone: Whether the picture carries its title and legend, which the page writes itself.
    """
    if isinstance(plot.drawing, Graph):
        return draw_graph(plot.drawing)
    from matplotlib.figure import Figure

    width, height = SIZES[size]
    if isinstance(plot.drawing, Rows):
        height = ROW_HEIGHT * len(plot.drawing.rows) + 50
    height += 30 + 17 * math.ceil(len(plot.keys) / 3) if is_alone else 0
    figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
    engine = figure.get_layout_engine()
    engine.set(w_pad=2 / 72, h_pad=3 / 72)
    axes = figure.add_subplot()
    if is_alone:
        figure.suptitle(plot.title, x=0.02, ha="left", fontsize=13, fontweight="bold", color=COLOURS["ink"])
        if plot.keys:
            figure.legend(handles=[handle(key) for key in plot.keys], loc="outside lower left", ncols=3)
    labels: list[Label] = []
    if isinstance(plot.drawing, Rows):
        draw_rows(axes, plot.drawing)
    else:
        draw_curves(axes, plot.drawing)
        labels = [mark for mark in plot.drawing.marks if isinstance(mark, Label)]
    # Compute the layout once and fix it: labels need it, and matplotlib would draw all twice.
    engine.execute(figure)
    figure.set_layout_engine("none")
    place_labels(axes, labels)
    return figure


def handle(key: Any) -> Any:
    """Return the sample of a legend entry."""
    from matplotlib.lines import Line2D

    if key.kind == "dot":
        shape = SHAPES.get(key.tone, "o")
        return Line2D([], [], color=colour(key.tone), marker=shape, linestyle="", label=key.text)
    alpha = 0.4 if key.kind == "faint" else 1.0
    return Line2D([], [], color=colour(key.tone), alpha=alpha, linewidth=2, label=key.text)


# -- curves --------------------------------------------------------------------------------------


def draw_curves(axes: "Axes", drawing: Curves) -> None:
    """Draw marks in a frame with two numeric axes."""
    points = [point for mark in drawing.marks for point in extent(mark)]
    xs = [x for x, _ in points if x is not None] + list(drawing.x_includes)
    ys = [y for _, y in points] + list(drawing.y_includes)
    is_log = drawing.log_y and bool(ys) and min(ys) > 0
    set_scales(axes, xs, ys, is_log=is_log, is_root=drawing.root_x)
    if drawing.x_names:
        axes.set_xlim(-0.5, len(drawing.x_names) - 0.5)
        axes.set_xticks(range(len(drawing.x_names)), drawing.x_names)
    axes.set_xlabel(drawing.x_label, loc="right")
    axes.set_title(f"{drawing.y_label}, log scale" if is_log else drawing.y_label,
                   loc="left", fontsize=12, color=COLOURS["soft"])  # fmt: skip
    for mark in drawing.marks:
        draw_mark(axes, mark)


def extent(mark: Mark) -> list[tuple[float | None, float]]:
    """Return the points that the axes must cover for a mark."""
    if isinstance(mark, (Line, Dots, Cloud)):
        return list(known_points(mark.points))
    if isinstance(mark, Spans):
        return [(x, end) for x, low, high in mark.spans for end in (low, high)]
    if isinstance(mark, Level):
        return [(None, mark.value)]
    return [(mark.x, mark.y)]


def set_scales(axes: "Axes", xs: Sequence[float], ys: Sequence[float], *, is_log: bool, is_root: bool) -> None:
    """Set scales, limits and ticks of both axes.

    Args:
        axes: The axes.
        xs: The values on the x axis.
        ys: The values on the y axis.
        is_log: Whether the y axis is logarithmic.
        is_root: Whether the x axis is scaled by the square root.
    """
    import numpy as np
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

    if is_root:
        axes.set_xscale("function", functions=(lambda v: np.sqrt(np.maximum(v, 0.0)), np.square))
        low, high = padded([math.sqrt(max(x, 0.0)) for x in xs or [0.0]], 0.03)
        axes.set_xlim(max(low, 0.0) ** 2, high**2)
        axes.xaxis.set_major_locator(FixedLocator(root_ticks(min(xs, default=0.0), high**2)))
    else:
        axes.set_xlim(*padded(xs or [0.0], 0.02))
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    if is_log:
        axes.set_yscale("log")
        low, high = padded([math.log10(y) for y in ys], 0.06)
        axes.set_ylim(10**low, 10**high)
        decades = high - low
        if decades < 0.6:  # too few of the values 1, 2, 5 · 10ⁿ lie in it: ticks as on a linear axis
            axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        else:
            factors = (1.0,) if decades > 3 else (1.0, 2.0, 5.0)
            axes.yaxis.set_major_locator(LogLocator(subs=factors, numticks=6))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(*padded(ys or [0.0], 0.06))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: tick_text(value)))


def padded(values: Sequence[float], share: float) -> tuple[float, float]:
    """Return the limits of an axis that covers values, with a margin of a share of their range."""
    low, high = min(values), max(values)
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    margin = share * (high - low)
    return low - margin, high + margin


def root_ticks(low: float, high: float) -> list[float]:
    """Return 0 and the values 1, 2, 5 · 10ⁿ that do not crowd each other on a square-root axis."""
    ticks = [0.0] if low <= 0 else []
    room = 0.1 * math.sqrt(high)
    for value in (10.0**power * factor for power in range(-3, 6) for factor in (1, 2, 5)):
        is_apart = not ticks or math.sqrt(value) - math.sqrt(ticks[-1]) > room
        if low <= value <= high and is_apart:
            ticks.append(value)
    return ticks


def tick_text(value: float) -> str:
    """Return a tick's label, in thousands from 10,000 on."""
    value = float(f"{value:.10g}")  # 0.30000000000000004
    text = f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"
    return text.replace("-", "−")


def draw_mark(axes: "Axes", mark: Mark) -> None:
    """Draw one mark; labels are placed later, when the layout is known."""
    if isinstance(mark, Line):
        # matplotlib breaks a line at NaN.
        xs = [math.nan if x is None else x for x, _ in mark.points]
        ys = [math.nan if y is None else y for _, y in mark.points]
        axes.plot(xs, ys, color=colour(mark.tone), linewidth=2, alpha=0.4 if mark.faint else 1.0)
    elif isinstance(mark, Dots):
        draw_dots(axes, mark)
    elif isinstance(mark, Cloud):
        draw_cloud(axes, mark)
    elif isinstance(mark, Spans):
        xs, lows, highs = (list(column) for column in zip(*mark.spans, strict=True))
        axes.vlines(xs, lows, highs, color=colour(mark.tone), linewidth=2.5, alpha=0.65)
    elif isinstance(mark, Level):
        draw_level(axes, mark)


def draw_dots(axes: "Axes", dots: Dots) -> None:
    """Draw markers with a light edge, each with its tooltip."""
    points = known_points(dots.points)
    if not points:
        return
    xs, ys = columns_of(points)
    shape = SHAPES.get(dots.tone, "o")
    size = dots.size * MARKER_SCALES.get(shape, 1.0)
    (line,) = axes.plot(xs, ys, shape, color=colour(dots.tone), markersize=size, clip_on=False, zorder=3)
    line.set_markeredgecolor(COLOURS["card"])
    line.set_markeredgewidth(1)
    tips = [tip for tip, (x, y) in zip(dots.tips, dots.points, strict=False) if x is not None and y is not None]
    tips = tips or [f"{y:.4g} at {x:.4g}" for x, y in points]
    line.set_gid(TIPS + TIPS.join(tips))


def draw_cloud(axes: "Axes", cloud: Cloud) -> None:
    """Draw small dots as one path of very short lines, a tenth of the size of as many markers."""
    length = 1e-4 * (axes.get_xlim()[1] - axes.get_xlim()[0])  # of no length, they would not be drawn
    xs, ys = [], []
    for x, y in known_points(cloud.points):
        xs += [x, x + length, math.nan]
        ys += [y, y, math.nan]
    (line,) = axes.plot(xs, ys, color=colour(cloud.tone), linewidth=3.6, alpha=0.3)
    line.get_path().should_simplify = False


def draw_level(axes: "Axes", level: Level) -> None:
    """Draw a dashed line across the frame, with its text at the right end."""
    axes.axhline(level.value, color=COLOURS["soft"], linewidth=1, dashes=(4, 4))
    text = axes.annotate(level.text, (1, level.value), (-2, -3 if level.below else 3),
                         xycoords=("axes fraction", "data"), textcoords="offset points")  # fmt: skip
    text.set(ha="right", va="top" if level.below else "bottom", color=COLOURS["soft"])


def columns_of(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Return all x and all y of points."""
    return [x for x, _ in points], [y for _, y in points]


@dataclass(frozen=True)
class Side:
    """Describe a place for a label beside its marker."""

    dx: float
    """Its distance to the right in pixels."""
    dy: float
    """Its distance upwards in pixels."""
    anchor: str
    """Which point of the label is there: "left", "center" or "right"."""

    def box(self, x: float, y: float, width: float) -> tuple[float, float, float, float]:
        """Return the (left, bottom, right, top) of a label of this width, for a marker at x, y."""
        start = x + self.dx - {"left": 0.0, "center": width / 2, "right": width}[self.anchor]
        return (start, y + self.dy - 7, start + width, y + self.dy + 7)


SIDES = (Side(9, 0, "left"), Side(-9, 0, "right"), Side(0, 14, "center"), Side(0, -14, "center"),
         Side(8, 12, "left"), Side(8, -12, "left"), Side(-8, 12, "right"), Side(-8, -12, "right"))  # fmt: skip
"""The sides of a marker, the best first."""


def place_labels(axes: "Axes", labels: Sequence[Label]) -> None:
    """Write each label beside its marker, on the first side where it covers nothing."""
    figure = axes.figure
    scale = 72 / figure.dpi  # from matplotlib's pixels to those of the page
    left, right = axes.get_window_extent().x0 * scale, figure.bbox.width * scale
    centres = [tuple(scale * axes.transData.transform((label.x, label.y))) for label in labels]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in centres]
    for label, (x, y) in zip(labels, centres, strict=True):
        width = CHARACTER * len(label.text)
        best = SIDES[0]
        for side in SIDES:
            box = side.box(x, y, width)
            is_inside = left <= box[0] and box[2] <= right
            if is_inside and not any(overlaps(box, other) for other in taken):
                best = side
                break
        taken.append(best.box(x, y, width))
        text = axes.annotate(label.text, (label.x, label.y), (best.dx, best.dy), textcoords="offset points",
                             annotation_clip=False)  # fmt: skip
        text.set(ha=best.anchor, va="center", color=colour(label.tone), fontweight="bold", fontsize=11.5)


def overlaps(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    """Return whether two boxes (left, bottom, right, top) share a point."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


# -- dot plots -----------------------------------------------------------------------------------


def draw_rows(axes: "Axes", drawing: Rows) -> None:
    """Draw named rows of markers on a common axis from 0 to 1."""
    from matplotlib.ticker import FixedLocator, FuncFormatter

    axes.grid(True, axis="both")
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(len(drawing.rows) - 0.5, -0.6)
    axes.xaxis.set_major_locator(FixedLocator([0.0, 0.2, 0.4, 0.6, 0.8, 1.0]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick_text(value)))
    axes.set_yticks(range(len(drawing.rows)), [name for name, _ in drawing.rows], fontweight="bold",
                    color=COLOURS["ink"])  # fmt: skip
    axes.set_xlabel(drawing.x_label, loc="right")
    if drawing.reference is not None:
        axes.axvline(drawing.reference, color=COLOURS["soft"], linewidth=1, dashes=(4, 4))
    for row, (_, marks) in enumerate(drawing.rows):
        for i, mark in enumerate(marks):
            y = row + SPREAD * (i - (len(marks) - 1) / 2)
            if mark.interval is not None:
                axes.hlines(y, *mark.interval, color=colour(mark.tone), linewidth=2.5, alpha=0.65)
            draw_dots(axes, Dots([(mark.value, y)], mark.tone, 9, [mark.text]))
            if drawing.labelled:
                axes.annotate(mark.text, (mark.value, y), (0, 7), textcoords="offset points", ha="center",
                              va="bottom", color=colour(mark.tone), fontweight="bold", fontsize=11.5)  # fmt: skip
