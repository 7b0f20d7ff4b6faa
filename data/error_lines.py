"""Shorten a list of error lines, so that a thoroughly broken file does not fill the terminal."""

import re
from collections.abc import Iterable

MOST_LINES = 20
"""Error lines that are shown at most; the others are counted in one more line."""


def shorten(lines: Iterable[str]) -> list[str]:
    """Return the first 20 error lines, and one more line that counts the others.

    Args:
        lines: Error lines of the form "PLACE: what is wrong; what to do".
    """
    lines = list(lines)
    hidden = len(lines) - MOST_LINES
    if hidden <= 0:
        return lines
    place = re.match(r"(.+?)(:\d+)?: ", lines[0])
    file = place[1] if place else "data"
    return [*lines[:MOST_LINES], f"{file}: and {hidden} more errors; fix these first, then try again"]
