"""Draw boxes with arrows between them."""

from typing import TYPE_CHECKING

from stages.page.palette import COLOURS, colour
from stages.page.plot import Graph

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 104, 44
"""Size of a box in pixels."""
GAP_X, GAP_Y = 26, 32
"""Distance between boxes in pixels."""


def draw_graph(graph: Graph) -> "Figure":
    """Draw boxes in columns, with an arrow to each from those that it depends on."""
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch

    corners = {name: (column * (WIDTH + GAP_X), -row * (HEIGHT + GAP_Y))
               for name, (column, row) in columns(graph).items()}  # fmt: skip
    right, bottom = max(x for x, _ in corners.values()) + WIDTH, min(y for _, y in corners.values())
    figure = Figure(figsize=((right + 4) / 72, (HEIGHT - bottom + 4) / 72))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(-2, right + 2)
    axes.set_ylim(bottom - 2, HEIGHT + 2)
    for name, inputs in graph.edges.items():
        for source in sorted(inputs):
            (x0, y0), (x1, y1) = corners[source], corners[name]
            start, end = (x0 + WIDTH, y0 + HEIGHT / 2), (x1 - 1, y1 + HEIGHT / 2)
            draw_arrow(axes, start, end)
    for name, (second, tone) in graph.nodes.items():
        x, y = corners[name]
        axes.add_patch(FancyBboxPatch((x, y), WIDTH, HEIGHT, boxstyle="round,pad=0,rounding_size=8",
                                      facecolor=COLOURS["card"], edgecolor=colour(tone), linewidth=1.5))  # fmt: skip
        axes.text(x + WIDTH / 2, y + 29, name, ha="center", va="center", fontweight="bold", color=COLOURS["ink"])
        axes.text(x + WIDTH / 2, y + 13, second, ha="center", va="center", fontsize=11, color=COLOURS["soft"])
    return figure


def columns(graph: Graph) -> dict[str, tuple[int, int]]:
    """Return name → (column, row): each box in the first column after all that it depends on."""
    positions: dict[str, tuple[int, int]] = {}
    filled: dict[int, int] = {}
    for name in graph.nodes:
        column = max((positions[source][0] + 1 for source in graph.edges[name]), default=0)
        positions[name] = (column, filled.get(column, 0))
        filled[column] = filled.get(column, 0) + 1
    return positions


def draw_arrow(axes: "Axes", start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draw an arrow that is level except for one bend, in the gap between columns where it is free.

    Args:
        axes: The axes.
        start: Where it begins, at the right edge of a box.
        end: Where it ends, at the left edge of a box.
    """
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path as Curve

    (x0, y0), (x1, y1) = start, end
    is_rising = y1 > y0  # from a lower row, which is free further right: bend at the end
    bend_from, bend_to = (x1 - GAP_X, x1 - 6) if is_rising else (x0, x0 + GAP_X - 6)
    middle = (bend_from + bend_to) / 2
    vertices = [(x0, y0), (bend_from, y0), (middle, y0), (middle, y1), (bend_to, y1), (x1, y1)]
    codes = [Curve.MOVETO, Curve.LINETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4, Curve.LINETO]
    axes.add_patch(FancyArrowPatch(path=Curve(vertices, codes), arrowstyle="-|>", mutation_scale=9, linewidth=1.3,
                                   shrinkA=0, shrinkB=0, color=COLOURS["soft"], joinstyle="miter"))  # fmt: skip
