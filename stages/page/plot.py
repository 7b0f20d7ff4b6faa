"""Describe a plot as plain values, which `stages.page.drawing` turns into a picture.

A tone names a colour of the page: a policy or stage (`base`, `sft`, `ppo`, `dpo`, `best_of_n`,
`rm`), `ink` (the colour of text) or `soft` (the colour of secondary text).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Point = tuple[float | None, float | None]
"""An (x, y) pair; a None breaks a line and leaves out a dot."""


@dataclass(frozen=True)
class Line:
    """A line through points."""

    points: Sequence[Point]
    """The points, in drawing order."""
    tone: str
    """The tone of the line."""
    faint: bool = False
    """Whether the line is drawn pale, as raw values are under their moving average."""


@dataclass(frozen=True)
class Dots:
    """Markers whose shape follows from their tone."""

    points: Sequence[Point]
    """Where the markers stand."""
    tone: str
    """The tone of the markers."""
    size: float = 7.0
    """The diameter in pixels."""
    tips: Sequence[str] = ()
    """The tooltip of each point; without any, it is "y at x"."""


@dataclass(frozen=True)
class Cloud:
    """Hold a scatter plot drawn as small pale dots."""

    points: Sequence[Point]
    """Where the dots stand."""
    tone: str
    """The tone of the dots."""


@dataclass(frozen=True)
class Spans:
    """Vertical intervals."""

    spans: Sequence[tuple[float, float, float]]
    """The (x, low, high) of each interval."""
    tone: str
    """The tone of the intervals."""


@dataclass(frozen=True)
class Level:
    """A dashed horizontal line across the plot."""

    value: float
    """The height of the line."""
    text: str
    """What is written at its right end."""
    below: bool = False
    """Whether the text is below the line."""


@dataclass(frozen=True)
class Label:
    """A name beside a marker."""

    x: float
    """The x of the marker."""
    y: float
    """The y of the marker."""
    text: str
    """The name."""
    tone: str
    """The tone of the name."""


Mark = Line | Dots | Cloud | Spans | Level | Label


@dataclass(frozen=True)
class Curves:
    """Marks in a frame with two numeric axes."""

    marks: Sequence[Mark]
    """The marks, the lowest layer first."""
    x_label: str
    """The quantity on the x axis, with its unit."""
    y_label: str
    """The quantity on the y axis, with its unit."""
    log_y: bool = False
    """Whether the y axis is logarithmic, where all values are positive."""
    root_x: bool = False
    """Whether the x axis is scaled by the square root, so that small values stand apart."""
    x_includes: Sequence[float] = ()
    """Values that the x axis must cover."""
    y_includes: Sequence[float] = ()
    """Values that the y axis must cover."""
    x_names: Sequence[str] = ()
    """Names of the positions 0, 1, 2 … on the x axis, in place of numbers."""


@dataclass(frozen=True)
class RowMark:
    """A marker in a row of a dot plot."""

    value: float
    """The value, from 0 to 1."""
    tone: str
    """The tone of the marker."""
    text: str
    """The tooltip, and the label where the plot is labelled."""
    interval: Sequence[float] | None = None
    """The ends of the interval around the value."""


@dataclass(frozen=True)
class Rows:
    """A dot plot: named rows of markers on a common axis from 0 to 1."""

    rows: Sequence[tuple[str, Sequence[RowMark]]]
    """The (name, markers) of each row, from top to bottom."""
    x_label: str
    """The quantity on the axis."""
    reference: float | None = None
    """Position of a dashed vertical line."""
    labelled: bool = True
    """Whether each marker's text is written above it."""


@dataclass(frozen=True)
class Graph:
    """Boxes in columns, each to the right of the boxes that its arrows come from."""

    nodes: dict[str, tuple[str, str]]
    """Name of a box → its (second line, tone), every box after those that it depends on."""
    edges: dict[str, set[str]]
    """Name of a box → the boxes that it depends on."""


Drawing = Curves | Rows | Graph


@dataclass(frozen=True)
class Key:
    """An entry of a legend."""

    text: str
    """What the entry explains."""
    tone: str
    """The tone of its sample."""
    kind: Literal["line", "faint", "dot"] = "line"
    """What its sample shows."""


@dataclass(frozen=True)
class Plot:
    """A plot with its words."""

    name: str
    """The name of its file, without a suffix."""
    title: str
    """Its heading."""
    caption: str
    """How to read it."""
    drawing: Drawing
    """What is drawn."""
    keys: tuple[Key, ...] = ()
    """Its legend."""
    metrics: tuple[str, ...] = ()
    """The names under which metrics.jsonl holds what it shows."""
    size: Literal["small", "large", "full"] = "small"
    """How large it is drawn where there is room: three, two or one to a row of the page."""


def smooth(points: Sequence[Point]) -> list[Point]:
    """Return the centred moving average over about a twentieth of the points."""
    half = max(1, len(points) // 40)
    averages: list[Point] = []
    for i, (x, _) in enumerate(points):
        window = [y for _, y in points[max(0, i - half) : i + half + 1] if y is not None]
        averages.append((x, sum(window) / len(window) if window else None))
    return averages


def thin(points: Sequence[Point], limit: int = 300) -> list[Point]:
    """Return at most `limit` points, each the mean of its neighbours, to keep long runs small."""
    size = -(-len(points) // limit)
    if size <= 1:
        return list(points)
    means: list[Point] = []
    for start in range(0, len(points), size):
        known = [(x, y) for x, y in points[start : start + size] if x is not None and y is not None]
        if known:
            means.append((sum(x for x, _ in known) / len(known), sum(y for _, y in known) / len(known)))
    return means


def known_points(points: Sequence[Point]) -> list[tuple[float, float]]:
    """Return the points of which both coordinates are known."""
    return [(x, y) for x, y in points if x is not None and y is not None]


def describe(plot: Plot) -> str:
    """Return what a plot shows in words, for readers who cannot see it."""
    drawing = plot.drawing
    if isinstance(drawing, Rows):
        rows = [f"{name}: {', '.join(mark.text for mark in marks)}" for name, marks in drawing.rows]
        return f"Dot plot of {drawing.x_label}. {'; '.join(rows)}."
    if isinstance(drawing, Graph):
        arrows = [f"{name} from {', '.join(sorted(inputs))}" for name, inputs in drawing.edges.items() if inputs]
        return f"Boxes with arrows between them: {'; '.join(arrows)}."
    names = {key.tone: key.text for key in plot.keys if key.kind != "dot"}
    parts = [f"{drawing.y_label} against {drawing.x_label}."]
    for mark in drawing.marks:
        if isinstance(mark, Level):
            parts.append(f"Dashed line: {mark.text}.")
        elif isinstance(mark, Label):
            parts.append(f"{mark.text}: {mark.y:.3g} at {mark.x:.3g}.")
        elif isinstance(mark, Line) and not mark.faint and (points := known_points(mark.points)):
            (x0, y0), (x1, y1) = points[0], points[-1]
            name = names.get(mark.tone, "Line")
            parts.append(f"{name}: from {y0:.3g} at {x0:.3g} to {y1:.3g} at {x1:.3g}.")
    return " ".join(parts)
