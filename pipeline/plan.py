"""Plan a command: assess stages, refuse what cannot work, run what is not up to date."""

import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from rich.console import Console

from pipeline.changes import Change, compare
from pipeline.config.sections import Common
from pipeline.errors import Interrupted, UserError
from pipeline.fingerprints import Today, all_needs, describe_today, missing_data
from pipeline.launch.processes import Peers
from pipeline.origin import dropped_overrides, errors_about_dropped_overrides, errors_about_other_files
from pipeline.running import Job, run_stage
from pipeline.stage import Stage, StopFlag
from pipeline.state import Flags, StageState, is_dropped, refusals
from pipeline.store.artifacts import ArtifactStore
from pipeline.store.digests import Digests
from pipeline.store.hub import Hub
from pipeline.store.remote import Remote
from pipeline.terminal import ask, at_terminal
from pipeline.tracking import Dashboard


@dataclass
class Chain:
    """Assess the stages of one experiment, each after the stages it needs."""

    experiment: Common
    """The validated experiment."""
    store: ArtifactStore
    """Its artifacts."""
    stages: Mapping[str, Stage]
    """All stages by name, in order."""
    states: dict[str, StageState] = field(default_factory=dict)
    """States of the stages assessed so far."""
    digests: Digests = field(default_factory=Digests)
    """Digests of data files and of folders from outside."""
    hub: Hub = field(default_factory=Hub)
    """Commits of names on the Hub."""
    stale_in_storage: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Manifests of artifacts that object storage has, and that are stale."""

    def needs(self, name: str) -> list[str]:
        """Return the stages that a stage needs."""
        return all_needs(self.stages[name], self.experiment)

    def today(self, name: str, from_start: bool = False) -> Today:
        """Return what a stage would be made of now.

        Args:
            name: The stage.
            from_start: Whether a run of it would start from the beginning.
        """
        manifests = {need: self.states[need].manifest for need in self.needs(name)}
        today = describe_today(
            name, self.stages[name], self.experiment, manifests, self.digests, self.hub, self.records(name), from_start
        )
        if self.store.origin is None:
            return today
        made = {"file": self.store.origin.record(self.store.base), "command_line": list(self.store.origin.overrides)}
        return replace(today, config=today.config | made)

    def records(self, name: str) -> list[dict[str, Any]]:
        """Return run.json and manifest of a stage, then those of all other stages.

        Records that are missing or unreadable are left out.
        """
        records = []
        for stage in [name, *(other for other in self.stages if other != name)]:
            for read in (self.store.run, self.store.manifest):
                with suppress(UserError):
                    records.append(read(stage))
        return [record for record in records if record is not None]

    def fetch(self, name: str, remote: Remote, console: Console) -> None:
        """Fetch a stage from object storage if it is not done here and up to date there.

        A stage with an interrupted run here is left alone.
        """
        state = self.states[name]
        if not state.can_be_fetched():
            return
        if any(self.states[need].kind != "done" for need in self.needs(name)):
            return
        there = remote.manifest(name)
        if there is None:
            return
        if compare(name, there, self.today(name)):
            self.stale_in_storage[name] = there
            return
        with self.store.lock(name):
            self.states[name] = self.assess(name)  # again: before the lock another process may have changed it
            if not self.states[name].can_be_fetched():
                return
            remote.fetch(name, there)
        print_line(console, f"{name}: {state.sentence()}; fetched from {remote.url}")
        self.states[name] = self.assess(name)

    def assess(self, name: str) -> StageState:
        """Return the state of a stage, given the states of the stages it needs."""
        store, today = self.store, self.today(name)
        store.recover_if_idle(name)
        waiting = [
            f"{need} is {self.states[need].kind}" for need in self.needs(name) if self.states[need].kind != "done"
        ]
        manifest: dict[str, Any] | None = None
        damage: list[str] = []
        reasons: list[str] = []
        since: list[Change] = []
        try:
            if store.manifest(name) is not None:
                manifest = store.verify(name)
                since = compare(name, manifest, today)
                reasons = waiting + [change.text for change in since]
        except UserError as error:
            damage = error.lines
        try:
            run = store.run(name)
        except UserError as error:
            run, damage = None, damage + error.lines
        fresh = manifest is not None and not reasons
        step, total = store.progress(name) if run is not None else (None, None)
        if store.is_held(name):
            return StageState("running", [], step, total, manifest)
        if run is not None:
            # if the artifact is up to date, a forced rerun was interrupted: --force resumes it
            changes = compare(name, run, today)
            texts = [] if fresh else waiting + [change.text for change in changes]
            return StageState("done" if fresh else "interrupted", texts, step, total, manifest, run, changes, waiting)
        if damage:
            return StageState("damaged", damage, manifest=manifest)
        if manifest is None:
            lines = missing_data(self.stages[name], self.experiment)
            return StageState("missing", [line.partition(",")[0] for line in lines])
        return StageState("stale" if reasons else "done", reasons, manifest=manifest, changes=since)

    def starts_again(self, name: str, is_target: bool, flags: Flags) -> bool:
        """Return whether a run of the stage would start from the beginning instead of resuming."""
        state = self.states[name]
        return state.run is None or state.step is None or is_dropped(is_target, state, flags)

    def conflicts_with_other_files(self, order: list[str], target: str, flags: Flags) -> list[str]:
        """Return a line for each other config whose work this command would replace.

        That is the case for finished stages and interrupted runs of the same experiment name that
        are stale under this config.
        """
        if self.store.origin is None or flags.override_config:
            return []
        replaced = [(name, self.stale_in_storage[name]) for name in order if name in self.stale_in_storage]
        for name in order:
            state = self.states[name]
            if state.kind == "stale" and state.manifest is not None:
                replaced.append((name, state.manifest))
            elif state.run is not None and state.changes and is_dropped(name == target, state, flags):
                replaced.append((name, state.run))
        return errors_about_other_files(self.store.origin, self.store.base, replaced)

    def conflicts_with_other_commands(self, order: list[str], target: str, flags: Flags) -> list[str]:
        """Return a line for the finished stages that are stale only because of the command line.

        Their command had a setting `key=value` that this command leaves out.
        """
        if self.store.origin is None or flags.override_config:
            return []
        stale: dict[str, tuple[list[str], list[Change]]] = {}
        for name in order:
            state = self.states[name]
            if state.kind == "stale":
                manifest, changes = state.manifest, state.changes
            else:
                manifest = self.stale_in_storage.get(name)
                changes = [] if manifest is None else compare(name, manifest, self.today(name))
            if manifest is not None and (words := dropped_overrides(manifest, changes, self.store.origin.overrides)):
                stale[name] = (words, changes)
        return errors_about_dropped_overrides(target, self.store.base, stale)

    def conflicts(self, order: list[str], target: str, flags: Flags) -> list[str]:
        """Return a line for each thing that a person should confirm before it is replaced."""
        files = self.conflicts_with_other_files(order, target, flags)
        return files + self.conflicts_with_other_commands(order, target, flags)

    def reassess_if_edited(self, name: str) -> None:
        """Assess a finished stage again if an input file was edited during this command."""
        state = self.states[name]
        if state.kind == "done" and state.manifest is not None and compare(name, state.manifest, self.today(name)):
            self.states[name] = self.assess(name)

    def edited_upstream(self, name: str) -> list[str]:
        """Return a line for each earlier stage that was up to date and no longer is.

        Without this check later stages would be made from old and new files.
        """
        lines = []
        for stage in self.stages:
            if stage == name:
                break
            state = self.states.get(stage)
            if state is not None and state.kind == "done" and state.manifest is not None:
                changes = compare(stage, state.manifest, self.today(stage))
                lines += [f"{stage}: {change.text} while this command ran; run again" for change in changes]
        return lines

    def closure(self, target: str) -> list[str]:
        """Return a stage and everything that it builds on, in order.

        Raises:
            UserError: If one of them reads data that the config does not give.
        """
        wanted, order = {target}, list(self.stages)
        for name in reversed(order):
            if name in wanted:
                late = [need for need in self.needs(name) if need not in order[: order.index(name)]]
                assert not late, f"{name} needs {late}, which must be listed before it"
                wanted.update(self.needs(name))
        closure = [name for name in order if name in wanted]
        if lines := missing_data_of(closure, self.stages, self.experiment):
            raise UserError(lines)
        return closure


def print_line(console: Console, line: str) -> None:
    """Print a line as it is, without markup and without wrapping."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def assess(experiment: Common, store: ArtifactStore, stages: Mapping[str, Stage]) -> dict[str, StageState]:
    """Return the state of every stage. It changes nothing, except to clean up after a crash."""
    chain = Chain(experiment, store, stages)
    for name in stages:
        chain.states[name] = chain.assess(name)
    return chain.states


def missing_data_of(names: Sequence[str], stages: Mapping[str, Stage], experiment: Common) -> list[str]:
    """Return a line for each kind of data that some stage reads and that the config does not give.

    Args:
        names: The stages to check, in order; the first that reads a kind is the one that is named.
        stages: All stages by name.
        experiment: The validated experiment.
    """
    first: dict[str, str] = {}
    for name in names:
        for line in missing_data(stages[name], experiment):
            first.setdefault(line.partition(":")[0], line)
    return list(first.values())


def wanted_stages(experiment: Common, stages: Mapping[str, Stage]) -> set[str]:
    """Return the last stage and all stages that it builds on, directly or not."""
    wanted: set[str] = set()
    for name in reversed(list(stages)):
        if not wanted or name in wanted:
            wanted |= {name, *all_needs(stages[name], experiment)}
    return wanted


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
    chain, dashboard = Chain(experiment, store, stages), Dashboard()
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
    refuse_impossible(chain, order, target, flags)
    confirm_replacing(chain, order, target, flags, stop, console, can_ask=peers is None)
    for note in chain.hub.notes:
        print_line(console, note)
    failed_uploads: list[str] = []
    for name in order:
        chain.reassess_if_edited(name)
        state = chain.states[name]
        force = flags.force and name == target
        if state.kind == "done" and state.manifest is not None and not force:
            finished = datetime.fromisoformat(state.manifest["finished_at"]).astimezone()
            print_line(console, f"{name}: up to date ({finished:%Y-%m-%d %H:%M})")
            if remote is not None:
                with store.lock(name):
                    failed_uploads += upload(remote, name, is_new=False)
            continue
        if stop.requested:
            raise Interrupted()
        with store.lock(name):
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
                    manifests={need: store.verify(need) for need in chain.needs(name)},  # hours may have passed
                    flags=flags,
                    stop=stop,
                    console=console,
                    peers=peers,
                    dashboard=dashboard,
                    wanted=tuple(order),
                )
                state = StageState("done", manifest=run_stage(job))
            chain.states[name] = state
            if remote is not None:
                failed_uploads += upload(remote, name, is_new=True)
    if failed_uploads:
        raise UserError([f"{line}. The artifact is finished here; run again to upload it" for line in failed_uploads])
    return chain.states


def refuse_unready(needs: Mapping[str, StageState]) -> None:
    """Raise UserError with a line for each needed stage that is not done: the check of --only."""
    lines = [
        f"{need}: is {state.sentence()}; run it first, or leave out --only"
        for need, state in needs.items()
        if state.kind != "done"
    ]
    if lines:
        raise UserError(lines)


def refuse_impossible(chain: Chain, order: list[str], target: str, flags: Flags) -> None:
    """Raise UserError with a line for each reason why one of the stages cannot run.

    Args:
        chain: The assessed stages.
        order: The stages that this command brings up to date.
        target: The stage that the command names.
        flags: The flags of the command.
    """
    lines = []
    for name in order:
        lines += refusals(name, name == target, chain.states[name], flags)
    for name in order:
        if chain.states[name].kind != "done" or (flags.force and name == target):
            lines += chain.stages[name].missing_requirements(chain.experiment)
            lines += chain.today(name, chain.starts_again(name, name == target, flags)).problems
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
        UserError: If nobody can be asked, or the answer is no.
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


def lines_of_remembered_settings(
    states: Mapping[str, StageState], store: ArtifactStore, overrides: Sequence[str]
) -> list[str]:
    """Return a line for `status` if stages are stale only because of the command line.

    Args:
        states: The states, as `assess` returns them.
        store: The artifacts.
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
