"""Write one checkpoint by several processes, each its share, in threads while training goes on.

Each process writes its files, forces them to disk, hashes them, and says so in a small file beside
them. The thread of rank 0 waits for all of these, and completes the checkpoint. The threads do not
communicate: collective operations of theirs could meet those of the training in another order. So
all processes need one file system, as they do for resuming.
"""

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.store import files, integrity, shares
from pipeline.store.shares import Share

SEEN_WITHIN = 60.0
"""Seconds after which a network file system shows other machines a new folder."""
STALLED = 60.0
"""Seconds without a sign of the others after which the end of a failed run waits no longer."""
PAUSE = 0.02
"""Seconds between two looks for what other processes have written."""


class SharedSave:
    """One process's part in a save that is under way; rank 0's completes the checkpoint."""

    def __init__(
        self,
        staged: Path,
        place: tuple[int, int],
        groups: dict[str, dict[str, Share]],
        texts: dict[str, str],
        present: list[str],
        complete: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        """Start to write.

        Args:
            staged: The folder, under its temporary name.
            place: (rank, number of processes).
            groups: What this process writes of each group of tensors. Kept until it is written.
            texts: Further files to write, by name.
            present: Files in `staged` that are to be described too.
            complete: Of rank 0 alone: takes what a manifest says of all files, when all are there.
        """
        self.problem: str | None = None
        """What went wrong, in words."""
        self.staged, self.place = staged, place
        self._groups, self._texts, self._present, self._complete = groups, texts, present, complete
        self._written, self._given_up = threading.Event(), threading.Event()
        # A daemon: a process that must end at once is not held back.
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        """Whether this process has nothing left to do; of rank 0: the checkpoint is complete."""
        return not self._thread.is_alive()

    def wait_for_share(self) -> None:
        """Wait until this process's files are written, or could not be."""
        self._written.wait()

    def join(self) -> None:
        """Wait until nothing is left to do."""
        self._thread.join()

    def give_up(self) -> None:
        """Let rank 0 wait no longer for what is not there yet."""
        self._given_up.set()
        self._thread.join()

    def join_if_alive(self) -> None:
        """Wait until nothing is left to do, or until the other processes show no sign of life.

        For the end of a run that has failed, where nothing can be agreed on with the others.
        """
        seen, since = -1, time.monotonic()
        while self._thread.is_alive() and time.monotonic() - since < STALLED:
            self._thread.join(PAUSE)
            size = self._bytes_written()
            if size != seen or not self._written.is_set():
                seen, since = size, time.monotonic()
        self.give_up()

    def _bytes_written(self) -> int:
        """Return how much all have written so far; 0 once the folder has its final name."""
        size = 0
        with suppress(OSError):  # the thread renames the folder and removes files meanwhile
            for path in self.staged.glob("*"):
                size += path.stat().st_size
        return size

    def _run(self) -> None:
        try:
            records = self._write_share()
            self._written.set()
            if self._complete is not None:
                self._complete(records | self._records_of_others())
        except Exception as error:
            self.problem = _in_words(error)
        finally:
            self._groups = {}
            self._written.set()

    def _write_share(self) -> dict[str, Any]:
        """Write the files and force them to disk; return their entries of the manifest."""
        rank, size = self.place
        names = list(self._present)
        for name, text in self._texts.items():
            with files.name_in_errors(self.staged / name):
                (self.staged / name).write_text(text, encoding="utf-8")
            names.append(name)
        for group, parts in self._groups.items():
            name = shares.file_name(group, rank, size)
            shares.write_shares(self.staged / name, parts)
            names.append(name)
        self._groups = {}  # its memory is free for the next save
        for name in names:
            files.fsync_file(self.staged / name)
        described = integrity.describe_files(self.staged, names)
        if rank:
            _report(self.staged / _record_name(rank), described)
        return described

    def _records_of_others(self) -> dict[str, Any]:
        """Wait for the other processes, and return what a manifest says of their files."""
        described: dict[str, Any] = {}
        for rank in range(1, self.place[1]):
            record = self.staged / _record_name(rank)
            while not record.is_file():
                if self._given_up.is_set():
                    raise UserError(f"{self.staged}: process {rank} did not write its share")
                time.sleep(PAUSE)
            described |= json.loads(record.read_text(encoding="utf-8"))
            record.unlink()
        return described


def sees(staged: Path, within: float | None = None) -> bool:
    """Return whether this process sees a folder that rank 0 has made.

    Args:
        staged: The folder.
        within: Seconds to wait for it; None: SEEN_WITHIN.
    """
    deadline = time.monotonic() + (SEEN_WITHIN if within is None else within)
    while not staged.is_dir():
        if time.monotonic() > deadline:
            return False
        time.sleep(PAUSE)
    return True


def _report(record: Path, described: dict[str, Any]) -> None:
    """Tell rank 0 what this process has written.

    The record appears whole, and then rank 0 may rename the folder at once: nothing in it may be
    touched after that, not even to force names to disk, which rank 0 does before it renames.
    """
    staged = record.with_name(f".tmp-{record.name}")
    with files.name_in_errors(staged):
        staged.write_text(json.dumps(described), encoding="utf-8")
    os.replace(staged, record)


def _record_name(rank: int) -> str:
    """Return the name of the file in which a process describes its files."""
    return f"share-{rank:05d}.json"


def _in_words(error: Exception) -> str:
    """Return a line for an error; of the disk's errors with the file."""
    if isinstance(error, UserError):
        return "; ".join(error.lines)
    if isinstance(error, OSError) and error.errno in files.DISK_ERRORS:
        free = ""
        if error.filename is not None and Path(error.filename).parent.is_dir():
            free = f" ({files.free_bytes(Path(error.filename).parent):,} bytes free)"
        return f"{error.filename}: {error.strerror}{free}; make room or make it writable, and run again"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
