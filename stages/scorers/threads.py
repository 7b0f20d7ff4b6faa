"""Wait for several things at a time, in threads, while the calling thread listens to signals."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")

POLL_SECONDS = 0.1
"""Time between two calls of `poll`."""


def in_threads(
    jobs: Sequence[Job], work: Callable[[Job, threading.Event], Result], count: int, poll: Callable[[], None]
) -> Iterator[tuple[int, Result]]:
    """Yield (index of a job, its result) as the jobs are done, in any order.

    Where this ends early, because `poll` or a job has raised or the caller reads no further, no
    more jobs begin. Those that run are told by their event; nobody waits for them.

    Args:
        jobs: What is to be done.
        work: Does a job; it should return soon after its event is set.
        count: The most threads.
        poll: Is called in the calling thread while it waits; what it raises ends all.

    Raises:
        Exception: What a job raises.
    """
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(jobs)):
        todo.put(index)
    done: queue.SimpleQueue[tuple[int, Result | None, BaseException | None]] = queue.SimpleQueue()
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            try:
                index = todo.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((index, work(jobs[index], stop), None))
            except BaseException as error:
                done.put((index, None, error))

    for _ in range(min(count, len(jobs))):
        # daemons: a request that hangs must not keep the process alive
        threading.Thread(target=run, daemon=True).start()
    try:
        for _ in jobs:
            index, result, error = next_of(done, poll)
            if error is not None:
                raise error
            yield index, result  # type: ignore[misc]
    finally:
        stop.set()


def next_of(done: queue.SimpleQueue, poll: Callable[[], None]) -> tuple:
    """Return the next entry of a queue, calling `poll` while waiting."""
    while True:
        poll()
        try:
            return done.get(timeout=POLL_SECONDS)
        except queue.Empty:
            continue
