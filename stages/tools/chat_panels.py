"""Print the answers of a turn side by side."""

from collections.abc import Sequence
from typing import Any

from stages.tools.chat_speakers import Answer

COLOURS = ("blue", "dark_orange3", "medium_purple", "green")
MIN_WIDTH = 36
"""Columns that a panel needs beside another one."""


def print_panels(answers: Sequence[tuple[str, Answer]], console: Any) -> None:
    """Print a panel for each answer, side by side, or one below another in a narrow terminal.

    The highest score of a finished answer is green.

    Args:
        answers: The name of each policy and its answer.
        console: A rich Console.
    """
    from rich.table import Table

    scores = [answer.score for _, answer in answers if answer.score is not None]
    highest_score = max(scores) if len(scores) > 1 else None
    panels = []
    for i, (name, answer) in enumerate(answers):
        is_best = highest_score is not None and answer.score == highest_score and answer.finished
        panels.append(make_panel(name, answer, is_best, COLOURS[i % len(COLOURS)]))
    if console.width < MIN_WIDTH * len(panels):
        for panel in panels:
            console.print(panel)
        return
    options = console.options.update_width(console.width // len(panels))
    height = max(len(console.render_lines(panel, options)) for panel in panels)
    grid = Table.grid(expand=True)
    for panel in panels:
        panel.height = height
        grid.add_column(ratio=1)
    grid.add_row(*panels)
    console.print(grid)


def make_panel(name: str, answer: Answer, is_best: bool, colour: str) -> Any:
    """Return the panel of one answer, with its score and length below it."""
    from rich import box
    from rich.panel import Panel
    from rich.text import Text

    foot = Text()
    if answer.score is not None:
        foot.append(f"score {answer.score:+.2f}", "bold green" if is_best else "").append(" · ")
    foot.append("1 token" if answer.tokens == 1 else f"{answer.tokens} tokens")
    if not answer.finished:
        foot.append(", cut off")
    # A model can write escape codes, so only printable characters reach the terminal.
    text = "".join(c if c.isprintable() or c == "\n" else "�" for c in answer.text)
    return Panel(
        Text(answer.problem, "red") if answer.problem else Text(text or "(empty)"),
        title=Text(name, "bold"),
        title_align="left",
        subtitle=None if answer.problem else foot,
        subtitle_align="right",
        padding=(0, 1),
        box=box.ROUNDED,
        border_style=colour,
    )
