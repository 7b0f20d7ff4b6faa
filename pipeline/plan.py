"""Bring stages up to date: refuse what cannot work, ask before replacing, run what is not done."""

import shlex
from collections.abc import Mapping, Sequence
from contextlib import closing
from datetime import datetime

from rich.console import Console

from pipeline.chain import Chain, print_line
from pipeline.config.sections import Common
from pipeline.data_checks import DataChecks
from pipeline.errors import Interrupted, UserError
from pipeline.launch.processes import Peers
from pipeline.origin import dropped_overrides
from pipeline.running import Job, run_stage
from pipeline.stage import Stage, StopFlag
from pipeline.state import Flags, StageState, refusals
from pipeline.store.artifacts import ArtifactStore
from pipeline.store.remote import Remote
from pipeline.terminal import ask, at_terminal
from pipeline.trackers.names import missing_packages
from pipeline.trackers.relay import Relay


def bring_up_to_date(
    target: str,
    experiment: Common,
    store: ArtifactStore,
    stages: Mapping[str, Stage],
    flags: Flags | None = None,
    stop: StopFlag | None = None,
    console: Console | None = None,
    peers: Peers | None = None,
    remote: Remote | None = None,
) -> dict[str, StageState]:
    """Run every stage that a target needs and that is not up to date, and then the target.

    Args:
        target: The stage that the command names.
        experiment: The validated experiment.
        store: Its artifacts.
        stages: All stages by name, in order.
        flags: The flags of the command.
        stop: Set when the command is asked to stop.
        console: Where progress is printed; a stage that is up to date prints one line.
        peers: The other processes of this run, if there are any.
        remote: Object storage from which finished stages are fetched, and to which they are
            uploaded.

    Returns:
        The states of the target and of what it needs.

    Raises:
        UserError: If something must be corrected first.
        Interrupted: If it was asked to stop.
        TrainingStopped: If a training stopped itself.
    """
    flags, stop, console = flags or Flags(), stop or StopFlag(), console or Console()
    chain = Chain(experiment, store, stages)
    order = chain.closure(target)
    for name in order:
        chain.states[name] = chain.assess(name)
        if remote is not None and not (flags.force and name == target):
            chain.fetch(name, remote, console)
    if flags.only:
        refuse_unready({need: chain.states[need] for need in chain.needs(target)})
        order = [target]
    # Everything is checked before anything runs: otherwise a refusal could come after hours of
    # work, when inputs have already been replaced.
    checks = DataChecks(chain, console)
    chain.confirm_outside(going_to_run(chain, order, target, flags), console)
    refuse_impossible(chain, order, target, flags, checks)
    confirm_replacing(chain, order, target, flags, stop, console, can_ask=peers is None)
    if chain.confirm_made(going_to_run(chain, order, target, flags), console):
        refuse_unready({need: chain.states[need] for need in chain.needs(target)} if flags.only else {})
        refuse_impossible(chain, order, target, flags, checks)
    checks.remember()
    for note in chain.hub.notes:
        print_line(console, note)
    failed_uploads: list[str] = []
    with closing(Relay()) as relay:
        for name in order:
            chain.reassess_if_edited(name)
            state = chain.states[name]
            force = flags.force and name == target
            if state.kind == "done" and not force:
                print_line(console, line_of_done(name, state))
                if remote is not None and not state.taken_from:
                    with store.lock(name):
                        failed_uploads += upload(remote, name, is_new=False)
                continue
            if state.taken_from:  # the other experiment was changed during this command
                raise UserError(refusals(name, False, state, flags))
            if stop.requested:
                raise Interrupted()
            with store.lock(name):
                if state.kind != "done" or force:
                    # what other stages have published meanwhile, or anybody has replaced
                    chain.confirm_outside([name], console)
                    chain.confirm_made([name], console)
                state = chain.assess(name)  # again: before the lock another process may have changed it
                chain.states[name] = state
                if state.kind != "done" or force:
                    if lines := chain.edited_upstream(name):
                        raise UserError(lines)
                    job = Job(
                        name=name,
                        is_target=name == target,
                        stage=stages[name],
                        experiment=experiment,
                        store=store,
                        state=state,
                        today=chain.today(name, chain.starts_again(name, name == target, flags)),
                        digests=chain.digests,
                        manifests={need: store.verify(need) for need in chain.needs(name)}  # hours may have passed
                        | chain.shown(name),
                        flags=flags,
                        stop=stop,
                        console=console,
                        peers=peers,
                        relay=relay,
                        wanted=tuple(order),
                    )
                    state = StageState("done", manifest=run_stage(job))
                chain.states[name] = state
                if remote is not None:
                    failed_uploads += upload(remote, name, is_new=True)
    if failed_uploads:
        raise UserError([f"{line}. The artifact is finished here; run again to upload it" for line in failed_uploads])
    return chain.states


def nothing_to_do(
    targets: Sequence[str],
    experiment: Common,
    store: ArtifactStore,
    stages: Mapping[str, Stage],
    flags: Flags,
    console: Console,
) -> bool:
    """Say so if targets and all that they need are up to date: `bring_up_to_date` without torch.

    Args:
        targets: The stages that the command names.
        experiment: The validated experiment.
        store: Its artifacts.
        stages: All stages by name, in order.
        flags: The flags of the command.
        console: Where a line for each stage is printed.

    Returns:
        Whether that is so; otherwise nothing is printed.
    """
    if flags.force or flags.restart:
        return False
    chain = Chain(experiment, store, stages)
    orders = [chain.closure(target) for target in targets]
    for name in dict.fromkeys(name for order in orders for name in order):
        chain.states[name] = chain.assess(name)
    if any(state.kind != "done" for state in chain.states.values()):
        return False
    for target, order in zip(targets, orders, strict=True):
        for name in [target] if flags.only else order:
            print_line(console, line_of_done(name, chain.states[name]))
    return True


def line_of_done(name: str, state: StageState) -> str:
    """Return the line about a stage that is up to date."""
    assert state.manifest is not None
    finished = datetime.fromisoformat(state.manifest["finished_at"]).astimezone()
    origin = f", {state.origin()}" if state.taken_from else ""
    return f"{name}: up to date ({finished:%Y-%m-%d %H:%M}){origin}"


def going_to_run(chain: Chain, order: list[str], target: str, flags: Flags) -> list[str]:
    """Return the stages that this command makes, as they are assessed; the arguments as below."""
    made_here = [name for name in order if not chain.states[name].taken_from]
    return [name for name in made_here if chain.states[name].kind != "done" or (flags.force and name == target)]


def refuse_unready(needs: Mapping[str, StageState]) -> None:
    """Raise UserError with a line for each needed stage that is not done: the check of --only."""
    lines = [
        f"{need}: is {state.sentence()}; run it first, or leave out --only"
        for need, state in needs.items()
        if state.kind != "done"
    ]
    if lines:
        raise UserError(lines)


def refuse_impossible(chain: Chain, order: list[str], target: str, flags: Flags, checks: DataChecks) -> None:
    """Raise UserError with a line for each reason why one of the stages cannot run.

    Args:
        chain: The assessed stages.
        order: The stages that this command brings up to date.
        target: The stage that the command names.
        flags: The flags of the command.
        checks: Reads the data of the stages that are going to run.
    """
    lines = []
    for name in order:
        lines += refusals(name, name == target, chain.states[name], flags)
    for name in going_to_run(chain, order, target, flags):
        lines += missing_packages(chain.experiment.tracking.trackers)
        lines += chain.stages[name].missing_requirements(chain.experiment)
        today = chain.today(name, chain.starts_again(name, name == target, flags))
        lines += [*today.problems, *checks.lines(name, today.config["data"])]
    if lines:
        raise UserError(dict.fromkeys(lines))  # stages that read the same file report the same lines


def confirm_replacing(
    chain: Chain, order: list[str], target: str, flags: Flags, stop: StopFlag, console: Console, can_ask: bool
) -> None:
    """Ask a person before work of another config or command line is replaced.

    Args:
        chain: The assessed stages.
        order: The stages that this command brings up to date.
        target: The stage that the command names.
        flags: The flags of the command.
        stop: Set when the command is asked to stop.
        console: Where the question is printed.
        can_ask: Whether this process may ask at all.

    Raises:
        UserError: There is no terminal to ask on, or the answer is no.
    """
    conflicts = chain.conflicts(order, target, flags)
    if not conflicts:
        return
    if not can_ask or not at_terminal():
        raise UserError(conflicts)
    for line in conflicts:
        print_line(console, line)
    if not ask("Replace what is there?", stop):
        raise UserError(f"{chain.store.base}: nothing was replaced; the lines above say how to proceed")


def upload(remote: Remote, name: str, is_new: bool) -> list[str]:
    """Upload a finished stage to object storage.

    Args:
        remote: The storage.
        name: The stage.
        is_new: Whether this command made the artifact.

    Returns:
        Why it failed, if it did: the stages after it run in any case.
    """
    try:
        remote.push(name, is_new)
    except UserError as error:
        return error.lines
    return []


def lines_of_remembered_settings(states: Mapping[str, StageState], overrides: Sequence[str]) -> list[str]:
    """Return a line for `status` if stages are stale only because of the command line.

    Args:
        states: The states, as `assess` returns them.
        overrides: The settings of this command line.
    """
    then: dict[str, list[str]] = {}
    for name, state in states.items():
        if state.kind == "stale" and state.manifest is not None:
            for word in dropped_overrides(state.manifest, state.changes, overrides):
                then.setdefault(word, []).append(name)
    if not then:
        return []
    made = "; ".join(f"{', '.join(names)} with {word}" for word, names in then.items())
    return [f"made with settings on the command line: {made}; `rlhf status -c CONFIG {shlex.join(then)}` includes them"]
