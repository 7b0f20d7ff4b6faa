"""Which stage needs which; what is done, stale (and why) or interrupted (and where); bringing a stage up to
date."""

import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from rich.console import Console

from pipeline.changes import Change, compare
from pipeline.errors import Interrupted, UserError
from pipeline.fingerprints import Today, all_needs, describe_today, missing_data
from pipeline.launch.processes import Peers
from pipeline.origin import dropped_overrides, errors_about_dropped_overrides, errors_about_other_files
from pipeline.running import Flags, Job, is_dropped, refusals, run_stage
from pipeline.stage import StopFlag
from pipeline.store.artifacts import ArtifactStore
from pipeline.store.digests import Digests
from pipeline.store.hub import Hub
from pipeline.store.remote import Remote
from pipeline.terminal import ask, at_terminal
from pipeline.tracking import Dashboard


@dataclass
class StageState:
    """kind: done, stale, interrupted, running, missing or damaged; reasons: why it is not done, a phrase
    each."""

    kind: str
    reasons: list[str] = field(default_factory=list)
    step: int | None = None
    total: int | None = None
    manifest: dict[str, Any] | None = None  # of the finished artifact, fresh or stale, if it holds
    run: dict[str, Any] | None = None  # run.json of an interrupted run
    changes: list[Change] = field(default_factory=list)  # since the stage was finished, or the interrupted run began
    waiting: list[str] = field(default_factory=list)  # "rm is stale": what must run before

    def sentence(self) -> str:
        """The state as `status` shows it: "stale because ppo.kl_coef 0.05 → 0.1"."""
        text = self.kind
        if self.kind in ("interrupted", "running") and self.step is not None:
            text += f" at step {self.step}" + (f" of {self.total}" if self.total else "")
        elif self.kind == "interrupted":
            text += " before anything was saved"
        if self.reasons:
            text += {"damaged": ": ", "interrupted": "; "}.get(self.kind, " because ") + "; ".join(self.reasons)
        return text


@dataclass
class Chain:
    """One look at the stages of an experiment, each after what it needs. `states` fills up on the way."""

    experiment: Any
    store: ArtifactStore
    stages: dict[str, Any]  # modules by name
    states: dict[str, StageState] = field(default_factory=dict)
    digests: Digests = field(default_factory=Digests)  # of data files and folders from outside
    hub: Hub = field(default_factory=Hub)
    elsewhere: dict[str, dict[str, Any]] = field(default_factory=dict)  # stale ones, of the storage

    def needs(self, name: str) -> list[str]:
        return all_needs(self.stages[name], self.experiment)

    def today(self, name: str, anew: bool = False) -> Today:
        """What the stage would be made of now. anew: it will begin from the beginning."""
        manifests = {need: self.states[need].manifest for need in self.needs(name)}
        facts = (self.digests, self.hub, self.records(name), anew)
        today = describe_today(name, self.stages[name], self.experiment, manifests, *facts)
        if self.store.origin is None:
            return today
        made = {"file": self.store.origin.record(self.store.base), "command_line": list(self.store.origin.overrides)}
        return replace(today, config=today.config | made)

    def records(self, name: str) -> list[dict[str, Any]]:
        """run.json and manifest of the stage, then those of the others, as far as they can be read."""
        found = []
        for stage in [name, *(other for other in self.stages if other != name)]:
            for read in (self.store.run, self.store.manifest):
                with suppress(UserError):
                    found.append(read(stage))
        return [record for record in found if record is not None]

    def fetch(self, name: str, remote: Remote, console: Console) -> None:
        """Where a stage is not done here, and no run of it was interrupted, take it from the storage if it is up to
        date there."""
        state = self.states[name]
        if not is_wanting(state):
            return
        if any(self.states[need].kind != "done" for need in self.needs(name)):
            return
        there = remote.manifest(name)
        if there is None:
            return
        if compare(name, there, self.today(name)):
            self.elsewhere[name] = there
            return
        with self.store.lock(name):
            self.states[name] = self.assess(name)  # again, now that nobody else can change it
            if not is_wanting(self.states[name]):
                return
            remote.fetch(name, there)
        line = f"{name}: {state.sentence()}; fetched from {remote.url}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
        self.states[name] = self.assess(name)

    def assess(self, name: str) -> StageState:
        """The state of one stage, given the states of those it needs."""
        store, today = self.store, self.today(name)
        store.recover_if_idle(name)
        waiting = [
            f"{need} is {self.states[need].kind}" for need in self.needs(name) if self.states[need].kind != "done"
        ]
        manifest, damage, reasons, since = None, [], [], []
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
            # beside a fresh artifact: a forced redo was interrupted; `--force` goes on with it
            changes = compare(name, run, today)
            texts = [] if fresh else waiting + [change.text for change in changes]
            return StageState("done" if fresh else "interrupted", texts, step, total, manifest, run, changes, waiting)
        if damage:
            return StageState("damaged", damage, manifest=manifest)
        if manifest is None:
            lines = missing_data(self.stages[name], self.experiment)
            return StageState("missing", [line.partition(",")[0] for line in lines])
        return StageState("stale" if reasons else "done", reasons, manifest=manifest, changes=since)

    def begins_anew(self, name: str, is_target: bool, flags: Flags) -> bool:
        """Whether a run of the stage will begin from the beginning, and not go on with an interrupted one."""
        state = self.states[name]
        return state.run is None or state.step is None or is_dropped(is_target, state, flags)

    def of_other_files(self, order: list[str], target: str, flags: Flags) -> list[str]:
        """A line for each other config file with finished stages or interrupted runs that this command would replace
        or drop, as they are stale by this one's settings."""
        if self.store.origin is None or flags.override_config:
            return []
        replaced = [(name, self.elsewhere[name]) for name in order if name in self.elsewhere]
        for name in order:
            state = self.states[name]
            if state.kind == "stale":
                replaced.append((name, state.manifest))
            elif state.run is not None and state.changes and is_dropped(name == target, state, flags):
                replaced.append((name, state.run))
        return errors_about_other_files(self.store.origin, self.store.base, replaced)

    def of_other_commands(self, order: list[str], target: str, flags: Flags) -> list[str]:
        """A line for the finished stages that this command would make anew for no other reason than that a setting of
        last time's command line is not on this one's."""
        if self.store.origin is None or flags.override_config:
            return []
        found = {}
        for name in order:
            state, manifest = self.states[name], self.elsewhere.get(name)
            manifest = state.manifest if state.kind == "stale" else manifest
            if manifest is not None:
                changes = state.changes if state.kind == "stale" else compare(name, manifest, self.today(name))
                if words := dropped_overrides(manifest, changes, self.store.origin.overrides):
                    found[name] = (words, changes)
        return errors_about_dropped_overrides(target, self.store.base, found)

    def replaced(self, order: list[str], target: str, flags: Flags) -> list[str]:
        """A line for each thing that a person should say yes to before this command replaces it."""
        return self.of_other_files(order, target, flags) + self.of_other_commands(order, target, flags)

    def look_again(self, name: str) -> None:
        """Assess a finished stage anew if a file that it is made of was edited since this command began."""
        state = self.states[name]
        if state.kind == "done" and compare(name, state.manifest, self.today(name)):
            self.states[name] = self.assess(name)

    def edited_before(self, name: str) -> list[str]:
        """A line for each stage in front that this command found or made up to date, and that is not any more: what
        follows would be of the old files, and of the new ones."""
        order = list(self.stages)
        before = [stage for stage in order[: order.index(name)] if stage in self.states]
        return [
            f"{stage}: {change.text} while this command ran; run again"
            for stage in before
            if self.states[stage].kind == "done"
            for change in compare(stage, self.states[stage].manifest, self.today(stage))
        ]

    def closure(self, target: str) -> list[str]:
        """The target and everything it stands on, in the order of the stages. UserError where one of them reads data
        of which the config gives none."""
        wanted, order = {target}, list(self.stages)
        for name in reversed(order):
            if name in wanted:
                late = [need for need in self.needs(name) if need not in order[: order.index(name)]]
                assert not late, f"{name} needs {late}, which must stand before it"
                wanted.update(self.needs(name))
        closure = [name for name in order if name in wanted]
        found: dict[str, str] = {}  # kind of data → what the first stage that reads it says
        for line in (line for name in closure for line in missing_data(self.stages[name], self.experiment)):
            found.setdefault(line.partition(":")[0], line)
        if found:
            raise UserError(list(found.values()))
        return closure


def is_wanting(state: StageState) -> bool:
    """Whether it is not done here and no run of it is under way or was interrupted."""
    return state.kind in ("missing", "stale", "damaged") and state.run is None


def assess(experiment: Any, store: ArtifactStore, stages: dict[str, Any]) -> dict[str, StageState]:
    """The state of every stage. Changes nothing but what a crash left half done."""
    chain = Chain(experiment, store, stages)
    for name in stages:
        chain.states[name] = chain.assess(name)
    return chain.states


def bring_up_to_date(
    target: str,
    experiment: Any,
    store: ArtifactStore,
    stages: dict[str, Any],
    flags: Flags | None = None,
    stop: StopFlag | None = None,
    console: Console | None = None,
    peers: Peers | None = None,
    remote: Remote | None = None,
) -> dict[str, StageState]:
    """Runs what is missing, stale or interrupted, upstream first and the target last; what is up to date says
    so in a line. remote: where finished stages also are: they come from there, and go there. Raises UserError,
    Interrupted, TrainingStopped, or whatever a stage raises."""
    flags, stop, console = flags or Flags(), stop or StopFlag(), console or Console()
    chain, dashboard = Chain(experiment, store, stages), Dashboard()
    order = chain.closure(target)
    late: list[str] = []  # what could not be put into the storage
    for name in order:
        chain.states[name] = chain.assess(name)
        if remote is not None and not (flags.force and name == target):
            chain.fetch(name, remote, console)
    if flags.only:
        refuse_unready({need: chain.states[need] for need in chain.needs(target)})
        order = [target]
    # before anything runs: what will be refused later would be refused after hours, and over changed inputs
    lines = [line for name in order for line in refusals(name, name == target, chain.states[name], flags)]
    for name in order:
        if chain.states[name].kind != "done" or (flags.force and name == target):
            lines += stages[name].lacks(experiment) if hasattr(stages[name], "lacks") else []
            lines += chain.today(name, chain.begins_anew(name, name == target, flags)).problems
    if lines:
        raise UserError(dict.fromkeys(lines))  # stages that read the same file say the same of it
    others = chain.replaced(order, target, flags)
    if others and peers is None and at_terminal():
        for line in others:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        if not ask("Replace what is there?", stop):
            raise UserError(f"{store.base}: nothing was replaced; the lines above say how to go on")
    elif others:
        raise UserError(others)
    for note in chain.hub.notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    for name in order:
        chain.look_again(name)
        state = chain.states[name]
        force = flags.force and name == target
        if state.kind == "done" and not force:
            finished = datetime.fromisoformat(state.manifest["finished_at"]).astimezone()
            console.print(f"{name}: up to date ({finished:%Y-%m-%d %H:%M})", markup=False, highlight=False)
            if remote is not None:
                with store.lock(name):
                    late += pushed(remote, name, made=False)
            continue
        if stop.requested:
            raise Interrupted()
        with store.lock(name):
            state = chain.assess(name)  # again, now that nobody else can change it
            chain.states[name] = state
            if state.kind != "done" or force:
                if lines := chain.edited_before(name):
                    raise UserError(lines)
                job = Job(
                    name=name,
                    is_target=name == target,
                    module=stages[name],
                    experiment=experiment,
                    store=store,
                    state=state,
                    today=chain.today(name, chain.begins_anew(name, name == target, flags)),
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
                late += pushed(remote, name, made=True)
    if late:
        raise UserError([f"{line}. What was made is here; run again to put it there" for line in late])
    return chain.states


def pushed(remote: Remote, name: str, made: bool) -> list[str]:
    """Puts a stage into the storage; → why it could not be: the stages behind it are made all the same."""
    try:
        remote.push(name, made)
    except UserError as error:
        return error.lines
    return []


def remembered(states: dict[str, StageState], store: ArtifactStore, overrides: Sequence[str]) -> list[str]:
    """A line for `status` on settings that finished stages were made with, and that its own command line leaves out:
    with them the stages may well be done.

    Args:
        states: as `assess` gave them.
        store: the artifacts.
        overrides: the settings of this command line.
    """
    then: dict[str, list[str]] = {}
    for name, state in states.items():
        if state.kind == "stale":
            for word in dropped_overrides(state.manifest, state.changes, overrides):
                then.setdefault(word, []).append(name)
    if not then:
        return []
    made = "; ".join(f"{', '.join(names)} with {word}" for word, names in then.items())
    return [f"the command line made {made}: `rlhf status -c CONFIG {shlex.join(then)}` looks with that"]


def refuse_unready(needs: dict[str, StageState]) -> None:
    """With --only: every input that is not done is an error."""
    lines = [
        f"{need}: is {state.sentence()}; run it first, or leave out --only"
        for need, state in needs.items()
        if state.kind != "done"
    ]
    if lines:
        raise UserError(lines)
