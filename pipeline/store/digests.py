"""Digests of files and folders from outside, taken once for as long as nobody touches them."""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import UserError
from pipeline.store import files

SETTLED = 2.0  # seconds: a file system may give two writes within so little time the same timestamp


class Facts(NamedTuple):
    """What is known of a file or folder. rows: lines of a JSONL file; None of others."""

    sha256: str
    rows: int | None
    signature: tuple  # see `signature`


@dataclass
class Digests:
    """What files and folders hold, by their paths. A command asks again and again: they are read again only where
    their signature has changed since, or where they were so new then that a change need not show in it."""

    _known: dict[Path, tuple[Facts, bool]] = field(default_factory=dict)  # and whether the signature tells a change

    def facts(self, path: Path) -> Facts:
        """Return what a file or folder holds now. UserError where it cannot be read."""
        try:
            before = signature(path)
            if path in self._known:
                found, tells = self._known[path]
                if tells and found.signature == before:
                    return found
            began = time.time_ns()
            found = Facts(hash_of(path), count_rows(path), before)
            if signature(path) != before:
                raise UserError(f"{path}: is being written; run again when that is done")
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); should be a file or folder") from None
        newest = max((changed for *_, changed in before), default=0)
        self._known[path] = found, newest < began - SETTLED * 1e9
        return found


def signature(path: Path) -> tuple:
    """What changes whenever a file, or one of a folder's, is written or replaced: name, device, inode, size, times of
    change. Also where the old content is put back: no program can set the last of the times."""
    found = []
    for name in names_in(path) if path.is_dir() else [""]:
        handle = os.open(path / name if name else path, os.O_RDONLY)  # opening makes NFS look again
        try:
            facts = os.fstat(handle)
        finally:
            os.close(handle)
        found.append((name, facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns))
    return tuple(found)


def names_in(folder: Path) -> list[str]:
    """The files of a folder, as relative paths, but hidden ones (caches, .git)."""
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    return [name for name in names if not any(part.startswith(".") for part in Path(name).parts)]


def hash_of(path: Path) -> str:
    """A file's sha256; a folder's from the names and digests of its files."""
    if path.is_dir():
        return files.sha256_json({name: files.sha256_file(path / name) for name in names_in(path)})
    return files.sha256_file(path)


def count_rows(path: Path) -> int | None:
    """Lines of a JSONL file; None where counting would mean parsing."""
    if path.suffix != ".jsonl" or not path.is_file():
        return None
    with open(path, "rb") as file:
        return sum(1 for line in file if line.strip())
