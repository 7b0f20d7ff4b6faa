"""Format numbers, times and lists as people read them."""

import math
from collections.abc import Sequence
from datetime import datetime
from typing import Any

NONE = "–"
"""Written where there is no number."""


def number(value: Any) -> float | None:
    """Return a finite number, or None for anything else: journals also hold "NaN" and null."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return float(value)


def fixed(value: Any, digits: int = 2) -> str:
    """Return a number with this many decimals and a real minus sign; "–" where there is none."""
    value = number(value)
    if value is None:
        return NONE
    text = f"{value:.{digits}f}".replace("-", "−")
    is_zero = not text.strip("−0.")
    return text.removeprefix("−") if is_zero else text


def percent(value: Any, digits: int = 0) -> str:
    """Return a share in percent; "–" where there is none."""
    return NONE if number(value) is None else f"{fixed(100 * value, digits)}\u00a0%"


def interval(low: float, high: float, digits: int = 0) -> str:
    """Return the ends of an interval of shares in percent, without the sign: 60 to 70."""
    return f"{fixed(100 * low, digits)} to {fixed(100 * high, digits)}"


def moment(text: str) -> str:
    """Return a manifest's time in its own time zone (UTC), whoever makes the page."""
    return f"{datetime.fromisoformat(text):%Y-%m-%d %H:%M} UTC"


def duration(seconds: float) -> str:
    """Return a length of time: 41 s, 4 min 33 s, 2 h 5 min."""
    minutes, remainder = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{remainder} s"
    return f"{minutes} min {remainder} s" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def listed(parts: Sequence[str]) -> str:
    """Join words as a sentence does: a, b and c."""
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else "".join(parts)


def capitalised(text: str) -> str:
    """Return text with its first letter in upper case and the rest as it is."""
    return text[:1].upper() + text[1:]
