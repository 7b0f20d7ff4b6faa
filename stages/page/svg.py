"""Plots as inline SVG: numbers in, a string out. Colours and fonts are the page's CSS, light and dark alike.

`tone` names a colour: a policy or stage (base, sft, ppo, dpo, best_of_n, rm), `ink` or `soft`. Coordinates
have one decimal, so that the same numbers give the same bytes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float | None, float | None]


@dataclass(frozen=True)
class Figure:
    """A plot, how to read it, keys (text, tone, kind: line, faint or dot), and the metrics that it shows."""

    title: str
    svg: str
    caption: str
    keys: tuple[tuple[str, str, str], ...] = ()
    metrics: tuple[str, ...] = ()


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from low to high."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = min((power * m for m in (1, 2, 5, 10)), key=lambda s: abs(math.log(s / rough)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within the range; 1, 2, 5 where there are fewer than three of them."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in ((1,), (1, 2, 5)):
        found = [10.0**p * m for p in powers for m in multiples if low <= 10.0**p * m <= high]
        if len(found) >= 3:
            break
    return found


def root_ticks(low: float, high: float) -> list[float]:
    """0 and the numbers 1, 2, 5 · 10ⁿ that do not crowd each other on a square-root axis."""
    found = [0.0] if low <= 0 else []
    for value in (10.0**p * m for p in range(-3, 6) for m in (1, 2, 5)):
        room = 0.1 * math.sqrt(high)
        if low <= value <= high and (not found or math.sqrt(value) - math.sqrt(found[-1]) > room):
            found.append(value)
    return found


def tick_text(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:g}".replace("-", "−")


class Axes:
    """A frame with ticks; marks are added by methods, in data coordinates, and `svg` closes it."""

    def __init__(
        self,
        xs: Sequence,
        ys: Sequence,
        x_label: str,
        y_label: str,
        *,
        width: int = 330,
        height: int = 215,
        log_y: bool = False,
        root_x: bool = False,
    ):
        xs, ys = ([v for v in values if v is not None] or [0.0] for values in (xs, ys))
        self.of_x = (lambda v: math.sqrt(max(v, 0.0))) if root_x else float
        self.of_y = math.log10 if log_y and min(ys) > 0 else float
        self.width, self.height, self.x_label = width, height, x_label
        self.y_label = y_label if self.of_y is float else f"{y_label}, log scale"
        self.x_low, self.x_high = _range(self.of_x(min(xs)), self.of_x(max(xs)), 0.02)
        self.y_low, self.y_high = low, high = _range(self.of_y(min(ys)), self.of_y(max(ys)), 0.06)
        x_ticks = root_ticks(min(xs), self.x_high**2) if root_x else ticks(self.x_low, self.x_high, 5)
        y_ticks = ticks(low, high, 4) if self.of_y is float else log_ticks(10**low, 10**high)
        self.left = 14 + 7 * max(len(tick_text(t)) for t in y_ticks or [0])
        self.right, self.top, self.bottom = width - 14, 30, height - 40
        self.parts: list[str] = []
        self._frame(x_ticks, y_ticks)

    def x(self, value: float) -> float:
        share = (self.of_x(value) - self.x_low) / (self.x_high - self.x_low)
        return self.left + share * (self.right - self.left)

    def y(self, value: float) -> float:
        share = (self.of_y(value) - self.y_low) / (self.y_high - self.y_low)
        return self.bottom - share * (self.bottom - self.top)

    def _frame(self, x_ticks: list[float], y_ticks: list[float]) -> None:
        for t in y_ticks:
            y = self.y(t)
            self.parts.append(f'<path class="grid" d="M{self.left:.1f} {y:.1f}H{self.right}"/>')
            self.text(self.left - 7, y + 4, tick_text(t), "tick", "end")
        for t in x_ticks:
            self.parts.append(f'<path class="axis" d="M{self.x(t):.1f} {self.bottom}v4"/>')
            self.text(self.x(t), self.bottom + 17, tick_text(t), "tick", "middle")
        self.parts.append(f'<path class="axis" d="M{self.left} {self.bottom}H{self.right}"/>')
        self.text(2, 14, self.y_label, "label")
        self.text(self.right, self.height - 5, self.x_label, "label", "end")

    def text(self, x: float, y: float, text: str, kind: str, anchor: str = "start", tone: str = "") -> None:
        """Text at pixels."""
        self.parts.append(_text(x, y, text, kind, anchor, tone))

    def line(self, points: Sequence[Point], tone: str, kind: str = "line") -> None:
        """A line through the points, broken where a number is missing. kind: line or faint."""
        path, pen = [], "M"
        for x, y in points:
            if x is None or y is None:
                pen = "M"
                continue
            path.append(f"{pen}{self.x(x):.1f} {self.y(y):.1f}")
            pen = "L"
        self.parts.append(f'<path class="{kind} t-{tone}" d="{"".join(path)}"/>')

    def cloud(self, points: Sequence[tuple[float, float]], tone: str) -> None:
        """Many small faint dots, as one path."""
        path = "".join(f"M{self.x(x):.1f} {self.y(y):.1f}h0" for x, y in points)
        self.parts.append(f'<path class="cloud t-{tone}" d="{path}"/>')

    def dots(self, points: Sequence[Point], tone: str, radius: float = 3.2, title: str = "") -> None:
        """Dots that tell their numbers, or `title`, under the mouse."""
        for x, y in points:
            if x is not None and y is not None:
                self.parts.append(_dot(self.x(x), self.y(y), radius, tone, title or f"{y:.4g} at {x:.4g}"))

    def bar(self, x: float, low: float, high: float, tone: str) -> None:
        """A vertical interval."""
        path = f"M{self.x(x):.1f} {self.y(low):.1f}V{self.y(high):.1f}"
        self.parts.append(f'<path class="bar t-{tone}" d="{path}"/>')

    def level(self, y: float, text: str, below: bool = False) -> None:
        """A dashed horizontal line with its name."""
        self.parts.append(f'<path class="level" d="M{self.left:.1f} {self.y(y):.1f}H{self.right}"/>')
        self.text(self.right - 2, self.y(y) + (13 if below else -5), text, "note", "end")

    def names(self, points: Sequence[tuple[float, float, str, str]]) -> None:
        """Labels (x, y, text, tone) beside their dots, each on the first side where it hides nothing."""
        dots = [(self.x(x) - 6, self.y(y) - 6, self.x(x) + 6, self.y(y) + 6) for x, y, _, _ in points]
        taken: list[tuple] = []
        for x, y, text, tone in points:
            x, y, w = self.x(x), self.y(y), 7.5 * len(text)
            sides = [
                (x + 11, y + 4, "start"),
                (x - 11, y + 4, "end"),
                (x, y - 12, "middle"),
                (x, y + 21, "middle"),
                (x + 9, y - 9, "start"),
                (x + 9, y + 18, "start"),
                (x - 9, y - 9, "end"),
                (x - 9, y + 18, "end"),
            ]
            lefts = [at - {"start": 0, "middle": w / 2, "end": w}[anchor] for at, _, anchor in sides]
            bases = [base for _, base, _ in sides]
            boxes = [(at, base - 11, at + w, base + 3) for at, base in zip(lefts, bases, strict=True)]
            free = [
                i
                for i, box in enumerate(boxes)
                if self.left <= box[0] and box[2] <= self.width and not any(_overlap(box, b) for b in taken + dots)
            ]
            best = free[0] if free else 0
            taken.append(boxes[best])
            self.text(*sides[best][:2], text, "name", sides[best][2], tone)

    def svg(self, title: str) -> str:
        return _svg(self.width, self.height, title, self.parts)


def dot_plot(
    rows: Sequence[tuple[str, Sequence[tuple]]],
    x_label: str,
    title: str,
    *,
    reference: float | None = None,
    labelled: bool = True,
) -> str:
    """Values from 0 to 1, a line for each row (name, marks); a mark: (value, low, high, tone, text)."""
    left = max(96, 24 + 7 * max(len(name) for name, _ in rows))
    width, step = left + 424, 36
    height = step * len(rows) + 52
    parts: list[str] = []
    x = lambda v: left + v * (width - 24 - left)  # noqa: E731
    for t in ticks(0.0, 1.0, 5):
        parts.append(f'<path class="grid" d="M{x(t):.1f} 8V{height - 40}"/>')
        parts.append(_text(x(t), height - 24, tick_text(t), "tick", "middle"))
    if reference is not None:
        parts.append(f'<path class="level" d="M{x(reference):.1f} 8V{height - 40}"/>')
    for i, (name, marks) in enumerate(rows):
        y = 8 + step * (i + 0.5)
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{width - 24}"/>')
        parts.append(_text(left - 12, y + 4, name, "row", "end"))
        for value, least, most, tone, text in marks:
            if least is not None:
                parts.append(f'<path class="bar t-{tone}" d="M{x(least):.1f} {y:.1f}H{x(most):.1f}"/>')
            parts.append(_dot(x(value), y, 6, tone, text))
            if labelled:
                parts.append(_text(x(value), y - 10, text, "name", "middle", tone))
    parts.append(_text(width - 24, height - 5, x_label, "label", "end"))
    return _svg(width, height, title, parts)


def graph(nodes: dict[str, tuple[str, str]], edges: dict[str, set[str]]) -> str:
    """Boxes {name: (second line, tone)} in columns, each right of what it stands on: edges {name: those}."""
    depth: dict[str, int] = {}
    for name in nodes:  # in an order in which inputs come first
        depth[name] = 1 + max((depth[i] for i in edges[name]), default=-1)
    columns: dict[int, list[str]] = {}
    for name in nodes:
        columns.setdefault(depth[name], []).append(name)
    w, h, gap_x, gap_y = 96, 44, 24, 32
    place = {
        name: (column * (w + gap_x) + 1, row * (h + gap_y) + 1)
        for column, names in columns.items()
        for row, name in enumerate(names)
    }
    width, height = max(x for x, _ in place.values()) + w + 1, max(y for _, y in place.values()) + h + 1
    parts = []
    for name, inputs in edges.items():
        for source in sorted(inputs):
            (x0, y0), (x1, y1) = place[source], place[name]
            x0, y0, y1 = x0 + w, y0 + h / 2, y1 + h / 2
            near, far = (x1 - gap_x, x1) if y0 > y1 else (x0, x0 + gap_x)  # level where the row is free
            bend = f"C{near + 14} {y0:.1f} {far - 14} {y1:.1f} {far - 2} {y1:.1f}"
            parts.append(
                f'<path class="edge" d="M{x0} {y0:.1f}H{near}{bend}H{x1 - 4}"/>'
                f'<path class="tip" d="M{x1} {y1:.1f}l-7 -4v8z"/>'
            )
    for name, (second, tone) in nodes.items():
        x, y = place[name]
        parts.append(
            f'<rect class="node t-{tone}" x="{x}" y="{y}" width="{w}" height="{h}" rx="8"/>'
            + _text(x + w / 2, y + 19, name, "row", "middle")
            + _text(x + w / 2, y + 35, second, "digest", "middle")
        )
    return _svg(width, height, "which artifact was made of which", parts)


def smooth(points: Sequence[Point]) -> list[Point]:
    """A centred moving average over about a twentieth of the points."""
    half = max(1, len(points) // 40)
    out = []
    for i, (x, _) in enumerate(points):
        near = [y for _, y in points[max(0, i - half) : i + half + 1] if y is not None]
        out.append((x, sum(near) / len(near) if near else None))
    return out


def thin(points: Sequence[Point], most: int = 300) -> list[Point]:
    """At most `most` points, each the mean of its neighbours: long runs stay small files."""
    size = -(-len(points) // most)
    if size <= 1:
        return list(points)
    out = []
    for start in range(0, len(points), size):
        part = [(x, y) for x, y in points[start : start + size] if y is not None]
        if part:
            out.append((sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)))
    return out


def _range(low: float, high: float, pad: float) -> tuple[float, float]:
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    space = pad * (high - low)
    return low - space, high + space


def _overlap(a: tuple, b: tuple) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start", tone: str = "") -> str:
    kind += f" t-{tone}" if tone else ""
    at = f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}"{at}>{escape(text)}</text>'


def _dot(x: float, y: float, radius: float, tone: str, title: str) -> str:
    return (
        f'<circle class="dot t-{tone}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{escape(title)}</title></circle>'
    )


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    size = "wide" if width > 400 else "small"
    return (
        f'<svg class="{size}" viewBox="0 0 {width:g} {height:g}" style="--w:{width:g}px" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )
