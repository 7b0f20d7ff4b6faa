"""Compute digests of files and folders, and remember them as long as the files are unchanged."""

import errno
import glob
import hashlib
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import UserError
from pipeline.store import digest_memory, integrity
from pipeline.store.digest_memory import FileFacts, Identity
from pipeline.store.files import human_bytes

TIMESTAMP_STEP = 2.0  # seconds: a file system may give two writes that are closer than this the same timestamp
SOME_LINES = 2**20  # bytes of lines that are counted at a time


class Facts(NamedTuple):
    """Hold the digest and the row count of a file, a folder or the files that a glob matches."""

    sha256: str
    """Digest of the file, or of the names and digests of the files."""
    rows: int | None
    """Non-empty lines, if all files are JSONL; None for anything else."""
    signature: tuple
    """See `signature`."""


class Reading(NamedTuple):
    """Hold what this command found when it read a file."""

    identity: Identity
    """The file as it was then."""
    facts: FileFacts
    """What it contained."""
    shows_changes: bool
    """Whether a later write is certain to change its identity."""


@dataclass
class Digests:
    """Remember what this command, and earlier ones, found in files.

    A file is read again only if its identity has changed, or if it was so new at the first reading
    that a later change might not show in the identity.

    Damage of a disk shows in no identity. What earlier commands remembered therefore serves to say
    what is up to date; a file that a stage is going to use is read (`trusting=False`), once a
    command. What this command has read or written itself it does not read again: a file that lay
    damaged on the disk before was found by that reading, and whoever changes it afterwards changes
    its identity.
    """

    memory: Path | None = None
    """The file that remembers digests for later commands; None: nothing is remembered."""
    trusts: bool = True
    """Whether to believe that file at all: `rlhf status --verify` does not."""
    bytes_read: int = 0
    """Bytes that were read so far."""
    _readings: dict[str, Reading] = field(default_factory=dict)
    """What this command has read, by absolute path."""
    _remembered: digest_memory.Entries | None = None
    """What earlier commands have read; None: not loaded yet."""
    _trusted: dict[str, int] = field(default_factory=dict)
    """Bytes of each file whose remembered digest was believed."""

    def facts(self, path: Path) -> Facts:
        """Return the current facts about a file, a folder or a glob.

        Raises:
            UserError: it cannot be read, matches nothing, or changed while it was being read.
        """
        try:
            before, bytes_before = signature(path), self.bytes_read
            named = files_at(path)
            found = self.read(named.values())
            if self.bytes_read != bytes_before and signature(path) != before:
                raise UserError(f"{path}: is being written; run again when that is done")
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); should be a file or folder") from None
        of_files = {name: found[file] for name, file in named.items()}
        rows = [facts.rows for facts in of_files.values()]
        total = None if None in rows else sum(count for count in rows if count is not None)
        if "" in of_files:  # the path of a single file
            return Facts(of_files[""].sha256, total, before)
        return Facts(integrity.sha256_json({name: f.sha256 for name, f in of_files.items()}), total, before)

    def read(self, files: Iterable[Path], trusting: bool = True) -> dict[Path, FileFacts]:
        """Return the facts of files; those that are not known are read, several at a time.

        Args:
            files: regular files.
            trusting: whether to believe what earlier commands have remembered.

        Raises:
            UserError: a file changed while it was being read.
            OSError: a file cannot be read.
        """
        found: dict[Path, FileFacts] = {}
        sizes: dict[Path, int] = {}
        for file in files:
            identity = digest_memory.identity(file)
            known = self._known(file, identity, trusting)
            if known is None:
                sizes[file] = identity.size
            else:
                found[file] = known
        if sizes:
            found |= integrity.read_in_threads(self._read, sizes)
            self.bytes_read += sum(sizes.values())
            self._remember(sizes)
        return found

    def sha256(self, files: Iterable[Path]) -> dict[Path, str]:
        """Return the digests of files; the errors are those of `read`."""
        return {file: facts.sha256 for file, facts in self.read(files).items()}

    def matching(self, expected: Mapping[Path, str], trusting: bool = True) -> dict[Path, str]:
        """Return the digests of files that should have certain ones: see `integrity.check_files`.

        A remembered digest is not believed where it says that a file is damaged: the file is read.

        Args:
            expected: the files, each with the digest that it should have.
            trusting: see `read`.
        """
        found = self.read(expected, trusting)
        doubtful = [file for file, facts in found.items() if facts.sha256 != expected[file]]
        found |= self.read(doubtful, trusting=False)
        return {file: facts.sha256 for file, facts in found.items()}

    def confirm(self, files: Iterable[Path]) -> bool:
        """Read the files that this command has not read, before they are used.

        Args:
            files: regular files.

        Returns:
            Whether any of them differs from what was remembered of it.
        """
        assumed = {file: self._known(file, digest_memory.identity(file), trusting=True) for file in files}
        found = self.read(assumed, trusting=False)
        return any(facts is not None and facts != found[file] for file, facts in assumed.items())

    def unread_bytes(self, files: Iterable[Path]) -> int:
        """Return how many bytes `confirm` would read."""
        sizes = {file: digest_memory.identity(file) for file in files}
        return sum(identity.size for file, identity in sizes.items() if self._known(file, identity, False) is None)

    def moved(self, source: Path, target: Path, names: Iterable[str]) -> None:
        """Keep what is known of files that this process wrote in a folder of its own, and renamed.

        Nobody else wrote there, so only a write from now on could go unnoticed. A file whose rename
        changed its identity is read again when it is needed.

        Args:
            source: the folder that the files were in.
            target: the folder that they are in now.
            names: the files, relative to the folder.
        """
        now, moved = time.time_ns(), []
        for name in names:
            reading = self._readings.pop(os.path.abspath(source / name), None)
            if reading is not None and (target / name).is_file():
                identity = digest_memory.identity(target / name)
                if identity == reading.identity:
                    shows_changes = identity.ctime < now - TIMESTAMP_STEP * 1e9
                    self._readings[os.path.abspath(target / name)] = reading._replace(shows_changes=shows_changes)
                    moved.append(target / name)
        self._remember(moved)

    def sentences(self) -> list[str]:
        """Return the line of `rlhf status` about files that were not read; none if all were."""
        sizes = [size for path, size in self._trusted.items() if path not in self._readings]
        if not sizes:
            return []
        what = f"{len(sizes)} file{'s' if len(sizes) > 1 else ''}, {human_bytes(sum(sizes))}"
        return [f"{what}: digests remembered, sizes and times unchanged; --verify reads all"]

    def _known(self, file: Path, identity: Identity, trusting: bool) -> FileFacts | None:
        """Return the facts of a file as far as they are known of one with this identity."""
        path = os.path.abspath(file)
        reading = self._readings.get(path)
        if reading is not None and reading.identity == identity:
            return reading.facts if reading.shows_changes else None
        if not (trusting and self.trusts) or self.memory is None:
            return None
        if self._remembered is None:
            self._remembered = digest_memory.load(self.memory)
        entry = self._remembered.get(digest_memory.name_of(path, self.memory))
        if entry is None or entry.identity != identity:
            return None
        self._trusted[path] = identity.size
        return entry.facts

    def _read(self, file: Path) -> FileFacts:
        """Read a file and note what it contains."""
        before, began = digest_memory.identity(file), time.time_ns()
        facts = read_file(file)
        if digest_memory.identity(file) != before:
            raise UserError(f"{file}: is being written; run again when that is done")
        shows_changes = before.ctime < began - TIMESTAMP_STEP * 1e9
        self._readings[os.path.abspath(file)] = Reading(before, facts, shows_changes)
        return facts

    def _remember(self, files: Iterable[Path]) -> None:
        """Write down what was read of files, for later commands."""
        if self.memory is None:
            return
        new = {}
        for file in files:
            path = os.path.abspath(file)
            reading = self._readings[path]
            if reading.shows_changes:
                new[digest_memory.name_of(path, self.memory)] = digest_memory.Entry(reading.identity, reading.facts)
        if new:
            digest_memory.add(self.memory, new)


def memory_below(root: Path) -> Digests:
    """Return what earlier commands remembered below a folder of artifacts."""
    return Digests(root / digest_memory.NAME)


def read_file(file: Path) -> FileFacts:
    """Return the digest of a file and, of JSONL, the number of its lines that are not empty.

    Compressed lines are not counted: unpacking them a second time takes longer than it is worth.
    """
    if file.suffix != ".jsonl":
        return FileFacts(integrity.sha256_file(file), None)
    digest, rows = hashlib.sha256(), 0
    with open(file, "rb") as handle:
        while lines := handle.readlines(SOME_LINES):
            digest.update(b"".join(lines))
            rows += sum(map(bool, map(bytes.strip, lines)))
    return FileFacts(digest.hexdigest(), rows)


def signature(path: Path) -> tuple:
    """Return what changes whenever a file, or one of a folder or glob, is written or replaced.

    Returns:
        A tuple (name, device, inode, bytes, mtime, ctime) per file, times in nanoseconds. A change
        shows even if the old contents and mtime are restored afterwards: programs cannot set the
        ctime.
    """
    return tuple((name, *digest_memory.identity(file)) for name, file in files_at(path).items())


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


def code_sha256(folder: Path) -> str:
    """Return the SHA-256 of the names and digests of the Python files below a folder."""
    return integrity.sha256_json(
        {str(path.relative_to(folder)): integrity.sha256_file(path) for path in sorted(folder.rglob("*.py"))}
    )
