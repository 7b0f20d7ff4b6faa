"""Fill in the commands that messages advise, so that the user can copy them as they are.

Code writes `rlhf run sft -c CONFIG --force` in backticks and knows nothing of the command line.
Where the line is printed, the program, the config, the artifacts and the settings of the running
command are filled in.
"""

import argparse
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
    """Describe how the user calls the running command."""

    program: str = "rlhf"
    """The program, as a shell finds it."""
    place: str = ""
    """`-c FILE` and, unless it is the default, `--artifacts DIR`; "" without a config."""
    settings: str = ""
    """Settings `key=value` of the command line, and flags that other commands need too."""


def caller_of(
    config: str | None, artifacts: str | None, settings: Sequence[str] = (), flags: Sequence[str] = ()
) -> Caller:
    """Return the caller.

    Args:
        config: The file given with -c; None without one.
        artifacts: The folder or address given with --artifacts.
        settings: The settings `key=value` of the command line.
        flags: Flags that the user's other commands need as well.
    """
    if config is None:
        return Caller(program(), "", shlex.join([*settings, *flags]))
    words = ["-c", config]
    if artifacts not in (None, "artifacts"):
        words += ["--artifacts", str(artifacts)]
    return Caller(program(), shlex.join(words), shlex.join([*settings, *flags]))


def caller_from(arguments: argparse.Namespace | None) -> Caller:
    """Return the caller for parsed arguments; None: they could not be parsed."""
    if arguments is None:
        return caller_of(None, None)
    flags = ["--trust-remote-code"] if arguments.trust_remote_code else []
    return caller_of(arguments.config, arguments.artifacts, arguments.overrides, flags)


def program() -> str:
    """Return the name that starts this command: `rlhf` if a shell finds it, otherwise a path."""
    called = sys.argv[0]
    if called.endswith(os.path.join("pipeline", "cli.py")):
        python = Path(sys.executable)
        text = os.path.relpath(python) if python.is_relative_to(Path.cwd()) else str(python)
        return f"{shlex.quote(text)} -m pipeline.cli"
    if Path(called).name != "rlhf" or not Path(called).is_file():
        return "rlhf"  # called from another program
    in_path = shutil.which("rlhf")
    if in_path is not None and os.path.samefile(in_path, called):
        return "rlhf"
    path = Path(called).absolute()
    return shlex.quote(os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path))


def filled(text: str, caller: Caller) -> str:
    """Return a line in which each command reads as this caller would type it.

    Args:
        text: The line, with commands such as `rlhf run sft -c CONFIG` in backticks.
        caller: How the user calls the running command.
    """

    def command(match: re.Match[str]) -> str:
        words = match[1]
        if caller.place and "-c CONFIG" in words:
            words = words.replace("-c CONFIG", caller.place, 1)
            words = f"{words} {caller.settings}" if caller.settings else words
        return f"`{caller.program} {words}`"

    return COMMAND.sub(command, text)
