"""Read a text file as one document."""

import io
import json
from collections.abc import Generator

from data.files.reading import Reading
from data.files.utf8 import decode_utf8, skip_mark


def text_rows(name: str, handle: io.BufferedReader, reading: Reading) -> Generator[tuple[str, dict[str, str]]]:
    """Read a text or Markdown file as one row {"text": …}; ends of lines become "\\n".

    Args:
        name: The path, for locations.
        handle: The open file.
        reading: Gets an error line for an empty file, for JSON, and for bytes that are not a text.

    Yields:
        ("FILE:1", row).
    """
    lines: list[str] = []
    try:
        offset = skip_mark(handle)
        for raw in handle:
            lines.append(decode_utf8(raw, offset))
            offset += len(raw)
    except ValueError as error:
        reading.errors.append(f"{name}:{len(lines) + 1}: {error}")
        return
    text = "".join(lines).replace("\r\n", "\n")
    if not text.strip():
        problem = "only blank lines" if text else "the file is empty"
        reading.errors.append(f"{name}: {problem}; a text file is one document")
    elif holds_json(text):
        reading.errors.append(f"{name}:1: holds JSON; rename the file to .jsonl or .json")
    else:
        yield f"{name}:1", {"text": text}


def holds_json(text: str) -> bool:
    """Return whether a text is JSONL or a JSON document, by its first line or as a whole."""
    text = text.strip()
    if text[0] not in "{[":
        return False
    for part in (text.partition("\n")[0], text):
        try:
            value = json.loads(part)
        except (ValueError, RecursionError):
            continue
        # A line "[1]" is a reference in a text.
        if isinstance(value, dict) or (value and isinstance(value[0], dict)):
            return True
    return False
