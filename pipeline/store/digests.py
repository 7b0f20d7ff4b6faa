"""Compute digests of data files and model folders, again only after they have changed."""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import UserError
from pipeline.store import integrity

TIMESTAMP_STEP = 2.0  # seconds: a file system may give two writes that are closer than this the same timestamp


class Facts(NamedTuple):
    """Hold the digest and the row count of a file or folder."""

    sha256: str
    """Digest of the file, or of the folder's file names and digests."""
    rows: int | None
    """Non-empty lines of a JSONL file; None for anything else."""
    signature: tuple
    """See `signature`."""


@dataclass
class Digests:
    """The facts that this command has computed, by path.

    A command asks for the same digests many times. A file is read again only if its signature has
    changed, or if it was so new at the first reading that a later change might not show in the
    signature.
    """

    _known: dict[Path, tuple[Facts, bool]] = field(default_factory=dict)
    """The facts of a path, and whether its signature is certain to show a later change."""

    def facts(self, path: Path) -> Facts:
        """Return the current facts about a file or folder.

        Raises:
            UserError: it cannot be read, or it changed while it was being read.
        """
        try:
            before = signature(path)
            if path in self._known:
                facts, shows_changes = self._known[path]
                if shows_changes and facts.signature == before:
                    return facts
            began = time.time_ns()
            facts = Facts(compute_sha256(path), count_rows(path), before)
            if signature(path) != before:
                raise UserError(f"{path}: is being written; run again when that is done")
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); should be a file or folder") from None
        newest = max((changed for *_, changed in before), default=0)
        self._known[path] = facts, newest < began - TIMESTAMP_STEP * 1e9
        return facts


def signature(path: Path) -> tuple:
    """Return what changes whenever a file, or a file in a folder, is written or replaced.

    Returns:
        A tuple (name, device, inode, bytes, mtime, ctime) per file, times in nanoseconds. A change
        shows even
        if the old contents and mtime are restored afterwards: programs cannot set the ctime.
    """
    entries = []
    for name in list_visible_files(path) if path.is_dir() else [""]:
        # opening makes NFS ask its server, where a plain stat may answer from a cache
        handle = os.open(path / name if name else path, os.O_RDONLY)
        try:
            stat = os.fstat(handle)
        finally:
            os.close(handle)
        entries.append((name, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    return tuple(entries)


def list_visible_files(folder: Path) -> list[str]:
    """List the files below `folder` as relative paths, without hidden ones (caches, .git)."""
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    return [name for name in names if not any(part.startswith(".") for part in Path(name).parts)]


def compute_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, or one of the names and digests of a folder's files."""
    if path.is_dir():
        return integrity.sha256_json({name: integrity.sha256_file(path / name) for name in list_visible_files(path)})
    return integrity.sha256_file(path)


def count_rows(path: Path) -> int | None:
    """Count the non-empty lines of a JSONL file; return None for other files."""
    if path.suffix != ".jsonl" or not path.is_file():
        return None
    with open(path, "rb") as file:
        return sum(1 for line in file if line.strip())
