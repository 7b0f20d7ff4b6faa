"""Files that survive a crash: atomic JSON, fsync, digests, a space check. Everything here takes and gives
plain paths."""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.errors import UserError

NUMBER = re.compile(r"\(os error (\d+)\)")  # in what safetensors and tokenizers (an Exception) raise
TORCH_WRITES = "iostream error|PytorchStreamWriter|unexpected pos"  # in what torch.save raises
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG}


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value that digests are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def sha256_json(value: Any) -> str:
    return hashlib.sha256(canonical_json(value)).hexdigest()


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """What a disk refuses inside names a file: where the error does not (fsync, writes, safetensors), it is `path`."""
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if type(error).__name__ in ("SafetensorError", "Exception") and (found := NUMBER.search(str(error))):
            number = int(found[1])
        if isinstance(error, RuntimeError) and re.search(TORCH_WRITES, str(error)):  # torch does not say which
            there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
            number = errno.ENOSPC if shutil.disk_usage(there).free < 2**20 else errno.EIO
        if number not in DISK or getattr(error, "filename", None) is not None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def fsync_file(path: Path) -> None:
    with open(path, "rb") as file, naming(path):
        os.fsync(file.fileno())


def fsync_folder(path: Path) -> None:
    """Makes the names in a folder durable: after a rename, the new name survives a power cut."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with naming(path):
            os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            fsync_file(Path(parent, name))
        fsync_folder(Path(parent))


def usual_mode(folder: Path) -> int:
    """The mode that files which are opened in a folder have: by the umask, or by the folder's default ACL."""
    probe = folder / ".tmp-mode"
    with open(probe, "wb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    probe.unlink()
    return mode


def give_usual_modes(folder: Path) -> None:
    """Give every file below `folder` the usual mode: safetensors writes files that only their owner can read."""
    usual = usual_mode(folder)
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            if stat.S_IMODE(os.lstat(path).st_mode) != usual:
                os.chmod(path, usual)


def write_json(path: Path, value: Any) -> None:
    """Writes readable JSON so that `path` holds either the old value or the new one, never a part."""
    staged = path.with_name(f".tmp-{path.name}")
    with naming(staged), open(staged, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(staged, path)
    fsync_folder(path.parent)


def read_sealed(path: Path) -> dict[str, Any]:
    """Reads a JSON object that carries its own `digest`; a UserError names the file when it does not hold."""
    try:
        if path.is_symlink():
            raise ValueError("it is a symbolic link")
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error})") from None
    return unsealed(content, str(path))


def unsealed(content: bytes, name: str) -> dict[str, Any]:
    """What `read_sealed` reads, from bytes that are called `name`."""
    try:
        value = json.loads(content.decode(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it is not a JSON object")
        expected = str(value.get("digest"))
        actual = sha256_json({key: item for key, item in value.items() if key != "digest"})
        if expected != actual:
            raise ValueError(f"its digest is {actual[:12]} and should be {expected[:12]}")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: damaged ({error})") from None
    return value


def seal(value: dict[str, Any]) -> dict[str, Any]:
    """The same object with its `digest`, which `read_sealed` checks."""
    return {**value, "digest": sha256_json({key: item for key, item in value.items() if key != "digest"})}


def list_files(folder: Path) -> list[str]:
    """Every file below, as sorted relative POSIX paths. A symbolic link or a special file is a UserError:
    neither can be published or verified."""
    found = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_symlink() or not (entry.is_dir(follow_symlinks=False) or entry.is_file(follow_symlinks=False)):
            raise UserError(f"{entry.path}: is a link or a special file; an artifact holds plain files only")
        if entry.is_dir(follow_symlinks=False):
            found += [f"{entry.name}/{name}" for name in list_files(Path(entry.path))]
        else:
            found.append(entry.name)
    return found


def describe_files(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    return {name: {"sha256": sha256_file(folder / name), "bytes": (folder / name).stat().st_size} for name in names}


def check_files(folder: Path, expected: dict[str, dict[str, Any]]) -> list[str]:
    """Compares the files of a manifest with the disk: lines "PATH: what is wrong", empty when all hold."""
    problems = []
    for name, facts in expected.items():
        path = folder / name
        if not is_inside(name):
            problems.append(f"{folder}: the manifest names {name!r}, which leaves the folder")
        elif _has_link(folder, name):
            problems.append(f"{path}: is a symbolic link")
        elif not path.is_file():
            problems.append(f"{path}: is missing")
        elif (size := path.stat().st_size) != facts.get("bytes"):
            problems.append(f"{path}: has {size} bytes and should have {facts.get('bytes')}")
        elif (digest := sha256_file(path)) != facts.get("sha256"):
            problems.append(f"{path}: sha256 is {digest[:12]} and should be {str(facts.get('sha256'))[:12]}")
    return problems


def is_inside(name: str) -> bool:
    """Whether a relative path from a manifest stays in its folder."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and "\0" not in name


def _has_link(folder: Path, name: str) -> bool:
    path = folder
    for part in PurePosixPath(name).parts:
        path = path / part
        if path.is_symlink():
            return True
    return False


def require_space(folder: Path, needed: int) -> None:
    """Refuses before writing rather than in the middle of it. `needed`: bytes; a mebibyte is kept in
    reserve."""
    free = shutil.disk_usage(folder).free
    if free < needed + 2**20:
        raise UserError(f"{folder}: needs {needed:,} bytes and {free:,} are free; make room, then run again")


def free_bytes(folder: Path) -> int:
    """Return the room that the disk of a folder has."""
    return shutil.disk_usage(folder).free


def remove(path: Path) -> None:
    """Removes a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def human_bytes(count: float) -> str:
    """A number of bytes as people say it: 12 kB, 1.3 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
