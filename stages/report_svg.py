"""Plots as inline SVG: numbers in, a string out. Colours and fonts are the page's CSS, so light and dark just work.

`tone` names a colour: a policy or stage (base, sft, ppo, dpo, best_of_n, rm), or `soft`. Coordinates have one decimal,
so that the same numbers give the same bytes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float | None, float | None]


@dataclass(frozen=True)
class Figure:
    """A plot, what it shows, how to read it, and its keys: (text, tone, kind), kind one of line, faint, dash, dot."""

    title: str
    svg: str
    caption: str
    keys: tuple[tuple[str, str, str], ...] = ()
    wide: bool = False


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from low to high."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    return [float(f"{i * step:.10g}") for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within the range; 1, 2, 5 where there are fewer than three of them."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in ((1,), (1, 2, 5)):
        found = [10.0**p * m for p in powers for m in multiples if low <= 10.0**p * m <= high]
        if len(found) >= 3:
            break
    return found


def tick_text(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:g}".replace("-", "−")


class Axes:
    """A frame with ticks; marks are added by methods, in data coordinates, and `svg` closes it."""

    def __init__(self, xs: Sequence, ys: Sequence, x_label: str, y_label: str, *, width: int = 420, height: int = 250,
                 log_y: bool = False):
        xs, ys = ([v for v in values if v is not None] or [0.0] for values in (xs, ys))
        self.log_y = log_y and min(ys) > 0
        self.width, self.height, self.x_label, self.y_label = width, height, x_label, y_label
        self.x_low, self.x_high = _range(min(xs), max(xs), 0.02)
        low, high = (math.log10(v) for v in (min(ys), max(ys))) if self.log_y else (min(ys), max(ys))
        low, high = _range(low, high, 0.06)
        self.y_low, self.y_high = low, high
        y_ticks = log_ticks(10**low, 10**high) if self.log_y else ticks(low, high, 4)
        self.left = 14 + 7 * max(len(tick_text(t)) for t in y_ticks or [0])
        self.right, self.top, self.bottom = width - 14, 30, height - 40
        self.parts: list[str] = []
        self._frame(y_ticks)

    def x(self, value: float) -> float:
        return self.left + (value - self.x_low) / (self.x_high - self.x_low) * (self.right - self.left)

    def y(self, value: float) -> float:
        value = math.log10(value) if self.log_y else value
        return self.bottom - (value - self.y_low) / (self.y_high - self.y_low) * (self.bottom - self.top)

    def _frame(self, y_ticks: list[float]) -> None:
        for t in y_ticks:
            y = self.y(t)
            self.parts.append(f'<path class="grid" d="M{self.left:.1f} {y:.1f}H{self.right}"/>')
            self.text(self.left - 7, y + 4, tick_text(t), "tick", "end")
        for t in ticks(self.x_low, self.x_high, 5):
            self.parts.append(f'<path class="axis" d="M{self.x(t):.1f} {self.bottom}v4"/>')
            self.text(self.x(t), self.bottom + 17, tick_text(t), "tick", "middle")
        self.parts.append(f'<path class="axis" d="M{self.left} {self.bottom}H{self.right}"/>')
        self.text(2, 14, self.y_label, "label")
        self.text(self.right, self.height - 5, self.x_label, "label", "end")

    def text(self, x: float, y: float, text: str, kind: str, anchor: str = "start", tone: str = "") -> None:
        """Text at pixels."""
        tone = f" t-{tone}" if tone else ""
        at = f' text-anchor="{anchor}"' if anchor != "start" else ""
        self.parts.append(f'<text class="{kind}{tone}" x="{x:.1f}" y="{y:.1f}"{at}>{escape(text)}</text>')

    def line(self, points: Sequence[Point], tone: str, kind: str = "line") -> None:
        """A line through the points, broken where a number is missing. kind: line, faint or dash."""
        path, pen = [], "M"
        for x, y in points:
            if x is None or y is None:
                pen = "M"
                continue
            path.append(f"{pen}{self.x(x):.1f} {self.y(y):.1f}")
            pen = "L"
        self.parts.append(f'<path class="{kind} t-{tone}" d="{"".join(path)}"/>')

    def cloud(self, points: Sequence[Point], tone: str) -> None:
        """Many small faint dots, as one path."""
        path = "".join(f"M{self.x(x):.1f} {self.y(y):.1f}h0" for x, y in points if x is not None and y is not None)
        self.parts.append(f'<path class="cloud t-{tone}" d="{path}"/>')

    def dots(self, points: Sequence[Point], tone: str, radius: float = 3.2, title: str = "", kind: str = "dot") -> None:
        for x, y in points:
            if x is not None and y is not None:
                inner = f"<title>{escape(title or f'{y:.4g} at {x:.4g}')}</title>"
                self.parts.append(f'<circle class="{kind} t-{tone}" cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" '
                                  f'r="{radius}">{inner}</circle>')

    def bar(self, x: float, low: float, high: float, tone: str) -> None:
        """A vertical interval."""
        self.parts.append(f'<path class="bar t-{tone}" d="M{self.x(x):.1f} {self.y(low):.1f}V{self.y(high):.1f}"/>')

    def level(self, y: float, text: str, below: bool = False) -> None:
        """A dashed horizontal line with its name."""
        self.parts.append(f'<path class="level" d="M{self.left:.1f} {self.y(y):.1f}H{self.right}"/>')
        self.text(self.right - 2, self.y(y) + (13 if below else -5), text, "note", "end")

    def names(self, points: Sequence[tuple[float, float, str, str]]) -> None:
        """Labels (x, y, text, tone) beside their dots, each on the first side where it hides nothing."""
        dots = [(self.x(x) - 6, self.y(y) - 6, self.x(x) + 6, self.y(y) + 6) for x, y, _, _ in points]
        taken: list[tuple] = []
        for x, y, text, tone in points:
            x, y, w = self.x(x), self.y(y), 7 * len(text)
            sides = ((x + 10, y + 4), (x - 10 - w, y + 4), (x - w / 2, y - 11), (x - w / 2, y + 20), (x + 9, y - 8),
                     (x + 9, y + 17), (x - 9 - w, y - 8), (x - 9 - w, y + 17))
            for left, base in sides:
                box = (left, base - 11, left + w, base + 3)
                if self.left <= left and box[2] <= self.width and not any(_overlap(box, b) for b in taken + dots):
                    break
            else:
                left, base = sides[0]
                box = (left, base - 11, left + w, base + 3)
            taken.append(box)
            self.text(left, base, text, "name", tone=tone)

    def svg(self, title: str) -> str:
        return _svg(self.width, self.height, title, self.parts)


def dot_plot(rows: Sequence[tuple[str, Sequence[tuple]]], x_label: str, title: str, *, reference: float | None = None,
             low: float = 0.0, high: float = 1.0, labelled: bool = True) -> str:
    """One line a row: (name, marks), a mark (value, low | None, high | None, tone, text)."""
    width, left, step = 520, 96, 36
    height = step * len(rows) + 52
    parts: list[str] = []
    x = lambda v: left + (v - low) / (high - low) * (width - 24 - left)  # noqa: E731
    for t in ticks(low, high, 5):
        parts.append(f'<path class="grid" d="M{x(t):.1f} 8V{height - 40}"/>')
        parts.append(f'<text class="tick" x="{x(t):.1f}" y="{height - 24}" text-anchor="middle">{tick_text(t)}</text>')
    if reference is not None:
        parts.append(f'<path class="level" d="M{x(reference):.1f} 8V{height - 40}"/>')
    for i, (name, marks) in enumerate(rows):
        y = 8 + step * (i + 0.5)
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{width - 24}"/>')
        parts.append(f'<text class="row" x="{left - 12}" y="{y + 4:.1f}" text-anchor="end">{escape(name)}</text>')
        for value, least, most, tone, text in marks:
            if least is not None:
                parts.append(f'<path class="bar t-{tone}" d="M{x(least):.1f} {y:.1f}H{x(most):.1f}"/>')
            parts.append(f'<circle class="dot t-{tone}" cx="{x(value):.1f}" cy="{y:.1f}" r="6">'
                         f'<title>{escape(text)}</title></circle>')
            if labelled:
                parts.append(f'<text class="name t-{tone}" x="{x(value):.1f}" y="{y - 10:.1f}" '
                             f'text-anchor="middle">{escape(text)}</text>')
    parts.append(f'<text class="label" x="{width - 24}" y="{height - 5}" text-anchor="end">{escape(x_label)}</text>')
    return _svg(width, height, title, parts)


def graph(nodes: dict[str, tuple[str, str]], edges: dict[str, set[str]]) -> str:
    """Boxes {name: (second line, tone)} in columns, each right of what it stands on; edges {name: what it stands on}."""
    depth: dict[str, int] = {}
    for name in nodes:  # in an order in which inputs come first
        depth[name] = 1 + max((depth[i] for i in edges[name]), default=-1)
    columns: dict[int, list[str]] = {}
    for name in nodes:
        columns.setdefault(depth[name], []).append(name)
    w, h, gap_x, gap_y = 106, 44, 34, 32
    place = {name: (c * (w + gap_x) + 1, r * (h + gap_y) + 1) for c, names in columns.items() for r, name in enumerate(names)}
    width, height = max(x for x, _ in place.values()) + w + 1, max(y for _, y in place.values()) + h + 1
    parts = []
    for name, inputs in edges.items():
        for source in sorted(inputs):
            (x0, y0), (x1, y1) = place[source], place[name]
            x0, y0, y1 = x0 + w, y0 + h / 2, y1 + h / 2
            bend = (x1 - x0) * 0.5
            parts.append(f'<path class="edge" d="M{x0} {y0:.1f}C{x0 + bend:.1f} {y0:.1f} {x1 - bend:.1f} {y1:.1f} '
                         f'{x1 - 6} {y1:.1f}"/><path class="tip" d="M{x1} {y1:.1f}l-7 -4v8z"/>')
    for name, (second, tone) in nodes.items():
        x, y = place[name]
        parts.append(f'<rect class="node t-{tone}" x="{x}" y="{y}" width="{w}" height="{h}" rx="8"/>'
                     f'<text class="row" x="{x + w / 2}" y="{y + 19}" text-anchor="middle">{escape(name)}</text>'
                     f'<text class="digest" x="{x + w / 2}" y="{y + 35}" text-anchor="middle">{escape(second)}</text>')
    return _svg(width, height, "which artifact was made of which", parts)


def smooth(points: Sequence[Point]) -> list[Point]:
    """A centred moving average over about a twentieth of the points."""
    half = max(1, len(points) // 40)
    out = []
    for i, (x, _) in enumerate(points):
        near = [y for _, y in points[max(0, i - half):i + half + 1] if y is not None]
        out.append((x, sum(near) / len(near) if near else None))
    return out


def thin(points: Sequence[Point], most: int = 300) -> list[Point]:
    """At most `most` points, each the mean of its neighbours: long runs stay small files."""
    size = -(-len(points) // most)
    if size <= 1:
        return list(points)
    out = []
    for start in range(0, len(points), size):
        part = [(x, y) for x, y in points[start:start + size] if y is not None]
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


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    return (f'<svg viewBox="0 0 {width:g} {height:g}" style="--w:{width:g}px" role="img" aria-label="{escape(title)}">'
            f'{"".join(parts)}</svg>')
