"""Let worker processes call a function of the user: columns → outcomes, in time or not at all."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import connection as connections
from multiprocessing.connection import Connection
from pathlib import Path

from pipeline.errors import UserError
from stages.scorers.python_worker import BadAnswer, CallFailed, Columns, Outcome

PROGRAM = Path(__file__).with_name("python_worker.py")
SECONDS_TO_START = 300.0
"""The longest that a worker may take to import the user's file."""
TICK = 0.1
"""Seconds between two looks at whether the run is to stop."""


@dataclass(eq=False)
class Worker:
    """A process that calls the function, and our end of the connection to it."""

    process: subprocess.Popen
    """The process, the leader of a session of its own."""
    connection: Connection
    """Where columns go and outcomes come from."""
    ready: bool = False
    """Whether it has imported the user's file."""
    task: int | None = None
    """Index of the call that it works on."""
    deadline: float = 0.0
    """When that call, or the start, has taken too long; of `time.monotonic`."""


@dataclass
class Pool:
    """Worker processes for one function. Those that end, or take too long, are replaced."""

    file: Path
    """The user's file."""
    function: str
    """The function's name."""
    size: int
    """The number of processes."""
    timeout: float | None
    """The longest that a call may take, in seconds; None: any time."""
    workers: list[Worker] = field(default_factory=list)
    """Those that run now."""

    def start(self) -> None:
        """Start the processes that are missing, and wait until one of them has imported the file.

        Raises:
            UserError: It cannot be imported, or has no such function.
        """
        self.fill()
        while not any(worker.ready for worker in self.workers):
            self.listen([], TICK)
            self.fill()

    def fill(self) -> None:
        """Start the processes that are missing."""
        while len(self.workers) < self.size:
            self.workers.append(start_worker(self.file, self.function))

    def calls(self, tasks: Sequence[Columns], poll: Callable[[], None]) -> list[list[Outcome] | CallFailed]:
        """Make calls, several at a time, and return the outcomes of each or why it has none.

        Args:
            tasks: The columns of each call.
            poll: Is called while waiting; what it raises ends the calls.

        Raises:
            BadAnswer: An answer is not one entry for each response.
        """
        answers: list[list[Outcome] | CallFailed | None] = [None] * len(tasks)
        waiting = list(reversed(range(len(tasks))))
        try:
            while any(answer is None for answer in answers):
                poll()
                self.fill()
                for worker in self.workers:
                    if worker.ready and worker.task is None and waiting:
                        self.ask(worker, waiting.pop(), tasks, answers)
                self.listen(answers, TICK)
        except BaseException:
            self.close()  # workers in the middle of a call would answer to the next one
            raise
        return [answer for answer in answers if answer is not None]

    def ask(self, worker: Worker, task: int, tasks: Sequence[Columns], answers: list) -> None:
        """Send a worker the columns of a call."""
        worker.task = task
        worker.deadline = time.monotonic() + (self.timeout or float("inf"))
        try:
            worker.connection.send(tasks[task])
        except ConnectionError:
            self.lose(worker, answers)

    def listen(self, answers: list, seconds: float) -> None:
        """Take what workers say, and end those that have taken too long.

        Args:
            answers: Where the answers of calls go, by their index.
            seconds: How long to wait for one.
        """
        by_connection = {id(worker.connection): worker for worker in self.workers}
        ours = [worker.connection for worker in self.workers if worker.task is not None or not worker.ready]
        for one in connections.wait(ours, seconds):
            self.take(by_connection[id(one)], answers)
        for worker in list(self.workers):
            busy = worker.task is not None or not worker.ready
            if not busy or time.monotonic() < worker.deadline:
                continue
            if not worker.ready:
                self.close()
                raise UserError(f"{self.file}: is not imported after {SECONDS_TO_START:g} seconds; make it faster")
            answers[worker.task] = CallFailed(f"took longer than timeout = {self.timeout:g} seconds")
            self.drop(worker)

    def take(self, worker: Worker, answers: list) -> None:
        """Take what one worker says."""
        try:
            message = worker.connection.recv()
        except (EOFError, ConnectionError):
            self.lose(worker, answers)
            return
        if "refused" in message:
            self.close()
            raise UserError(message["refused"])
        if not worker.ready:
            worker.ready = True
            return
        if message["printed"]:
            print(message["printed"], end="", flush=True)  # here, where a progress bar knows of it
        task, worker.task = worker.task, None
        if "bad" in message:
            raise BadAnswer(message["bad"])
        answers[task] = message["outcomes"] if "outcomes" in message else CallFailed(message["failed"])

    def lose(self, worker: Worker, answers: list) -> None:
        """Note that a worker has ended by itself.

        Raises:
            UserError: It had not even imported the file.
        """
        how = how_it_ended(worker.process)
        self.drop(worker)
        if not worker.ready:
            self.close()
            raise UserError(f"{self.file}: its process {how} while it was imported; correct it")
        if worker.task is not None:
            answers[worker.task] = CallFailed(f"ended its process ({how})")

    def drop(self, worker: Worker) -> None:
        """End a worker with all that it has started."""
        self.workers.remove(worker)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(worker.process.pid, signal.SIGKILL)
        worker.process.wait()
        worker.connection.close()

    def close(self) -> None:
        """End all workers."""
        for worker in list(self.workers):
            self.drop(worker)


def start_worker(file: Path, function: str) -> Worker:
    """Start a process that will import the user's file and call its function.

    Args:
        file: The file.
        function: The function's name.
    """
    ours, theirs = connections.Pipe()
    # -P: what lies beside the program is no library of the user's
    command = [sys.executable, "-P", str(PROGRAM), str(theirs.fileno()), str(file), function, str(os.getpid())]
    with theirs:
        process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the run, which then ends its workers
        )
    return Worker(process, ours, deadline=time.monotonic() + SECONDS_TO_START)


def how_it_ended(process: subprocess.Popen) -> str:
    """Return how a process ended that has closed its connection."""
    try:
        code = process.wait(5.0)
    except subprocess.TimeoutExpired:
        return "closed its connection"
    return f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
