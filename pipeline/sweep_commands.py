"""Run and show sweeps: `rlhf run` and `rlhf status` of several experiments at once.

Each experiment runs in a process of its own, as if its command had been typed: one that fails, or
that runs out of memory, takes no other one with it.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import api, hints
from pipeline.api import Location
from pipeline.errors import UserError
from pipeline.launch.launcher import PIPE_VARIABLE, POLL_SECONDS, own_command
from pipeline.launch.processes import rank_and_size_from_environment
from pipeline.launch.signals import SIGNALS
from pipeline.state import FLAG_NAMES, StageState
from pipeline.sweep import Member, Sweep, expand, find_sweep

if TYPE_CHECKING:
    from pipeline.store.digests import Digests

WORST_FIRST = (75, 1, 2, 3, 0)
"""Exit codes; that of a sweep is the first that one of its experiments ended with."""
OF_TARGET = ("only", "force", "restart")
"""Flags that are for the stage that the command names, and not for what it is made from."""
EDITED = "was edited while the sweep ran; run again"

Run = Callable[[list[str]], int]


def sweep_in(arguments: argparse.Namespace) -> Sweep | None:
    """Return the sweep that a command asks for; None for a single experiment."""
    return find_sweep(arguments.config, arguments.overrides, api.experiment_class())


def members_of(sweep: Sweep, target: str) -> list[Member]:
    """Return the experiments of a sweep, validated."""
    from pipeline.config.yaml_tree import read_tree

    return expand(sweep, target, lambda words: api.check(read_tree(sweep.path, words)), api.all_stages())


# -- run -----------------------------------------------------------------------------------------


@dataclass
class Progress:
    """Hold how far a sweep has come."""

    codes: dict[str, int] = field(default_factory=dict)
    """Exit code of each experiment that was run."""
    notes: dict[str, str] = field(default_factory=dict)
    """What happened to each experiment, in words."""
    received: list[int] = field(default_factory=list)
    """The signals that this process got."""

    def worst(self) -> int:
        """Return the exit code of the sweep."""
        codes = {code if code in WORST_FIRST else 1 for code in self.codes.values()}
        return next((code for code in WORST_FIRST if code in codes), 0)


def run_sweep(arguments: argparse.Namespace, sweep: Sweep) -> int:
    """Bring a stage of every variant up to date, one after another, and first what they share.

    Args:
        arguments: The arguments of `rlhf run`.
        sweep: The sweep that they ask for.

    Returns:
        The worst exit code of the experiments (75, 1, 2, 3, 0).

    Raises:
        UserError: If the sweep has a mistake; then nothing has run.
    """
    if arguments.submit is not None or arguments.dry_run:
        raise UserError(
            "command line: --submit takes one experiment; `rlhf status -c CONFIG` lists the settings of each variant"
        )
    if rank_and_size_from_environment()[1] > 1:
        raise UserError("sweep: starts its experiments itself; run it without torchrun or accelerate")
    members = members_of(sweep, arguments.stage)
    variants = [member for member in members if member.is_variant]
    shared = [] if arguments.only else [member for member in members if not member.is_variant]
    text, progress = sweep.path.read_bytes(), Progress()
    makers = ", ".join(member.name for member in shared)
    say(f"sweep: {len(variants)} variants of {arguments.stage}" + (f"; {makers} first, for all" if makers else ""))
    before = {number: signal.signal(number, lambda number, _: progress.received.append(number)) for number in SIGNALS}
    try:
        for position, member in enumerate([*shared, *variants], 1):
            if sweep.path.read_bytes() != text:
                raise UserError(f"{sweep.path}: {EDITED}")
            say(f"\n[{position}/{len(shared) + len(variants)}] {member.name}")
            run_member(arguments, member, progress)
            if progress.received or progress.codes.get(member.name) == 75:
                say("\nstopped; run again to resume")
                return 75
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    say("\nsweep:")
    for member in [*shared, *variants]:
        say(f"  {member.name}: {progress.notes[member.name]}")
    return progress.worst()


def run_member(arguments: argparse.Namespace, member: Member, progress: Progress) -> None:
    """Run the stages of one experiment, each in a process, and note how that ended.

    Args:
        arguments: The arguments of `rlhf run`.
        member: The experiment.
        progress: Receives the outcome.
    """
    failed = [name for name in dict.fromkeys(member.taken.values()) if progress.codes.get(name)]
    if failed:
        progress.codes[member.name] = progress.codes[failed[0]]
        progress.notes[member.name] = f"not run, because {', '.join(failed)} failed"
        say(progress.notes[member.name])
        return
    progress.codes[member.name] = 0
    for target in [arguments.stage] if member.is_variant else member.targets:
        code = run_process(arguments.words, words_of(arguments, member, target), progress.received)
        if code:
            progress.codes[member.name] = code
            progress.notes[member.name] = f"{target} ended with {code}"
            return
    progress.notes[member.name] = "done"


def words_of(arguments: argparse.Namespace, member: Member, target: str) -> list[str]:
    """Return the words after `rlhf` that bring a stage of one experiment up to date."""
    words = ["run", target, "-c", arguments.config, "--artifacts", arguments.artifacts]
    for name in FLAG_NAMES:
        if getattr(arguments, name) and (member.is_variant or name not in OF_TARGET):
            words.append("--" + name.replace("_", "-"))
    if arguments.debug:
        words.append("--debug")
    return [*words, *member.overrides]


def run_process(argv: list[str], words: list[str], received: list[int]) -> int:
    """Run `rlhf` with other words, pass signals on, and return its exit code.

    Args:
        argv: The words of this process.
        words: The words of the new one.
        received: The signals that this process got; handlers append to it.

    Returns:
        The exit code; 1 if a signal ended the process.
    """
    if received:
        return 75
    passed_on = 0
    # nothing is written to this pipe: it closes if this process dies, and the other one then stops
    reading, writing = os.pipe()
    try:
        child = subprocess.Popen(
            own_command(argv, words),
            env=os.environ | {PIPE_VARIABLE: str(reading)},
            pass_fds=[reading],
            start_new_session=True,  # Ctrl-C then reaches it once, through this process
        )
        while child.poll() is None:
            while passed_on < len(received):
                child.send_signal(received[passed_on])
                passed_on += 1
            time.sleep(POLL_SECONDS)
    finally:
        os.close(reading)
        os.close(writing)
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        print(f"error: {shlex.join(['rlhf', *words])}: was ended by {name}; run again to resume", file=sys.stderr)
        return 1
    return child.returncode


def say(line: str) -> None:
    """Print a line before the next process prints its own."""
    print(line, flush=True)


# -- status --------------------------------------------------------------------------------------


def show_sweep(arguments: argparse.Namespace, sweep: Sweep, console: Any) -> int:
    """Print a row for each experiment of a sweep, and the settings that choose each variant.

    Args:
        arguments: The arguments of `rlhf status`.
        sweep: The sweep that they ask for.
        console: Where to print.
    """
    from rich.table import Table
    from rich.text import Text

    from pipeline.chain import print_line
    from pipeline.store.digests import memory_below

    members = members_of(sweep, last_stage())
    set_environment_of(sweep, members)
    caller = hints.caller_from(arguments)
    table = Table(title=f"sweep of {', '.join(sweep.axes)} in {arguments.artifacts}", title_justify="left")
    for title in ("experiment", "makes", "takes", "when", "result"):
        table.add_column(title, overflow="fold")
    digests = memory_below(Location.of(arguments.artifacts).folder)  # of all experiments: each file is read once
    digests.trusts = not arguments.verify
    for member in members:
        states = states_of(sweep, member, arguments, digests)
        makes = [f"{name}: {hints.filled(states[name].sentence(), caller)}" for name in member.made]
        takes = [taken_line(maker, member, states) for maker in dict.fromkeys(member.taken.values())]
        when, result = finished(member, states)
        cells = (member.name, "\n".join(makes), "\n".join(takes), when, result)
        table.add_row(*map(Text, cells), style="" if member.is_variant else "dim")
    console.print(table)
    for line in digests.sentences():
        print_line(console, line)
    for member in members:
        if member.is_variant:
            print_line(console, f"{member.name}: -c {arguments.config} {shlex.join(member.overrides)}")
    return 0


def last_stage() -> str:
    """Return the last stage, which shows a whole experiment."""
    return list(api.stages())[-1]


def set_environment_of(sweep: Sweep, members: Sequence[Member]) -> None:
    """Set this process's environment: online if any experiment names something on the Hub."""
    from pipeline.config.sections import names_hub
    from pipeline.config.yaml_tree import read_tree
    from pipeline.launch import environment

    trees = [read_tree(sweep.path, member.overrides).values for member in members]
    environment.set_environment(next((values for values in trees if names_hub(values)), trees[0]))


def states_of(sweep: Sweep, member: Member, arguments: argparse.Namespace, digests: "Digests") -> dict[str, StageState]:
    """Return the state of every stage of one experiment.

    Args:
        sweep: The sweep.
        member: The experiment.
        arguments: The arguments of `rlhf status`.
        digests: What is known of files.
    """
    from pipeline import chain
    from pipeline.config.yaml_tree import read_tree

    experiment = api.check(read_tree(Path(arguments.config), member.overrides))
    store = api.open_store(experiment, Location.of(arguments.artifacts))
    store.digests = digests
    return chain.assess(experiment, store, api.all_stages())


def taken_line(maker: str, member: Member, states: dict[str, StageState]) -> str:
    """Return the stages that one experiment takes from another, and those that are not there."""
    mine = [stage for stage, name in member.taken.items() if name == maker]
    lacking = [f"{stage} {states[stage].kind}" for stage in mine if states[stage].kind != "done"]
    text = f"{', '.join(mine)} from {maker}"
    return f"{text} ({', '.join(lacking)})" if lacking else text


def finished(member: Member, states: dict[str, StageState]) -> tuple[str, str]:
    """Return when the last finished stage of an experiment ended, and its first figures."""
    from pipeline.record import headline

    done = [name for name in member.made if states[name].kind == "done"]
    manifests = {name: states[name].manifest or {} for name in done}
    if not done:
        return "", ""
    when = datetime.fromisoformat(manifests[done[-1]]["finished_at"]).astimezone()
    told = [name for name in done if name != last_stage()] or done  # a report's figures are not results
    figures = headline(api.all_stages()[told[-1]], manifests[told[-1]]["metrics"])
    return f"{when:%Y-%m-%d %H:%M}", f"{told[-1]}: {' · '.join(figures)}" if figures else ""
