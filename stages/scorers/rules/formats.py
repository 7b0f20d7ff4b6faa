"""Check the form of a text: a regular expression, JSON, a code block, tags."""

import json
import re
from typing import Any

FENCE = "```"


def matches(pattern: re.Pattern, text: str, whole: bool) -> bool:
    """Return whether a regular expression is found in a text, or matches all of it."""
    return (pattern.fullmatch(text) if whole else pattern.search(text)) is not None


def json_value(text: str) -> Any:
    """Return what a text says that is JSON and nothing else, in a code block or not.

    Raises:
        ValueError: It is not JSON.
    """
    inner = text.strip()
    for fence in (f"{FENCE}json", f"{FENCE}Json", f"{FENCE}JSON", FENCE):
        inner = inner.removeprefix(fence)
    inner = inner.removesuffix(FENCE)
    return json.loads(inner.strip(), parse_constant=refuse_constant)


def refuse_constant(name: str) -> None:
    """Refuse NaN and Infinity, which are not JSON.

    Raises:
        ValueError: Always.
    """
    raise ValueError(f"{name} is not JSON")


def is_json(text: str) -> bool:
    """Return whether a text is JSON and nothing else, in a code block or not."""
    try:
        json_value(text)
    except (ValueError, RecursionError):
        return False
    return True


def has_code_block(text: str, language: str | None, only: bool) -> bool:
    """Return whether a text has a closed code block that is not empty.

    Args:
        text: The text.
        language: The language that the block has to name; None: any, or none.
        only: Whether nothing may stand beside one block.
    """
    blocks = list(re.finditer(r"^```([^\n`]*)\n(.*?)^```[ \t]*$", text, flags=re.MULTILINE | re.DOTALL))
    named = [block for block in blocks if language is None or block.group(1).strip().lower() == language.lower()]
    filled = [block for block in named if block.group(2).strip()]
    if not only:
        return bool(filled)
    return len(blocks) == 1 and len(filled) == 1 and text.strip() == blocks[0].group().strip()


def tag_parts(text: str, tags: list[str], outside: bool) -> tuple[bool, dict[str, bool]]:
    """Return whether a text has each tag once, closed and in order, and this of each tag alone.

    Args:
        text: The text.
        tags: The tags, as "think".
        outside: Whether text may stand outside of the tags.
    """
    alone = {tag: text.count(f"<{tag}>") == text.count(f"</{tag}>") == 1 for tag in tags}
    between = ".*?" if outside else r"\s*"
    inner = between.join(f"<{re.escape(tag)}>.*?</{re.escape(tag)}>" for tag in tags)
    in_order = re.fullmatch(f"{between}{inner}{between}", text, flags=re.DOTALL) is not None
    return in_order and all(alone.values()), alone
