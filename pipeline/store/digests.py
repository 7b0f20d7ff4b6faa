"""Compute digests of data files and model folders, again only after they have changed."""

import errno
import glob
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import UserError
from pipeline.store import integrity

TIMESTAMP_STEP = 2.0  # seconds: a file system may give two writes that are closer than this the same timestamp


class Facts(NamedTuple):
    """Hold the digest and the row count of a file, a folder or the files that a glob matches."""

    sha256: str
    """Digest of the file, or of the names and digests of the files."""
    rows: int | None
    """Non-empty lines, if all files are JSONL; None for anything else."""
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
        """Return the current facts about a file, a folder or a glob.

        Raises:
            UserError: it cannot be read, matches nothing, or changed while it was being read.
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
    """Return what changes whenever a file, or one of a folder or glob, is written or replaced.

    Returns:
        A tuple (name, device, inode, bytes, mtime, ctime) per file, times in nanoseconds. A change
        shows even
        if the old contents and mtime are restored afterwards: programs cannot set the ctime.
    """
    entries = []
    for name, file in files_at(path).items():
        # opening makes NFS ask its server, where a plain stat may answer from a cache
        handle = os.open(file, os.O_RDONLY)
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


def is_glob(path: Path) -> bool:
    """Return whether a path is a glob and not the name of a file."""
    return glob.has_magic(str(path)) and not path.exists()


def files_at(path: Path) -> dict[str, Path]:
    """Return the files that a path stands for, by name.

    `data/files/paths.py` must find the same ones.

    Args:
        path: a file, whose name is then empty; or a folder or glob: all files but hidden ones, with
            names relative to the folder, for a glob to the folder before its first wildcard.

    Raises:
        FileNotFoundError: a glob matches no file.
    """
    if path.is_dir():
        return {name: path / name for name in list_visible_files(path)}
    if not is_glob(path):
        return {"": path}
    fixed = Path()
    for part in path.parts:
        if glob.has_magic(part):
            break
        fixed /= part
    found = {str(Path(match).relative_to(fixed)): Path(match) for match in glob.glob(str(path), recursive=True)}
    files = {
        name: file
        for name, file in sorted(found.items())
        if file.is_file() and not any(part.startswith(".") for part in Path(name).parts)
    }
    if not files:
        raise FileNotFoundError(errno.ENOENT, "no file matches", str(path))
    return files


def compute_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, or of the names and digests of a folder's or glob's files."""
    if path.is_dir() or is_glob(path):
        return integrity.sha256_json({name: integrity.sha256_file(file) for name, file in files_at(path).items()})
    return integrity.sha256_file(path)


def count_rows(path: Path) -> int | None:
    """Count the non-empty lines of JSONL; return None for other files.

    Compressed files count as others: unpacking one a second time takes longer than it is worth.
    """
    files = list(files_at(path).values())
    if any(file.suffix != ".jsonl" or not file.is_file() for file in files):
        return None
    rows = 0
    for file in files:
        with open(file, "rb") as lines:
            rows += sum(1 for line in lines if line.strip())
    return rows


def code_sha256(folder: Path) -> str:
    """Return the SHA-256 of the names and digests of the Python files below a folder."""
    return integrity.sha256_json(
        {str(path.relative_to(folder)): integrity.sha256_file(path) for path in sorted(folder.rglob("*.py"))}
    )
