"""Write files so that they survive a crash, and report a full or read-only disk by file name."""

import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

# safetensors and tokenizers are written in Rust: the error number is only in the text of what they
# raise.
RUST_ERROR_NUMBER = re.compile(r"\(os error (\d+)\)")
TORCH_WRITE_ERRORS = "iostream error|PytorchStreamWriter|unexpected pos"  # the texts that torch.save raises with
DISK_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ENAMETOOLONG,
}
RESERVE = 2**20  # bytes that a write must leave free


@contextmanager
def name_in_errors(path: Path) -> Iterator[None]:
    """Add a file name to disk errors that carry none.

    fsync, writes to an open file, safetensors and torch.save all fail without saying which file
    they were writing. Errors that are not about the disk, or that already name a file, pass
    unchanged.

    Args:
        path: the file that the block writes.

    Raises:
        OSError: in place of the original error, with the same error number and `path` as its file
            name.
    """
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        # tokenizers raises a bare Exception
        if type(error).__name__ in ("SafetensorError", "Exception") and (match := RUST_ERROR_NUMBER.search(str(error))):
            number = int(match[1])
        if isinstance(error, RuntimeError) and re.search(TORCH_WRITE_ERRORS, str(error)):
            # torch does not give the number either: a disk without free space is full, any other is
            # broken
            existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
            number = errno.ENOSPC if shutil.disk_usage(existing).free < RESERVE else errno.EIO
        if number is None or number not in DISK_ERRORS or getattr(error, "filename", None) is not None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def fsync_file(path: Path) -> None:
    """Force the contents of a file to disk."""
    with open(path, "rb") as file, name_in_errors(path):
        os.fsync(file.fileno())


def fsync_folder(path: Path) -> None:
    """Force the names in a folder to disk: without it, a rename may be lost in a power cut."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with name_in_errors(path):
            os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(folder: Path) -> None:
    """Force every file and folder below `folder` to disk, children before their parents."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            fsync_file(Path(parent, name))
        fsync_folder(Path(parent))


def default_mode(folder: Path) -> int:
    """Return the permissions that a new file gets from the umask or the folder's ACL."""
    # The umask cannot be read without setting it, and ACLs override it: creating a file is the only
    # sure way.
    probe = folder / ".tmp-mode"
    with open(probe, "wb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    probe.unlink()
    return mode


def set_default_modes(folder: Path) -> None:
    """Give every file below `folder` the default permissions.

    Files from safetensors would otherwise be readable only by their owner.
    """
    mode = default_mode(folder)
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            if stat.S_IMODE(os.lstat(path).st_mode) != mode:
                os.chmod(path, mode)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: after a crash, `path` holds the old value or the new one."""
    staged = path.with_name(f".tmp-{path.name}")
    with name_in_errors(staged), open(staged, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        # The contents must be on disk before the rename is, or a power cut leaves an empty file
        # under the name.
        file.flush()
        os.fsync(file.fileno())
    os.replace(staged, path)
    fsync_folder(path.parent)


def require_space(folder: Path, needed: int) -> None:
    """Check that a write fits on the disk before it begins.

    Args:
        folder: where the files will be written; it must exist.
        needed: bytes; RESERVE is added to them.

    Raises:
        UserError: the disk has less free space.
    """
    free = shutil.disk_usage(folder).free
    if free < needed + RESERVE:
        raise UserError(f"{folder}: needs {needed:,} bytes and {free:,} are free; make room, then run again")


def free_bytes(folder: Path) -> int:
    """Return the free space on the disk that holds `folder`, in bytes."""
    return shutil.disk_usage(folder).free


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def human_bytes(count: float) -> str:
    """Format a number of bytes for people: 12 kB, 1.3 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
