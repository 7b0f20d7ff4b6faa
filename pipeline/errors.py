"""Define the errors that end a command; `pipeline/cli.py` turns each into an exit code."""

from collections.abc import Iterable


class UserError(ValueError):
    """Report a mistake of the user's in config, data or artifacts (exit 2)."""

    def __init__(self, lines: str | Iterable[str]) -> None:
        """Build the error from one line or several, "PLACE: what is wrong; what to do" each."""
        self.lines = [lines] if isinstance(lines, str) else list(lines)
        super().__init__("\n".join(self.lines))


class Interrupted(Exception):
    """Report that a stage saved its state and stopped on a signal (exit 75)."""

    def __init__(self, step: int | None = None, total: int | None = None) -> None:
        """Build the error from the steps that are done and the steps in all, if they are known."""
        self.step, self.total = step, total
        super().__init__(f"stopped at step {step} of {total}")


class TrainingStopped(Exception):
    """Report that a training stopped itself (exit 3).

    Its loss or gradient was not finite, or an alarm was set to stop it. The message names the step.
    """


class PeerLost(Exception):
    """Report that another process of this run ended, or did not answer in time (exit 1).

    What was saved stays, so the run can be resumed.
    """
