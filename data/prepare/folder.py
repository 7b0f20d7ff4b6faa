"""Write a folder so that it appears whole or not at all."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import UserError


@contextmanager
def whole_folder(path: Path, force: bool) -> Iterator[Path]:
    """Give a folder to write in, which gets its name when the block ends without an error.

    What a killed run left is removed by the next one.

    Args:
        path: The folder to make.
        force: Whether a folder of this name may be replaced.

    Raises:
        UserError: The folder exists, or another process is making it.
    """
    if path.exists() and not force:
        raise UserError([f"{path}: exists; choose another folder with -o, or say --force to replace it"])
    if path.exists() and not (path / "manifest.json").exists() and any(path.iterdir()):
        raise UserError([f"{path}: is no folder that `data prepare` wrote, so --force does not replace it"])
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.preparing")
    temporary.mkdir(exist_ok=True)
    lock = os.open(temporary, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError([f"{path}: is being made by another process; wait for it"]) from None
        for item in temporary.iterdir():
            remove(item)
        try:
            yield temporary
            for item in temporary.iterdir():
                sync(item)
            sync(temporary)
            replace(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def replace(temporary: Path, path: Path) -> None:
    """Rename a folder to its final name; one that has the name already is removed afterwards.

    Args:
        temporary: The folder.
        path: Its final name.
    """
    old = path.with_name(f".{path.name}.old")
    if old.exists():
        shutil.rmtree(old)
    if path.exists():
        path.rename(old)
    temporary.rename(path)
    sync(path.parent)
    if old.exists():
        shutil.rmtree(old)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all it holds."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def sync(path: Path) -> None:
    """Make sure that a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
