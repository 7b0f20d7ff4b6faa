"""Print lines with the commands in them filled in."""

from typing import Any

from rich.console import Console

from pipeline import hints


class FilledConsole(Console):
    """Print as rich does, with the commands in plain text as this caller would type them."""

    def __init__(self, caller: hints.Caller | None = None, width: int | None = None) -> None:
        """Build the console.

        Args:
            caller: How the user calls the running command; None: text is printed as it is.
            width: Width in columns; None: rich finds it out.
        """
        super().__init__(width=width)
        self.caller = caller

    def print(self, *objects: Any, **options: Any) -> None:
        """Print objects as rich does."""
        caller = self.caller
        if caller is not None:
            objects = tuple(hints.filled(thing, caller) if isinstance(thing, str) else thing for thing in objects)
        super().print(*objects, **options)
