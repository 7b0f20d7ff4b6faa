"""Detect damage by digests: of files, of JSON objects, and of the files in a manifest."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from pipeline.errors import UserError

MOST_THREADS = 8  # that read files at a time; more of them wait for the disk
WORTH_THREADS = 2**24  # bytes from which on starting threads pays

T = TypeVar("T")


def canonical_json(value: Any) -> bytes:
    """Return the canonical encoding of a JSON value, the one that digests are computed from."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def sha256_json(value: Any) -> str:
    """Return the SHA-256 of a JSON value's canonical encoding, in hexadecimal."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def sha256_json_list(items: Iterable[Any]) -> str:
    """Return what `sha256_json` gives of the list of these JSON values, without holding it."""
    digest = hashlib.sha256(b"[")
    for number, item in enumerate(items):
        digest.update((b"," if number else b"") + canonical_json(item))
    digest.update(b"]")
    return digest.hexdigest()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's contents, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_files(paths: Iterable[Path]) -> dict[Path, str]:
    """Return the SHA-256 of files, several of which are read at a time."""
    return read_in_threads(sha256_file, {path: path.stat().st_size for path in paths})


def read_in_threads(read: Callable[[Path], T], sizes: Mapping[Path, int]) -> dict[Path, T]:
    """Read files in threads, the largest first, so that none is left alone at the end.

    hashlib releases Python's lock while it computes, so threads hash as fast as processes would.

    Args:
        read: reads one file.
        sizes: the files, with their bytes.

    Returns:
        What `read` returned of each file, in the order of `sizes`.
    """
    threads = min(MOST_THREADS, len(sizes), os.cpu_count() or 1)
    if threads < 2 or sum(sizes.values()) < WORTH_THREADS:
        return {path: read(path) for path in sizes}
    with ThreadPoolExecutor(threads) as pool:
        running = {path: pool.submit(read, path) for path in sorted(sizes, key=lambda path: -sizes[path])}
        try:
            return {path: running[path].result() for path in sizes}
        except BaseException:
            pool.shutdown(cancel_futures=True)  # one file cannot be read: those that wait need not be
            raise


def seal(value: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a JSON object with its own digest under the key `digest`."""
    return {**value, "digest": sha256_json({key: item for key, item in value.items() if key != "digest"})}


def read_sealed(path: Path) -> dict[str, Any]:
    """Read a JSON object that carries its own digest.

    Args:
        path: a file that was written with `seal`.

    Returns:
        The object, `digest` included.

    Raises:
        UserError: the file cannot be read, is a symbolic link, is not JSON or does not match its
            digest.
    """
    try:
        if path.is_symlink():
            raise ValueError("it is a symbolic link")
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error})") from None
    return parse_sealed(content, str(path))


def parse_sealed(content: bytes, name: str) -> dict[str, Any]:
    """Parse a JSON object that carries its own digest.

    Args:
        content: the bytes of the file.
        name: what error messages call it.

    Raises:
        UserError: the bytes are not JSON, or do not match the digest.
    """
    try:
        value = json.loads(content.decode(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it is not a JSON object")
        expected = str(value.get("digest"))
        actual = sha256_json({key: item for key, item in value.items() if key != "digest"})
        if expected != actual:
            raise ValueError(f"its digest is {actual[:12]} and should be {expected[:12]}")
    except (ValueError, RecursionError) as error:  # flipped bits can turn a file into very deep nesting
        raise UserError(f"{name}: damaged ({error})") from None
    return value


def list_files(folder: Path) -> list[str]:
    """List every file below `folder`, as sorted relative POSIX paths.

    Raises:
        UserError: there is a symbolic link or a special file. What a link points to can change
            after it was verified, so artifacts contain none.
    """
    names = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        is_folder = entry.is_dir(follow_symlinks=False)
        if entry.is_symlink() or not (is_folder or entry.is_file(follow_symlinks=False)):
            raise UserError(f"{entry.path}: is a link or a special file; artifacts contain regular files only")
        if is_folder:
            names += [f"{entry.name}/{name}" for name in list_files(Path(entry.path))]
        else:
            names.append(entry.name)
    return names


def describe_files(
    folder: Path, names: list[str], digests_of: Callable[[Iterable[Path]], Mapping[Path, str]] = sha256_files
) -> dict[str, dict[str, Any]]:
    """Return `{name: {"sha256", "bytes"}}`, as manifests record it, for files below `folder`.

    Args:
        folder: the folder that the names are relative to.
        names: the files.
        digests_of: returns the digests of files.
    """
    digests = digests_of(folder / name for name in names)
    return {name: {"sha256": digests[folder / name], "bytes": (folder / name).stat().st_size} for name in names}


def check_files(
    folder: Path,
    expected: dict[str, dict[str, Any]],
    digests_of: Callable[[Mapping[Path, str]], Mapping[Path, str]] = sha256_files,
) -> list[str]:
    """Compare files on disk with what a manifest says of them.

    Args:
        folder: the folder that the names are relative to.
        expected: the manifest's `{name: {"sha256", "bytes"}}`.
        digests_of: returns the digests of files; it is given each with the one that it should
            have.

    Returns:
        A line `PATH: what is wrong` for each file that does not match; empty if all match.
    """
    problems: dict[str, str] = {}
    sound: dict[str, Path] = {}  # as far as can be seen without reading them
    for name, facts in expected.items():
        path = folder / name
        if not is_inside(name):
            problems[name] = f"{folder}: the manifest names {name!r}, which leaves the folder"
        elif _has_link(folder, name):
            problems[name] = f"{path}: is a symbolic link"
        elif not path.is_file():
            problems[name] = f"{path}: is missing"
        elif (size := path.stat().st_size) != facts.get("bytes"):  # before the digest: it costs nothing
            problems[name] = f"{path}: has {size} bytes and should have {facts.get('bytes')}"
        else:
            sound[name] = path
    digests = digests_of({path: str(expected[name].get("sha256")) for name, path in sound.items()})
    for name, path in sound.items():
        if (digest := digests[path]) != (right := str(expected[name].get("sha256"))):
            problems[name] = f"{path}: sha256 is {digest[:12]} and should be {right[:12]}"
    return [problems[name] for name in expected if name in problems]


def is_inside(name: str) -> bool:
    """Return whether a relative path from a manifest stays inside its folder."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and "\0" not in name


def _has_link(folder: Path, name: str) -> bool:
    """Return whether the file, or a folder on the way to it, is a symbolic link."""
    path = folder
    for part in PurePosixPath(name).parts:
        path = path / part
        if path.is_symlink():
            return True
    return False
