"""Take and inspect file locks (flock), which the kernel releases when their process dies."""

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path


def try_lock(handle: int, patience: float) -> bool:
    """Take an exclusive lock on an open file.

    Args:
        handle: the file descriptor.
        patience: seconds to keep trying. `is_locked` in another process holds a shared lock for an
            instant, so that the first refusal does not mean that somebody works there.

    Returns:
        Whether the lock was taken.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)


def is_locked(path: Path) -> bool:
    """Return whether a process holds the exclusive lock on an existing file."""
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def is_at(handle: int, path: Path) -> bool:
    """Return whether an open file is still the one under this name, not removed or replaced."""
    with suppress(OSError):
        return os.path.samestat(os.fstat(handle), os.stat(path))
    return False
