"""Let one server at a time work on an experiment: a lock that names host and process."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import UserError
from pipeline.store.locks import try_lock


@contextmanager
def hold(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file while the block runs.

    The kernel frees the lock when this process dies. A file system may keep locks of one host from
    another, so a server that another host noted in the file counts as running, too.

    Args:
        path: The lock file.
        what: What runs, such as "rlhf rank".

    Raises:
        UserError: Another server holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        holder = read_holder(handle)
        host = socket.gethostname()
        place = f"{what} is running as process {holder.get('pid')} on {holder.get('host')}"
        place += f" at {holder['address']}" if holder.get("address") else ""
        if not try_lock(handle, patience=0.3):
            raise UserError(f"{path.parent}: {place}; use that one, or stop it")
        if holder and holder.get("host") != host:
            raise UserError(
                f"{path.parent}: {place}, as {path} says; use that one, or stop it. If that host is gone, remove the "
                f"file {path.name}"
            )
        write_holder(handle, {"pid": os.getpid(), "host": host, "started": time.time()})
        try:
            yield
        finally:
            write_holder(handle, {})
    finally:
        os.close(handle)


def note_address(path: Path, address: str) -> None:
    """Write into the lock file that this process holds where its server can be reached."""
    handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        write_holder(handle, {**read_holder(handle), "address": address})
    finally:
        os.close(handle)


def read_holder(handle: int) -> dict:
    """Return what a lock file says of its holder; {} if nothing."""
    with suppress(ValueError):
        holder = json.loads(os.pread(handle, 4096, 0) or b"{}")
        if isinstance(holder, dict):
            return holder
    return {}


def write_holder(handle: int, holder: dict) -> None:
    """Write into a lock file who holds it; {}: nobody."""
    text = json.dumps(holder).encode() if holder else b""
    os.ftruncate(handle, 0)
    os.pwrite(handle, text, 0)
    os.fsync(handle)
