"""Format estimates as text, for tables and sentences."""

from collections.abc import Sequence

from stages.page.numbers import fixed


def span(ci95: Sequence[float] | None, digits: int = 3) -> str:
    """Format an interval: 0.842 to 0.858; "–" if there is none."""
    return "–" if ci95 is None else f"{fixed(ci95[0], digits)} to {fixed(ci95[1], digits)}"


def with_interval(estimate: dict | None, digits: int = 3) -> str:
    """Format an estimate with its interval: 0.850 (0.842 to 0.858); "–" if there is none."""
    if estimate is None:
        return "–"
    value = fixed(estimate["value"], digits)
    return value if estimate["ci95"] is None else f"{value} ({span(estimate['ci95'], digits)})"


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table, its columns padded to be readable in a terminal as well."""
    widths = [max(3, *map(len, column)) for column in zip(headings, *rows, strict=True)]
    lines = [headings, ["-" * width for width in widths], *rows]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in padded)
