"""Remember digests of files from one command to the next, in a file beside the artifacts.

The memory only saves time. One that is missing, unreadable, damaged or of another version counts as
empty, one that cannot be written stays as it is, and of two processes that write at once one may
lose its entries: the files are then read again.
"""

import json
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import UserError
from pipeline.store import integrity

NAME = ".digests.json"
"""The file, in the folder of all experiments."""
MOST_REMEMBERED = 20_000
"""Files that are remembered at most, the latest."""


class Identity(NamedTuple):
    """Hold what changes whenever a file is written or replaced."""

    device: int
    inode: int
    size: int
    """Bytes."""
    mtime: int
    """Nanoseconds."""
    ctime: int
    """Nanoseconds. Unlike the mtime, no program can set it."""


class FileFacts(NamedTuple):
    """Hold what a file contains."""

    sha256: str
    rows: int | None
    """Non-empty lines of JSONL; None for other files."""


class Entry(NamedTuple):
    """Hold what is remembered of a file."""

    identity: Identity
    facts: FileFacts


Entries = dict[str, Entry]
"""What is remembered, by file: see `name_of`."""


def identity(file: Path) -> Identity:
    """Return the identity of a file, or of the one that a link names.

    Raises:
        OSError: it cannot be opened.
    """
    # opening makes NFS ask its server, where a plain stat may answer from a cache
    handle = os.open(file, os.O_RDONLY)
    try:
        stat = os.fstat(handle)
    finally:
        os.close(handle)
    return Identity(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def name_of(path: str, memory: Path) -> str:
    """Return the name of a file in the memory: relative below its folder, so that both can move.

    Args:
        path: an absolute path.
        memory: the file that remembers.
    """
    base = os.path.abspath(memory.parent) + os.sep
    return path.removeprefix(base)


def load(memory: Path) -> Entries:
    """Return what is remembered; nothing if the file is missing, or is not what `add` writes."""
    with suppress(OSError, UserError, ValueError, TypeError, AttributeError):
        listed = integrity.parse_sealed(memory.read_bytes(), str(memory))["files"]
        return {name: _parse(numbers, facts) for name, (numbers, facts) in listed.items()}
    return {}


def _parse(numbers: list[int], facts: list) -> Entry:
    """Return an entry that was read from JSON; raise TypeError or ValueError if it is none."""
    sha256, rows = facts
    if not isinstance(sha256, str) or not (rows is None or type(rows) is int):
        raise ValueError("no digest and row count")
    return Entry(Identity(*map(int, numbers)), FileFacts(sha256, rows))


def add(memory: Path, new: Entries) -> None:
    """Write entries to the memory, beside those that are there, if its folder can be written.

    Args:
        memory: the file.
        new: the entries.
    """
    known = load(memory)
    if all(known.get(name) == entry for name, entry in new.items()):
        return
    entries = {name: entry for name, entry in known.items() if name not in new} | new
    latest = dict(list(entries.items())[-MOST_REMEMBERED:])
    # Several processes may write at once, and of several machines: each to a file of its own. It is
    # not forced to disk, since a power cut can only empty the memory.
    staged = memory.with_name(f"{memory.name}.{socket.gethostname()}-{os.getpid()}")
    with suppress(OSError, UnicodeError):
        try:
            staged.write_text(json.dumps(integrity.seal({"files": latest}), ensure_ascii=False), encoding="utf-8")
            os.replace(staged, memory)
        finally:
            with suppress(OSError):
                staged.unlink(missing_ok=True)
