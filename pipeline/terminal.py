"""Ask a person at the terminal."""

import select
import sys

from pipeline.errors import Interrupted
from pipeline.stage import StopFlag


def at_terminal() -> bool:
    """Return whether a person reads the output and can answer."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def ask(question: str, stop: StopFlag) -> bool:
    """Ask a yes-or-no question.

    Args:
        question: the text; " [y/N] " is added.
        stop: set by a signal, which ends the wait for an answer.

    Returns:
        Whether the answer is yes; False without a terminal.

    Raises:
        Interrupted: a signal arrived first.
    """
    if not at_terminal():
        return False
    print(f"{question} [y/N] ", end="", flush=True)
    while not select.select([sys.stdin], [], [], 0.2)[0]:
        if stop.requested:
            raise Interrupted()
    return sys.stdin.readline().strip().lower() in ("y", "yes")
