"""Turn signals into a request to stop at the next step."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pipeline.launch.processes import rank_and_size_from_environment
from pipeline.stage import StopFlag

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
NOTE = b"\nstopping after this step and saving; send the signal again to stop at once\n"


@contextmanager
def stop_on_signals(stop: StopFlag, note: bytes = NOTE) -> Iterator[None]:
    """Set a flag when SIGTERM, SIGINT or SIGUSR1 arrives.

    A second SIGTERM or SIGINT ends the process at once. The first one after SIGUSR1 does not count
    as the second: a queue sends SIGUSR1 as a warning and SIGTERM later, and a save may be running.

    In several processes only rank 0 reacts: it saves for all and ends the others. Outside the main
    thread Python cannot set handlers, and nothing happens.

    Args:
        stop: The flag that the running stage polls.
        note: What the first signal prints.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    is_first_rank = rank_and_size_from_environment()[0] == 0
    received: list[int] = []  # SIGTERM and SIGINT so far

    def handle(number: int, frame: FrameType | None) -> None:
        if not is_first_rank:
            return
        if number != signal.SIGUSR1:
            if received:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            received.append(number)
        if not stop.requested:
            stop.requested = True
            os.write(2, note)  # print is not safe inside a signal handler

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
