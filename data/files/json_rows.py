"""Read the rows of a JSONL file or a JSON array strictly, with file and line of every error."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from json.decoder import WHITESPACE  # type: ignore[attr-defined]  # typeshed leaves it out
from pathlib import Path
from typing import Any

UTF8_BOM = b"\xef\xbb\xbf"
SURROGATE = re.compile("[\ud800-\udfff]")
"""Half a surrogate pair: no UTF-8 file and no tokenizer can hold it."""


@dataclass
class Reading:
    """Collect what reading a file finds besides its rows."""

    errors: list[str] = field(default_factory=list)
    """Lines "FILE:LINE: what is wrong; what to do"."""
    blanks: int = 0
    """Blank lines that were skipped."""
    hashes: bool = False
    """Whether to compute `sha256`."""
    sha256: str | None = None
    """The digest of the whole file, known after reading has ended."""


class HashedFile(io.RawIOBase):
    """Hash a file while it is read, so that the bytes hashed are the bytes read."""

    def __init__(self, path: str | Path):
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by `close`)
        self._digest = hashlib.sha256()

    def readable(self) -> bool:
        """Say that the file can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read bytes into a buffer, hash them, and return how many they were."""
        count = self._file.readinto(buffer) or 0
        self._digest.update(memoryview(buffer)[:count])
        return count

    def digest_of_all(self) -> str:
        """Read to the end and return the SHA-256 of the whole file."""
        chunk = bytearray(2**20)
        while self.readinto(chunk):
            pass
        return self._digest.hexdigest()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def read_rows(path: str | Path, reading: Reading) -> Generator[tuple[str, object]]:
    """Read a file row by row: a JSON array if it begins with "[", otherwise JSONL.

    Blank lines are skipped and counted, a byte order mark is skipped.

    Args:
        path: The file.
        reading: Gets an error line for a missing, empty or cut-off file, text that is not UTF-8,
            NUL bytes, a key that occurs twice in an object, NaN, and half a surrogate pair.

    Yields:
        (location, value): the location is "FILE:LINE", in an array "FILE:LINE: index I" (from 0).
    """
    try:
        raw = HashedFile(path)
    except OSError as error:
        reading.errors.append(f"{path}: cannot be read: {error.strerror}; give the path of a file")
        return
    handle = io.BufferedReader(raw, 2**16)
    try:
        yield from _rows_of(path, handle, reading)
    finally:  # also where the caller stops early: the digest is that of the whole file
        if reading.hashes:
            reading.sha256 = raw.digest_of_all()
        handle.close()


def _rows_of(
    path: str | Path, handle: io.BufferedReader[HashedFile], reading: Reading
) -> Generator[tuple[str, object]]:
    """Yield the rows of an open file after a check of its first bytes.

    Args:
        path: Its path, for locations.
        handle: The open file.
        reading: As of `read_rows`.
    """
    head = handle.peek(4096)[:4096]
    text = head.removeprefix(UTF8_BOM)
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        reading.errors.append(f"{path}:1: UTF-16 from byte offset 0 on; save the file as UTF-8")
    elif b"\0" in head[:2]:
        problem = f"NUL bytes from byte offset {head.index(0)} on (damaged, or UTF-16)"
        reading.errors.append(f"{path}:1: {problem}; save the file again as UTF-8")
    elif head.startswith(b"\x1f\x8b"):
        reading.errors.append(f"{path}: compressed (gzip); unpack it first")
    else:
        offset = len(handle.read(len(head) - len(text)))
        if text.lstrip().startswith(b"["):
            yield from _array_rows(path, handle, offset, reading)
        else:
            yield from _line_rows(path, handle, offset, reading)


def _line_rows(
    path: str | Path, handle: io.BufferedReader[HashedFile], offset: int, reading: Reading
) -> Generator[tuple[str, object]]:
    """Yield the rows of JSONL.

    Args:
        path: The path, for locations.
        handle: The open file.
        offset: The bytes before it, a byte order mark.
        reading: As of `read_rows`.
    """
    decode, line = strict_decoder(), 0
    for line, raw in enumerate(handle, 1):
        start, offset = offset, offset + len(raw)
        if not raw.strip():
            reading.blanks += 1
            continue
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
            reading.errors.append(f"{path}:{line}: {problem}")
        else:
            yield f"{path}:{line}", value
    if line == reading.blanks:
        problem = "only blank lines" if line else "the file is empty"
        reading.errors.append(f"{path}: {problem}; expected one JSON object a line, or one JSON array")


def _array_rows(
    path: str | Path, handle: io.BufferedReader[HashedFile], offset: int, reading: Reading
) -> Generator[tuple[str, object]]:
    """Yield the rows of a JSON array, decoded one by one for the line and index of each error.

    Args:
        path: The path, for locations.
        handle: The open file.
        offset: The bytes before it, a byte order mark.
        reading: As of `read_rows`.
    """
    decode = strict_decoder()
    lines: list[str] = []
    text, line, location = "", 1, ""
    try:
        for raw in handle:
            line = len(lines) + 1
            lines.append(decode_utf8(raw, offset))
            offset += len(raw)
        text = "".join(lines).rstrip()
        line, counted, index, sign = 1, 0, -1, ","  # `line` is that of the character `counted`
        here = WHITESPACE.match(text, text.index("[") + 1).end()
        if text[here:] == "]":
            raise ValueError("the array is empty; add at least one row")
        while sign == ",":
            line, counted, index = line + text.count("\n", counted, here), here, index + 1
            location = f": index {index}"
            value, end, problem = decode(text, here)
            if problem:
                reading.errors.append(f"{path}:{line}{location}: {problem}")
            else:
                yield f"{path}:{line}{location}", value
            end = WHITESPACE.match(text, end).end()
            sign, here = text[end : end + 1], WHITESPACE.match(text, end + 1).end()
        line += text.count("\n", counted, end)
        if sign != "]":
            problem = f"{sign!r} after the row" if sign else "the file is cut off after this row"
            raise ValueError(f"invalid JSON: {problem}; expected ',' or ']'")
        if here < len(text):
            raise ValueError("text after the array; expected one array, or one JSON object a line")
    except (ValueError, RecursionError) as error:
        problem = explain(error)
        if isinstance(error, json.JSONDecodeError):
            line = error.lineno
            if error.pos >= len(text) or "Unterminated" in error.msg:
                problem = f"the file is cut off ({problem.partition(';')[0]}); write it again"
        reading.errors.append(f"{path}:{line}{location}: {problem}")


def strict_decoder() -> Callable[[str, int], tuple[object, int, str | None]]:
    """Return a JSON decoder that also finds what Python lets pass but JSON forbids.

    Returns:
        A function (text, start) → (value, end, problem or None).
    """
    problems: list[str] = []

    def unique(members: list[tuple[str, object]]) -> dict:
        keys = [key for key, _ in members]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            problems.append(f"the key {twice!r} occurs twice in one object; keep one of them")
        return dict(members)

    def finite(number: str) -> float:
        if not math.isfinite(float(number)):
            problems.append(f"{number} is not a JSON number; use a finite number or null")
        return float(number)

    decoder = json.JSONDecoder(object_pairs_hook=unique, parse_float=finite, parse_constant=finite)

    def decode(text: str, start: int) -> tuple[object, int, str | None]:
        problems.clear()
        value, end = decoder.raw_decode(text, start)
        if "\\ud" in text[start:end].lower() and SURROGATE.search(json.dumps(value, ensure_ascii=False)):
            problems.append("an escape \\ud800 to \\udfff occurs without its other half; remove it")
        return value, end, problems[0] if problems else None

    return decode


def decode_utf8(raw: bytes, start: int) -> str:
    """Decode bytes as UTF-8 without NUL.

    Args:
        raw: The bytes.
        start: Their offset in the file.

    Raises:
        ValueError: With the offset of the first bad byte.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = f"byte 0x{raw[error.start]:02x} at byte offset {start + error.start}"
        raise ValueError(f"not UTF-8: {bad}; save the file as UTF-8") from None
    if "\0" in text:
        bad = f"a NUL byte at byte offset {start + raw.index(0)} (damaged, or UTF-16)"
        raise ValueError(f"{bad}; save the file again as UTF-8")
    return text


def explain(error: Exception) -> str:
    """Explain an error of the JSON decoder in the words of an error line."""
    if isinstance(error, RecursionError):
        return "invalid JSON: nested too deeply; write a flat object"
    if isinstance(error, json.JSONDecodeError):
        problem = error.msg.removesuffix(" at")
        return f"invalid JSON: {problem} at column {error.colno}; one JSON object per row is expected"
    return str(error)
