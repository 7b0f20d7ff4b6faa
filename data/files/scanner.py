"""Decode JSON values one after the other from a stream, holding little more than one of them."""

from __future__ import annotations

import io
import json
from json.decoder import WHITESPACE  # type: ignore[attr-defined]  # typeshed leaves it out

from data.files.strict_json import strict_decoder
from data.files.utf8 import decode_utf8

CHUNK = 2**18
"""Bytes that are read at least at a time."""
NEAR_END = 64
"""An error so many characters before the end of the buffer may only mean that more is needed."""


class Scanner:
    """Decode JSON values from a stream, and know the line of each."""

    def __init__(self, handle: io.BufferedReader, offset: int):
        """Start at the beginning of a stream.

        Args:
            handle: The stream.
            offset: The bytes of the file before it, a byte order mark.
        """
        self._handle, self._offset = handle, offset
        self._decode = strict_decoder()
        self._text = ""  # what has been read and not dropped
        self._here = 0  # the position in `_text` up to which it is decoded
        self._pending = b""  # the first bytes of a character that is not read whole
        self._ended = False
        self._line = 1  # of the position `_counted`, which never goes back
        self._counted = 0
        self._column = 0  # characters of the current line that were dropped
        self.bad_line: int | None = None  # where bytes are not a text
        self.place = ""  # ": index I" while elements of a list are read
        self.last_line = 1  # of the last character that was taken

    def peek(self) -> str:
        """Skip white space and return the next character, "" at the end."""
        while True:
            self._here = WHITESPACE.match(self._text, self._here).end()
            if self._here < len(self._text) or self._ended:
                return self._text[self._here : self._here + 1]
            self._more()

    def take(self) -> str:
        """Skip white space, take the next character and return it, "" at the end."""
        sign = self.peek()
        self._here += len(sign)
        if sign:
            self.last_line = self._line_at(self._here)
        return sign

    def opens_objects(self) -> bool:
        """Return whether a list of objects comes next."""
        if self.peek() != "[":
            return False
        position = self._here + 1
        while True:
            position = WHITESPACE.match(self._text, position).end()
            if position < len(self._text) or self._ended:
                return self._text[position : position + 1] == "{"
            position -= self._here
            self._more()

    def value(self) -> tuple[object, str | None]:
        """Decode the next value.

        Returns:
            (value, problem or None), the problem as of `strict_decoder`.

        Raises:
            json.JSONDecodeError, RecursionError: As of `json`, with the line and the column in the
                file.
        """
        self.peek()
        while True:
            try:
                value, end, problem = self._decode(self._text, self._here)
                # A number at the end may go on, and of "1.5", "1." or "1e-" is read as 1.
                if end + 2 < len(self._text) or self._ended:
                    self._here = end
                    self.last_line = self._line_at(end)
                    return value, problem
            except json.JSONDecodeError as error:
                near = error.pos > len(self._text) - NEAR_END or "Unterminated" in error.msg
                if self._ended or not near:
                    raise self._placed(error) from None
            self._more()

    def line(self) -> int:
        """Return the line of the next character, at the end that of the last one."""
        return self._line_at(self._here) if self.peek() else self.last_line

    def is_cut(self, error: json.JSONDecodeError) -> bool:
        """Return whether an error of `value` says that the text ends too early."""
        return self._ended and (error.pos >= len(self._text.rstrip()) or "Unterminated" in error.msg)

    def _placed(self, error: json.JSONDecodeError) -> json.JSONDecodeError:
        """Return an error whose line and column are those in the file."""
        if self._ended:
            error.pos = min(error.pos, max(len(self._text.rstrip()), self._here))
        if self._ended and self._here == len(self._text):
            error.lineno = self.last_line
            return error
        before = self._text.rfind("\n", 0, error.pos)
        error.lineno = self._line_at(error.pos)
        error.colno = error.pos - before + (self._column if before < 0 else 0)
        return error

    def _line_at(self, position: int) -> int:
        """Return the line of a position at or after the last one that was asked for."""
        if position < self._counted:
            return self._line
        self._line += self._text.count("\n", self._counted, position)
        self._counted = position
        return self._line

    def _more(self) -> None:
        """Drop what is decoded and read on; each time more, so that a long value costs no square.

        Raises:
            ValueError: The bytes are no UTF-8, or NUL; `bad_line` is their line.
        """
        self._line_at(self._here)
        newline = self._text.rfind("\n", 0, self._here)
        self._column = self._here - newline - 1 if newline >= 0 else self._column + self._here
        self._text, self._here, self._counted = self._text[self._here :], 0, 0
        content = self._handle.read(max(CHUNK, len(self._text)))
        self._ended = not content
        raw = self._pending + content
        whole = len(raw) if self._ended else whole_characters(raw)
        try:
            text = decode_utf8(raw[:whole], self._offset)
        except ValueError:
            self.bad_line = self._line + self._text.count("\n") + raw[: first_bad(raw)].count(b"\n")
            raise
        self._offset, self._pending = self._offset + whole, raw[whole:]
        self._text += text


def whole_characters(raw: bytes) -> int:
    """Return how many bytes come before a character of UTF-8 that is cut off at the end."""
    for back in range(1, min(4, len(raw) + 1)):
        byte = raw[-back]
        if byte >= 0xC0:  # the first byte of a character: of 2 bytes from 0xC0, 3 from 0xE0, 4 from 0xF0 on
            size = 2 + (byte >= 0xE0) + (byte >= 0xF0)
            return len(raw) - back if size > back else len(raw)
        if byte < 0x80:
            break
    return len(raw)


def first_bad(raw: bytes) -> int:
    """Return the position of the first byte that is not UTF-8, or else of the first NUL."""
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return raw.index(0)
