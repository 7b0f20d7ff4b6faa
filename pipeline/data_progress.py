"""Show how far a long pass over data is: a bar on a terminal, otherwise a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

Note = Callable[[int, float | None], None]
"""Takes the rows so far, and the share of the pass that is done, as in the room `data`."""
PATIENCE = 2.0
"""Seconds after which a terminal shows a bar."""
FIRST_LINE = 5.0
"""Seconds after which the first line is printed where there is no terminal."""
BETWEEN_LINES = 30.0
"""Seconds from one line to the next; it is more where a pass takes hours."""


@contextmanager
def reading_line(what: str, console: Console | None = None) -> Iterator[Note]:
    """Give a function that is told how far a pass is, and shows it on standard error.

    Args:
        what: What the pass does.
        console: Where to show it instead.
    """
    line = ReadingLine(what, console)
    try:
        yield line.note
    finally:
        line.close()


class ReadingLine:
    """Show how far one pass is, if it takes long."""

    def __init__(self, what: str, console: Console | None = None):
        """Start the clock.

        Args:
            what: What the pass does.
            console: Where to show it; None: standard error.
        """
        self._what, self._console = what, console
        self._began = time.monotonic()
        self._next = self._began + PATIENCE
        self._is_first = True
        self._bar: Progress | None = None

    def note(self, rows: int, share: float | None) -> None:
        """Show how far the pass is, if it is time to.

        Args:
            rows: The rows so far.
            share: The share of the pass that is done, from 0 to 1; None if that is not known.
        """
        now = time.monotonic()
        if now < self._next:
            return
        if self._console is None:
            from rich.console import Console

            self._console = Console(stderr=True)
        if self._console.is_terminal:
            self._next = now + 0.1
            self._show_bar(self._console, self._text(rows, share, now), share)
            return
        elapsed = now - self._began
        if self._is_first and elapsed < FIRST_LINE:
            self._next = self._began + FIRST_LINE
            return
        self._is_first = False
        self._next = now + min(300, max(BETWEEN_LINES, elapsed / 20))
        text = f"{self._what}: {self._text(rows, share, now)}"
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Take the bar off the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _text(self, rows: int, share: float | None, now: float) -> str:
        """Return the rows, the percentage, the time so far and the time left."""
        from pipeline.tracking import format_duration, round_estimate

        elapsed = now - self._began
        parts = [f"{rows:,} rows"]
        parts += [] if share is None else [f"{share:.0%}"]
        parts.append(format_duration(elapsed))
        if share and share < 1:
            parts.append(f"about {format_duration(round_estimate(elapsed / share - elapsed))} left")
        return " · ".join(parts)

    def _show_bar(self, console: Console, text: str, share: float | None) -> None:
        """Show the bar, or what has changed of it.

        Args:
            console: A terminal.
            text: What stands beside it.
            share: How full it is; None: it only moves.
        """
        from rich.markup import escape
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        if self._bar is None:
            columns = [
                TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis")),
                BarColumn(bar_width=24 if console.width >= 100 else 8),
                TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True)),
            ]
            # Standard output may go to a file, so rich must leave it alone.
            self._bar = Progress(*columns, console=console, transient=True, redirect_stdout=False)
            self._bar.add_task(escape(self._what), total=None, text="")
            self._bar.start()
        (task,) = self._bar.task_ids
        self._bar.update(task, total=None if share is None else 1.0, completed=share or 0.0, text=text)
