"""Estimates as text, for tables and sentences."""

from collections.abc import Sequence

from stages.page.numbers import fixed


def span(ci95: Sequence[float] | None, digits: int = 3) -> str:
    """Write an interval: 0.842 to 0.858; "–" where there is none."""
    return "–" if ci95 is None else f"{fixed(ci95[0], digits)} to {fixed(ci95[1], digits)}"


def with_interval(found: dict | None, digits: int = 3) -> str:
    """Write an estimate with its interval: 0.850 (0.842 to 0.858); "–" where there is none."""
    if found is None:
        return "–"
    value = fixed(found["value"], digits)
    return value if found["ci95"] is None else f"{value} ({span(found['ci95'], digits)})"


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table, its columns padded so that a terminal shows it well, too."""
    widths = [max(3, *map(len, column)) for column in zip(headings, *rows, strict=True)]
    lines = [headings, ["-" * width for width in widths], *rows]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in padded)
