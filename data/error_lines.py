"""Shorten a list of error lines, so that a thoroughly broken file does not fill the terminal."""

import re
from collections.abc import Iterable

MOST_LINES = 20
"""Error lines that are shown at most; the others are counted in one more line."""
PLACE = re.compile(r"(?P<file>.+?)(:(?P<line>\d+))?(: index (?P<index>\d+))?: (?P<text>.*)", re.DOTALL)
"""FILE:LINE, FILE: index I, or both, and what is wrong there."""


def shorten(lines: Iterable[str]) -> list[str]:
    """Return at most 20 error lines, and one more line that counts the others.

    The same mistake in many rows is one line: the first of them, with the number of the others and
    the last place.

    Args:
        lines: Error lines of the form "PLACE: what is wrong; what to do".
    """
    groups: dict[str, list[str]] = {}  # what is wrong → its lines, whichever files they name
    for line in lines:
        match = PLACE.fullmatch(line)
        has_row = match is not None and (match["line"] or match["index"])
        key = match["text"] if match is not None and has_row else line
        groups.setdefault(key, []).append(line)
    shown = [with_count(group) for group in groups.values()]
    hidden = sum(len(group) for group in list(groups.values())[MOST_LINES:])
    if not hidden:
        return shown
    place = PLACE.fullmatch(shown[0])
    file = place["file"] if place else "data"
    return [*shown[:MOST_LINES], f"{file}: and {hidden} more errors; fix these first, then try again"]


def with_count(lines: list[str]) -> str:
    """Return the first of lines with the same mistake, with the number of the others."""
    if len(lines) == 1:
        return lines[0]
    first, match = PLACE.fullmatch(lines[0]), PLACE.fullmatch(lines[-1])
    assert first is not None and match is not None
    last = f"line {match['line']}" if match["line"] else f"index {match['index']}"
    if match["file"] != first["file"]:
        last += f" of {match['file']}"
    rows = "1 more row" if len(lines) == 2 else f"{len(lines) - 1:,} more rows"
    return f"{lines[0]} (the same in {rows}, the last at {last})"
