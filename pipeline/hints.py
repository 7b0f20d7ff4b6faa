"""Commands that a line advises, as the user can copy them: with the program, config, artifacts and settings of the
command that says it.

Code writes `rlhf run sft -c CONFIG --force` in backticks, and knows nothing of the command line; what prints the line
fills it in.
"""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

COMMAND = re.compile(r"`rlhf ([^`]*)`")


@dataclass(frozen=True)
class Caller:
    """How the user calls this command. place: `-c FILE` and, where it is not the usual folder, `--artifacts DIR`; ""
    without a config. settings: the command line's `key=value`, and flags that every command of this user needs."""

    program: str = "rlhf"
    place: str = ""
    settings: str = ""


def caller_of(
    config: str | None, artifacts: str | None, settings: Sequence[str] = (), flags: Sequence[str] = ()
) -> Caller:
    """Return the caller.

    Args:
        config: the file behind -c, None without one.
        artifacts: the folder or address behind --artifacts.
        settings: `key=value` of the command line.
        flags: flags that the user's other commands need as well.
    """
    words = [] if config is None else ["-c", config]
    words += [] if artifacts in (None, "artifacts") else ["--artifacts", artifacts]
    return Caller(program(), shlex.join(words) if config is not None else "", shlex.join([*settings, *flags]))


def program() -> str:
    """Return the name under which this command was started: `rlhf` where a shell finds it, otherwise its path."""
    called = sys.argv[0]
    if called.endswith(os.path.join("pipeline", "cli.py")):
        python = Path(sys.executable)
        own = os.path.relpath(python) if python.is_relative_to(Path.cwd()) else str(python)
        return f"{shlex.quote(own)} -m pipeline.cli"
    if Path(called).name != "rlhf" or not Path(called).is_file():
        return "rlhf"  # in another program
    found = shutil.which("rlhf")
    if found is not None and os.path.samefile(found, called):
        return "rlhf"
    path = Path(called).absolute()
    return shlex.quote(os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path))


def filled(text: str, caller: Caller) -> str:
    """Return a line with the commands in it as this caller would type them: CONFIG replaced, settings at the end."""

    def command(match: re.Match) -> str:
        words = match[1]
        if caller.place and "-c CONFIG" in words:
            words = words.replace("-c CONFIG", caller.place, 1)
            words = f"{words} {caller.settings}" if caller.settings else words
        return f"`{caller.program} {words}`"

    return COMMAND.sub(command, text)
