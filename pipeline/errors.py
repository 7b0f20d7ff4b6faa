"""What can end a command, and with which exit code: see `cli.py`."""

from collections.abc import Iterable


class UserError(ValueError):
    """The user's mistake (exit 2): one or more lines "WHERE: what is wrong; what would be right"."""

    def __init__(self, lines: str | Iterable[str]):
        self.lines = [lines] if isinstance(lines, str) else list(lines)
        super().__init__("\n".join(self.lines))


class Interrupted(Exception):
    """A signal asked for a stop and the stage obeyed (exit 75), after it saved what it had; `step` of `total`
    is done."""

    def __init__(self, step: int | None = None, total: int | None = None):
        self.step, self.total = step, total
        super().__init__(f"stopped at step {step} of {total}")


class TrainingStopped(Exception):
    """Training stopped itself (exit 3): a loss or gradient was not finite, or a guard fired. The message says
    at which step."""


class PeerLost(Exception):
    """Another process of this run is gone, or did not answer in time (exit 1). What was saved stays."""
