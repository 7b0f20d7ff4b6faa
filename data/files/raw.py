"""Open a file: hash its bytes as they are read, unpack it, and say what its first bytes are."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

HEAD = 2**16
"""Bytes of a file from which its format is decided, and that are read at a time."""
UTF8_BOM = b"\xef\xbb\xbf"
PACKED_SUFFIXES = (".gz", ".xz", ".bz2", ".zst")

Opener = Callable[[Any], Any]
"""Opens a stream of packed bytes as a stream of unpacked ones."""


class UnpackError(Exception):
    """Report a compressed file that is damaged or cut off."""


class HashedFile(io.RawIOBase):
    """Hash a file while it is read, so that the bytes hashed are the bytes read."""

    def __init__(self, path: str | Path):
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by `close`)
        self._digest = hashlib.sha256()

    def readable(self) -> bool:
        """Say that the file can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read bytes into a buffer, hash them, and return how many they were."""
        count = self.file.readinto(buffer) or 0
        self._digest.update(memoryview(buffer)[:count])
        return count

    def digest_of_all(self) -> str:
        """Read to the end and return the SHA-256 of the whole file."""
        chunk = bytearray(2**20)
        while self.readinto(chunk):
            pass
        return self._digest.hexdigest()

    def state(self) -> tuple[int, int, int]:
        """Return what changes when somebody writes into the open file: size, mtime and ctime."""
        stat = os.fstat(self.file.fileno())
        return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns

    def share(self) -> float:
        """Return the share of the file's bytes that has been read, from 0 to 1."""
        return min(1.0, self.file.tell() / max(1, self.state()[0]))

    def close(self) -> None:
        """Close the file."""
        if hasattr(self, "file"):  # Python also closes what could not be opened
            self.file.close()
        super().close()


class Unpacked(io.RawIOBase):
    """Unpack a stream, with one kind of error whatever the library."""

    def __init__(self, packed: Any, method: str, opener: Opener):
        self._stream, self._method = opener(packed), method

    def readable(self) -> bool:
        """Say that the stream can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer with unpacked bytes as far as there are any; return how many they were.

        Raises:
            UnpackError: The packed bytes are damaged, or end too early.
        """
        view, filled = memoryview(buffer), 0
        while filled < len(view):
            try:
                content = self._stream.read(len(view) - filled)
            except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
                reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
                raise UnpackError(f"cannot be unpacked ({self._method}: {reason})") from error
            if not content:
                break
            view[filled : filled + len(content)] = content
            filled += len(content)
        return filled


class KeptOpen(io.RawIOBase):
    """Read from a stream that is not closed with this one: pyarrow closes what it has read."""

    def __init__(self, stream: Any):
        self._stream = stream

    def readable(self) -> bool:
        """Say that the stream can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read bytes into a buffer and return how many they were."""
        return self._stream.readinto(buffer)


def open_zstd(packed: Any) -> Any:
    """Open a zstd stream with the decompressor that pyarrow brings."""
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(KeptOpen(packed), mode="r"), "zstd")


PACKED: dict[str, tuple[re.Pattern[bytes], Opener]] = {
    "gzip": (re.compile(rb"\x1f\x8b"), lambda packed: gzip.GzipFile(fileobj=packed)),
    "xz": (re.compile(rb"\xfd7zXZ\0"), lzma.LZMAFile),
    "bzip2": (re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), bz2.BZ2File),
    # the second kind of frame holds a comment, which `pzstd` writes first
    "zstd": (re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"), open_zstd),
}
"""Method → the first bytes of its files, and what opens them."""

FOREIGN: tuple[tuple[re.Pattern[bytes], str], ...] = (
    (re.compile(rb"PK\x03\x04"), "a zip archive, or an Excel workbook; unpack it, or save the sheet as .csv"),
    (re.compile(rb"(?s).{257}ustar"), "a tar archive; unpack it and give the folder"),
    (re.compile(rb"7z\xbc\xaf\x27\x1c|Rar!"), "an archive; unpack it first"),
    (re.compile(rb"\x04\x22\x4d\x18"), "compressed with lz4; unpack it first"),
    (re.compile(rb"PARE"), "encrypted parquet; write it without encryption"),
    (re.compile(rb"SQLite format 3"), "an SQLite database; write its table as .jsonl or .csv"),
    (re.compile(rb"%PDF-"), "a PDF; give its text as .txt"),
    (re.compile(rb"\xd0\xcf\x11\xe0"), "an Excel workbook; save the sheet as .csv"),
    (re.compile(rb"\x80[\x02-\x05]"), "a Python pickle, which could run code; write it as .jsonl or .parquet"),
    (re.compile(rb"version https://git-lfs"), "a Git LFS pointer, not the data; run `git lfs pull`"),
)
"""First bytes of files that hold no rows → what they are and what to do."""
WEB_PAGE = re.compile(rb"(?i)\s*<(!doctype html|html)")


def buffered(raw: io.RawIOBase) -> io.BufferedReader:
    """Return a buffered stream, whose `head_of` is `HEAD` bytes long if the stream is."""
    return io.BufferedReader(raw, HEAD)


def head_of(handle: io.BufferedReader) -> bytes:
    """Return the first bytes of a stream that is at its beginning; the stream stays there."""
    return handle.peek(HEAD)[:HEAD]


def packing_of(head: bytes) -> str | None:
    """Return the method of compression that the first bytes show; None for none."""
    return next((method for method, (magic, _) in PACKED.items() if magic.match(head)), None)


def unpack(handle: io.BufferedReader, method: str) -> io.BufferedReader:
    """Return the unpacked bytes of a stream.

    Args:
        handle: The packed stream.
        method: A key of `PACKED`.
    """
    return buffered(Unpacked(handle, method, PACKED[method][1]))


def foreign_kind(head: bytes, is_document: bool) -> str | None:
    """Return what a file is that holds no rows, and what to do; None for any other.

    Args:
        head: Its first bytes.
        is_document: Whether its text is read as it stands, so that it may be a web page.
    """
    if WEB_PAGE.match(head) and not is_document:
        return "a web page, not the data; download the file itself"
    return next((what for magic, what in FOREIGN if magic.match(head)), None)


def without_packed_suffix(name: str) -> str:
    """Return a file's name without .gz, .xz, .bz2 or .zst."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in PACKED_SUFFIXES else name


def seekable(handle: io.BufferedReader) -> BinaryIO:
    """Copy a stream into a file without a name, for formats that are read from their end."""
    import shutil
    import tempfile

    copy: Any = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    shutil.copyfileobj(handle, copy, 2**20)
    copy.seek(0)
    return copy
