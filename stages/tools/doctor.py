"""Print what this machine and installation can do, and commands that add what is missing.

Each line is marked ✓ (good), – (optional, or worth knowing) or ✗ (required and missing, exit code
2).
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages.tools.doctor_checks import (
    BAD,
    GOOD,
    NOTE,
    Line,
    check_installation,
    check_network,
    check_optional,
    check_storage,
)
from stages.tools.doctor_config import check_config
from stages.tools.doctor_machine import check_machine

STYLES = {GOOD: "green", NOTE: "dim", BAD: "bold red"}
"""How the mark of a line is printed."""


def run(
    experiment: Any = None, artifacts: str | Path = "artifacts", console: Any = None, fill: Callable[[str], str] = str
) -> int:
    """Run all checks, and print their findings.

    Args:
        experiment: The validated experiment; None checks only the machine.
        artifacts: The folder of all experiments.
        console: A rich Console; by default the terminal.
        fill: Turns a remedy into the command as the user would type it.

    Returns:
        The exit code: 0, or 2 if something required is missing.
    """
    from rich.console import Console
    from rich.text import Text

    if console is None:
        is_wide_enough = sys.stdout.isatty() or "COLUMNS" in os.environ
        console = Console(width=None if is_wide_enough else 140)
    missing = []
    for title, findings in (
        ("installation", check_installation()),
        ("machine", check_machine(experiment)),
        ("artifacts", check_storage(artifacts)),
        ("config", check_config(experiment)),
        ("network", check_network(experiment)),
        ("optional", check_optional(experiment)),
    ):
        lines = list(findings)
        missing += [line.what for line in lines if line.mark == BAD]
        console.print(make_table(title, lines, fill))
        console.print()
    if missing:
        console.print(Text(f"{len(missing)} missing: {', '.join(missing)}", "bold red"))
        return 2
    console.print(Text("everything that is needed is here", "green"))
    return 0


def make_table(title: str, lines: list[Line], fill: Callable[[str], str]) -> Any:
    """Return a rich Table of the findings of one check."""
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, show_header=False, padding=(0, 2, 0, 0)
    )
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, min_width=23)
    table.add_column(overflow="fold")
    for line in lines:
        found = Text(line.found)
        if line.remedy:
            found.append(f"\n→ {fill(line.remedy)}", "cyan" if line.mark == NOTE else "bold cyan")
        what = Text(line.what, "dim" if line.mark == NOTE else "")
        table.add_row(Text(line.mark, STYLES[line.mark]), what, found)
    return table
