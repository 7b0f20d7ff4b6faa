"""Read the rows of JSONL or of a JSON document strictly, with file and line of every error."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Generator
from json.decoder import WHITESPACE  # type: ignore[attr-defined]  # typeshed leaves it out

from data.files.json_document import WRAPPERS, array_rows, object_rows, rows_of_object
from data.files.raw import HEAD, head_of
from data.files.reading import Reading
from data.files.scanner import Scanner
from data.files.strict_json import explain, strict_decoder
from data.files.utf8 import decode_utf8, skip_mark

SIMPLE = r'\s*"[^"\\]*"\s*:\s*'
WRAPPED = re.compile(
    rf'\{{({SIMPLE}("[^"\\]*"|[-+.\w]+)\s*,)*\s*"({"|".join(sorted(WRAPPERS - {"instances"}))})"\s*:\s*\[\s*\{{',
    re.ASCII,
)
"""How an object with a list of rows begins. A row of self-instruct has `instances`, too."""


def json_rows(name: str, handle: io.BufferedReader, reading: Reading) -> Generator[tuple[str, object]]:
    """Read JSON row by row: an array, an object that holds the rows, or otherwise JSONL.

    Blank lines are skipped and counted, a byte order mark is skipped. A key whose value is null
    counts as missing.

    Args:
        name: The path, for locations.
        handle: The open file.
        reading: Gets an error line for an empty or cut-off file, text that is not UTF-8, NUL bytes,
            a key that occurs twice in an object, NaN, and half a surrogate pair.

    Yields:
        (location, value): the location is "FILE:LINE", in an array "FILE:LINE: index I" (from 0).
    """
    try:
        offset = skip_mark(handle)
    except ValueError as error:
        reading.errors.append(f"{name}:1: {error}")
        return
    head = head_of(handle)
    first = head.lstrip()[:1]
    if first == b"[":
        yield from array_rows(name, Scanner(handle, offset), reading)
    elif first == b"{" and begins_document(head):
        yield from object_rows(name, Scanner(handle, offset), reading)
    else:
        yield from line_rows(name, handle, offset, reading)


def begins_document(head: bytes) -> bool:
    """Return whether a file that begins with "{" is one object over many lines, or wraps its rows.

    Args:
        head: The first bytes of the file.
    """
    text = head.decode("utf-8", errors="replace").lstrip()
    line, newline, _ = text.partition("\n")
    line = line.rstrip()
    if not newline:  # too long to see its end, so that what it begins with has to do
        return len(head) == HEAD and WRAPPED.match(text) is not None
    try:
        json.JSONDecoder().raw_decode(line)
    except json.JSONDecodeError as error:
        # More may come after the line's end, but no string goes on there.
        return error.pos >= len(line) and "Unterminated" not in error.msg
    except RecursionError:
        return False
    return False


def line_rows(name: str, handle: io.BufferedReader, offset: int, reading: Reading) -> Generator[tuple[str, object]]:
    """Yield the rows of JSONL.

    Args:
        name: The path, for locations.
        handle: The open file.
        offset: The bytes before it, a byte order mark.
        reading: As of `json_rows`.
    """
    decode, line = strict_decoder(), 0
    only: tuple[str, object] | None = None  # the first row: if no second comes, it may hold rows
    rows = 0
    for line, raw in enumerate(handle, 1):
        start, offset = offset, offset + len(raw)
        if raw.isspace():
            reading.blanks += 1
            continue
        rows += 1
        if only is not None:
            yield only
            only = None
        try:
            text = decode_utf8(raw, start).rstrip()
            value, end, problem = decode(text, WHITESPACE.match(text).end())
            if end < len(text):
                problem = f"invalid JSON: more text after column {end}; write one JSON object a line"
        except (ValueError, RecursionError) as error:
            problem = explain(error)
            if raw.startswith(b"{") and not raw.endswith((b"\n", b"}")):
                problem = f"the last line is cut off ({problem.partition(';')[0]}); write the file again"
        if problem:
            reading.errors.append(f"{name}:{line}: {problem}")
        elif rows == 1:
            only = f"{name}:{line}", value
        else:
            yield f"{name}:{line}", value
    if only is not None:
        yield from rows_of_object(name, *only, reading)
    if line == reading.blanks:
        problem = "only blank lines" if line else "the file is empty"
        reading.errors.append(f"{name}: {problem}; expected one JSON object a line, or one JSON array")
