"""Decode JSON strictly, and say what is wrong with a text in the words of an error line."""

import json
import math
import re
from collections.abc import Callable

SURROGATE = re.compile("[\ud800-\udfff]")
"""Half a surrogate pair: no UTF-8 file and no tokenizer can hold it."""


def strict_decoder() -> Callable[[str, int], tuple[object, int, str | None]]:
    """Return a JSON decoder that also finds what Python lets pass but JSON forbids.

    Returns:
        A function (text, start) → (value, end, problem or None). In the value, keys whose value is
        null are left out.
    """
    problems: list[str] = []

    def unique(members: list[tuple[str, object]]) -> dict:
        value = dict(members)
        if len(value) < len(members):
            keys = [key for key, _ in members]
            twice = next(key for key in keys if keys.count(key) > 1)
            problems.append(f"the key {twice!r} occurs twice in one object; keep one of them")
        return value

    def finite(number: str) -> float:
        if not math.isfinite(float(number)):
            problems.append(f"{number} is not a JSON number; use a finite number or null")
        return float(number)

    decoder = json.JSONDecoder(object_pairs_hook=unique, parse_float=finite, parse_constant=finite)

    def decode(text: str, start: int) -> tuple[object, int, str | None]:
        problems.clear()
        value, end = decoder.raw_decode(text, start)
        # Looking for the characters first spares most rows the walk through their values.
        escaped = text.find("\\", start, end) >= 0
        escaped = escaped and (text.find("\\ud", start, end) >= 0 or text.find("\\uD", start, end) >= 0)
        if escaped and SURROGATE.search(json.dumps(value, ensure_ascii=False)):
            problems.append("an escape \\ud800 to \\udfff occurs without its other half; remove it")
        if text.find("null", start, end) >= 0:
            value = without_nulls(value)
        return value, end, problems[0] if problems else None

    return decode


def without_nulls(value: object) -> object:
    """Return a value whose objects, at any depth, have no key that is null; lists keep theirs."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def explain(error: Exception) -> str:
    """Explain an error of the JSON decoder in the words of an error line."""
    if isinstance(error, RecursionError):
        return "invalid JSON: nested too deeply; write a flat object"
    if isinstance(error, json.JSONDecodeError):
        problem = error.msg.removesuffix(" at")
        return f"invalid JSON: {problem} at column {error.colno}; one JSON object per row is expected"
    return str(error)
