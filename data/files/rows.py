"""Read the rows of a file, a folder or a glob, whatever their format."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path

from data.files.delimited import DELIMITERS, delimited_rows
from data.files.json_rows import json_rows
from data.files.paths import check_split_of_file, data_files, format_of, is_glob, matched_files
from data.files.plain_text import text_rows
from data.files.raw import HashedFile, UnpackError, buffered, foreign_kind, head_of, packing_of, seekable, unpack
from data.files.reading import Reading
from data.files.saved import saved_files, saved_folder
from data.files.tables import table_rows

MAGIC = {b"PAR1": "parquet", b"ARRO": "arrow", b"\xff\xff\xff\xff": "arrow"}
"""First four bytes → the format, whatever the file's name; the third is a stream of Arrow."""


def file_rows(path: str | Path, reading: Reading) -> Generator[tuple[str, object]]:
    """Read the rows of a file, of the files of a folder, or of those that a glob matches.

    The first bytes tell compression, parquet and Arrow, the name tells CSV, TSV and text, and
    anything else is JSON. The files of a folder or glob are read in the order of their paths; all
    must have one format and belong to one split. A folder that `save_to_disk` wrote is read in its
    own order. In every format a key whose value is null counts as missing.

    Args:
        path: A file, a folder or a glob, such as data/*.jsonl.gz.
        reading: Gets error lines and counts; and the digest if asked for, which is that of
            `pipeline.store.digests`.

    Yields:
        (location, value): the location is "FILE:LINE", "FILE: index I", or "FILE:LINE: index I"
        with I from 0; in a folder FILE is the file's own path.
    """
    if not Path(path).is_dir() and not is_glob(path):
        if reading.split is not None:
            try:
                check_split_of_file(path, reading.split)
            except ValueError as error:
                reading.errors.append(f"{path}: {error}")
                return
        yield from one_file(path, reading)
        return
    found = matched_files(path)
    try:
        files = files_of(path, found, reading.split)
    except ValueError as error:
        reading.errors.append(f"{path}: {error}")
        files = []
    digests: dict[Path, str | None] = {}
    reading.size = size_of(files)
    try:
        for file in files:
            try:
                yield from one_file(file, reading)
            finally:  # also where the caller stops early
                digests[file] = reading.sha256
            reading.passed += reading.file_size
    finally:
        if reading.hashes:
            reading.sha256 = digest_of(found, digests)


def files_of(path: str | Path, found: dict[str, Path], split: str | None) -> list[Path]:
    """Return the files to read of a folder or glob, in order.

    Args:
        path: The folder or glob.
        found: Its files, as of `matched_files`.
        split: The split that is wanted of several; None: there may be only one.

    Raises:
        ValueError: It is not known which files hold the rows.
    """
    saved = None if is_glob(path) else saved_folder(Path(path), split)
    return data_files(path, found, split) if saved is None else saved_files(saved)


def size_of(files: list[Path]) -> int:
    """Return the bytes of files; those that cannot be read count nothing."""
    size = 0
    for file in files:
        with suppress(OSError):
            size += file.stat().st_size
    return size


def size_of_path(path: str | Path) -> int:
    """Return the bytes of a file, or of all files of a folder or glob."""
    is_file = not Path(path).is_dir() and not is_glob(path)
    return size_of([Path(path)] if is_file else list(matched_files(path).values()))


def digest_of(found: dict[str, Path], known: dict[Path, str | None]) -> str:
    """Return the digest of names and contents of files, as `pipeline.store.digests` does.

    Args:
        found: The files by name.
        known: Digests of those that have been read.
    """
    digests = {}
    for name, file in found.items():
        digest = known.get(file)
        if digest is None:
            try:
                with open(file, "rb") as handle:
                    digest = hashlib.file_digest(handle, "sha256").hexdigest()
            except OSError:
                digest = "unreadable"
        digests[name] = digest
    canonical = json.dumps(digests, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def one_file(path: str | Path, reading: Reading) -> Generator[tuple[str, object]]:
    """Read the rows of one file.

    Args:
        path, reading: As of `file_rows`.
    """
    name = str(path)
    try:
        raw = HashedFile(path)
    except OSError as error:
        reading.errors.append(f"{name}: cannot be read: {error.strerror}; give the path of a file")
        return
    handle = buffered(raw)
    reading.file_size = raw.state()[0]
    reading.file_share = raw.share
    try:
        yield from rows_of(name, raw, handle, reading)
    except UnpackError as error:
        reading.errors.append(f"{name}: {error}; write or download it again")
    except OSError as error:
        reading.errors.append(f"{name}: cannot be read: {error.strerror or error}; check the disk")
    finally:  # also where the caller stops early: the digest is that of the whole file
        if reading.hashes:
            reading.sha256 = raw.digest_of_all()
        handle.close()


def rows_of(name: str, raw: HashedFile, handle: io.BufferedReader, reading: Reading) -> Generator[tuple[str, object]]:
    """Yield the rows of an open file in the format that it has.

    Args:
        name: The path.
        raw: The open file.
        handle: Its bytes, at the beginning.
        reading: As of `file_rows`.
    """
    content = handle
    if (method := packing_of(head_of(handle))) is not None:
        content = unpack(handle, method)
    head = head_of(content)
    if packing_of(head) is not None:
        reading.errors.append(f"{name}: compressed twice ({method}, then {packing_of(head)}); unpack it once")
        return
    reading.format = MAGIC.get(head[:4]) or format_of(name) or "json"
    if (what := foreign_kind(head, reading.format == "text")) is not None:
        reading.errors.append(f"{name}: {what}")
        return
    if reading.format in ("parquet", "arrow"):
        yield from binary_rows(name, raw, content if content is not handle else None, reading)
    elif reading.format in DELIMITERS:
        yield from delimited_rows(name, content, DELIMITERS[reading.format], reading)
    elif reading.format == "text":
        yield from text_rows(name, content, reading)
    else:
        yield from json_rows(name, content, reading)


def binary_rows(
    name: str, raw: HashedFile, unpacked: io.BufferedReader | None, reading: Reading
) -> Generator[tuple[str, object]]:
    """Yield the rows of parquet or Arrow, which are read from the end of the file.

    Args:
        name: The path.
        raw: The open file. It is hashed first, and may not change until it is read.
        unpacked: Its unpacked bytes; None if it is not compressed.
        reading: As of `file_rows`.
    """
    assert reading.format is not None
    if unpacked is not None:
        with seekable(unpacked) as copy:
            yield from table_rows(name, copy, reading.format, reading)
        return
    before = raw.state()
    if reading.hashes:
        raw.digest_of_all()
    raw.file.seek(0)
    try:
        with open(raw.file.fileno(), "rb", closefd=False) as file:
            yield from table_rows(name, file, reading.format, reading)
    finally:
        raw.file.seek(0, io.SEEK_END)  # so that nothing is hashed twice
    if raw.state() != before:
        reading.errors.append(f"{name}: was edited while it was read; run again")
