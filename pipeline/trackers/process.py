"""Send journals to trackers: `python -m pipeline.trackers.process PID`, started by process PID.

It reads lines of JSON from its standard input: {"begin": RUN} when a run has its first row, then
{"finish": RUN_ID, "seconds": N} when its journals are complete. It answers with lines {"run",
"tracker", "event"}: "done" when a tracker has all rows, or "lost", with a reason. When the input
ends, because the command has ended or was killed, it sends what the journals have and ends too.
"""

import fcntl
import json
import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from pipeline.trackers.rows import Journals
from pipeline.trackers.run import TrackedRun

POLL_SECONDS = 0.5  # between two looks at the journals
CALL_SECONDS = 60.0  # to open a run, libraries included, or to send a row
FINISH_SECONDS = 30.0  # to send the rest when the command was killed
SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)


class Replies:
    """The way back to the command."""

    def __init__(self, file: IO[str]):
        """Answer into a file."""
        self.file, self.lock = file, threading.Lock()

    def send(self, **values: str) -> None:
        """Send one answer; there may be nobody left to read it."""
        with self.lock:
            try:
                print(json.dumps(values), file=self.file, flush=True)
            except OSError:
                return


class Feed:
    """One run in one tracker: a thread that opens it, follows the journals and finishes it."""

    def __init__(self, name: str, run: TrackedRun, replies: Replies):
        """Start the thread."""
        self.name, self.run, self.replies = name, run, replies
        self.journals_complete = threading.Event()
        self.over = threading.Event()
        self._reported = threading.Lock()  # whoever takes it reports how this ended
        self._overdue_at: float | None = None  # when the call that is in progress has taken too long
        threading.Thread(target=self._follow, daemon=True, name=name).start()

    def give_up_if_overdue(self, now: float) -> None:
        """Report the tracker as lost if a call has taken too long; its thread is left behind."""
        overdue_at = self._overdue_at
        if overdue_at is not None and now > overdue_at:
            self._end("lost", f"no answer within {CALL_SECONDS:.0f} s")

    def _follow(self) -> None:
        """Send all rows, and report how it ended."""
        try:
            self._overdue_at = time.monotonic() + CALL_SECONDS
            # That of a command that was killed may still be sending what that one wrote.
            with open(self._lock_file(), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._send_all()
        except BaseException as error:  # whatever a library raises, SystemExit included
            self._end("lost", reason_of(error))
        else:
            self._end("done")

    def _send_all(self) -> None:
        """Open the run in the tracker, send every row of the journals and finish the run."""
        from pipeline.trackers.kinds import open_run

        opened = open_run(self.name, self.run)
        journals, complete = Journals(Path(self.run.folder)), False
        while not complete:
            self._overdue_at = None
            complete = self.journals_complete.wait(POLL_SECONDS)
            for entry in journals.new_entries(complete):
                if opened.takes(entry):
                    self._overdue_at = time.monotonic() + CALL_SECONDS
                    opened.send(entry)
        self._overdue_at = None  # the command decides how long it waits for the end
        opened.tracker.finish()

    def _lock_file(self) -> Path:
        """Return the file that a process locks while it sends this stage to this tracker."""
        folder = self.run.file(".trackers")
        folder.mkdir(exist_ok=True)
        return folder / f"{self.run.stage}-{self.name}.lock"

    def _end(self, event: str, reason: str = "") -> None:
        """Report how it ended, once."""
        if self._reported.acquire(blocking=False):
            self.replies.send(run=self.run.run_id, tracker=self.name, event=event, reason=reason)
            self.over.set()


def reason_of(error: BaseException) -> str:
    """Return the first line of an error without anything secret."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    for name, value in os.environ.items():
        if SECRET_NAME.search(name) and len(value) >= 6:
            text = text.replace(value, "***")
    return re.sub(r"://[^/@\s]+@", "://***@", text)[:300]


def messages(parent: int) -> Iterator[dict[str, Any] | None]:
    """Yield what the command sends, and None where nothing comes for a while.

    Args:
        parent: The command's process: that it has ended ends this too, even if another process has
            inherited its end of the pipe.
    """
    received = b""
    while os.getppid() == parent:
        if not select.select([0], [], [], POLL_SECONDS)[0]:
            yield None
            continue
        if not (chunk := os.read(0, 2**16)):
            return
        *lines, received = (received + chunk).split(b"\n")
        for line in lines:
            yield json.loads(line)


def serve(replies: Replies, parent: int) -> bool:
    """Do what the command asks for until it ends.

    Returns:
        Whether no tracker is stuck in a call.
    """
    feeds: list[Feed] = []
    lost: set[str] = set()
    for message in messages(parent):
        if message is None:
            for feed in feeds:
                feed.give_up_if_overdue(time.monotonic())
        elif "begin" in message:
            run = TrackedRun.from_json(message["begin"])
            feeds += [Feed(name, run, replies) for name in run.names if name not in lost]
        elif "finish" in message:
            for feed in feeds:
                if feed.run.run_id == message["finish"]:
                    feed.journals_complete.set()
    for feed in feeds:
        feed.journals_complete.set()
    deadline = time.monotonic() + FINISH_SECONDS
    return all([feed.over.wait(max(0.0, deadline - time.monotonic())) for feed in feeds])


def main() -> None:
    """Serve the command that started this process."""
    parent = int(sys.argv[1])  # not asked for here: the command may have ended already
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # they are meant for the command; its end ends this process
    replies = Replies(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)  # libraries print addresses and hints, and could print keys
    os.dup2(silence, 2)
    from accelerate import PartialState

    PartialState(cpu=True)  # accelerate's loggers need it
    os.nice(10)  # training comes first
    if serve(replies, parent):
        threading.Thread(target=_end_soon, daemon=True).start()
        sys.exit(0)  # libraries close what they have open
    os._exit(1)


def _end_soon() -> None:
    """End the process if its libraries take too long to close."""
    time.sleep(5)
    os._exit(0)


if __name__ == "__main__":
    main()
