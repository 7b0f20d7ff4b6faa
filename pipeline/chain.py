"""Assess the stages of an experiment: what is done, and what a command would replace."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline import taking
from pipeline.changes import Change, compare
from pipeline.config.sections import Common
from pipeline.errors import UserError
from pipeline.fingerprints import Today, all_needs, describe_today, files_beside, missing_data, sources
from pipeline.origin import dropped_overrides, errors_about_dropped_overrides, errors_about_other_files
from pipeline.stage import Stage
from pipeline.state import Flags, StageState, is_dropped
from pipeline.store.artifacts import ArtifactStore
from pipeline.store.digests import Digests, files_at
from pipeline.store.files import human_bytes
from pipeline.store.hub import Hub
from pipeline.store.remote import Remote

MANY_BYTES = 2 * 10**9  # from which on it is said that files are being read


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
    hub: Hub = field(default_factory=Hub)
    """Commits of names on the Hub."""
    stale_in_storage: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Manifests of artifacts that object storage has, and that are stale."""

    @property
    def digests(self) -> Digests:
        """Digests of files, as far as this command and earlier ones have computed them."""
        return self.store.digests

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
        shown = {other: manifest["digest"] for other, manifest in self.shown(name).items()}
        records = self.records(name)
        today = describe_today(
            name, self.stages[name], self.experiment, manifests, self.digests, self.hub, records, from_start, shown
        )
        today = replace(today, config=today.config | taking.record(self.experiment, self.store, self.needs(name)))
        if self.store.origin is None:
            return today
        made = {"file": self.store.origin.record(self.store.base), "command_line": list(self.store.origin.overrides)}
        return replace(today, config=today.config | made)

    def shown(self, name: str) -> dict[str, dict[str, Any]]:
        """Return the manifests of the stages that a stage shows and that can be shown.

        Those are finished and whole, and the stages that they were made of are still the same.
        Their settings may be of another command.
        """
        manifests = {}
        for other in self.stages[name].shows(self.experiment):
            with suppress(UserError):
                manifest = self.store.verify(other, trusting=True)
                made_of = {need: digest for need, digest in manifest["inputs"].items() if need in self.stages}
                if made_of == {need: self.digest_of(need) for need in made_of}:
                    manifests[other] = manifest
        return manifests

    def digest_of(self, name: str) -> str | None:
        """Return the digest of a stage's artifact, as it was assessed; None without an artifact."""
        state = self.states.get(name)
        manifest = self.store.manifest(name) if state is None else state.manifest
        return None if manifest is None else manifest["digest"]

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
        if state.taken_from:
            self.fetch_taken(name, remote, console)
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

    def fetch_taken(self, name: str, remote: Remote, console: Console) -> None:
        """Fetch a stage of another experiment, which this one takes, into that experiment's folder.

        The folder of this machine mirrors the storage, so this changes no artifact.
        """
        state, foreign = self.states[name], self.store.taken[name]
        if state.kind == "done" or foreign.root != self.store.root:
            return
        owner = ArtifactStore(foreign.root, state.taken_from)
        storage = Remote(remote.url, owner)
        there = storage.manifest(name)
        if there is None or compare(name, there, self.today(name)):
            return
        with owner.lock(name):
            storage.fetch(name, there)
        print_line(console, f"{name}: {state.sentence()}; fetched from {remote.url}")
        self.states[name] = self.assess(name)

    def assess(self, name: str) -> StageState:
        """Return the state of a stage, given the states of the stages it needs."""
        if name in self.store.taken:
            return self.assess_taken(name)
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
                manifest = store.verify(name, trusting=True)
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

    def assess_taken(self, name: str) -> StageState:
        """Return the state of a stage that is taken from another experiment.

        Only its finished artifact counts: a run of the other experiment that is active or was
        interrupted changes nothing until it is published.
        """
        of = taking.taken_from(self.experiment)[name], self.store.is_beside(name)
        try:
            if self.store.manifest(name) is None:
                origin = taking.origin_there(self.store.taken[name], name, self.stages)
                reasons = [f"{of[0]} takes it from {origin}"] if origin else []
                return StageState("missing", reasons, taken_from=of[0], is_beside=of[1])
            manifest = self.store.verify(name, trusting=True)
        except UserError as error:
            return StageState("damaged", error.lines, taken_from=of[0], is_beside=of[1])
        changes = compare(name, manifest, self.today(name))
        waiting = [
            f"{need} is {self.states[need].kind}" for need in self.needs(name) if self.states[need].kind != "done"
        ]
        reasons = waiting + [change.text for change in changes]
        return StageState(
            "stale" if reasons else "done",
            reasons,
            manifest=manifest,
            changes=changes,
            waiting=waiting,
            taken_from=of[0],
            is_beside=of[1],
        )

    def confirm_outside(self, names: Sequence[str], console: Console) -> bool:
        """Read the user's files that runs of stages would use; see `_confirm`."""
        paths: list[Path] = []
        for name in names:
            paths += self.stages[name].folders(self.experiment).values()
            for source in sources(self.stages[name], self.experiment).values():
                for part in source.parts or (source,):
                    paths += [*([part.path] if part.path is not None else []), *files_beside(part).values()]
        found: list[Path] = []
        for path in paths:
            with suppress(OSError):  # `today` says what is wrong
                found += [file for file in files_at(path).values() if file.is_file()]
        return self._confirm(found, names, console)

    def confirm_made(self, names: Sequence[str], console: Console) -> bool:
        """Read the published files that runs of stages would use; see `_confirm`."""
        used = dict.fromkeys(need for name in names for need in (*self.needs(name), *self.shown(name)))
        return self._confirm([path for need in used for path in self.store.published(need)], names, console)

    def _confirm(self, files: Sequence[Path], names: Sequence[str], console: Console) -> bool:
        """Read files that this command has not read, before stages use them.

        What earlier commands remembered says what is up to date, but damage of a disk changes no
        times. If a file differs from what was remembered, all stages are assessed again.

        Args:
            files: The files, as far as they are there.
            names: The stages that use them.
            console: Where it is said if that takes long.

        Returns:
            Whether a file differed.
        """
        files = list(dict.fromkeys(files))
        if (unread := self.digests.unread_bytes(files)) > MANY_BYTES:
            print_line(console, f"{', '.join(names)}: reading {human_bytes(unread)} of inputs, which may be damaged")
        if not self.digests.confirm(files):
            return False
        for name in list(self.states):
            self.states[name] = self.assess(name)
        return True

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
            if state.taken_from:
                continue
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
            if state.taken_from:
                continue
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
        """Return a stage and everything that it builds on, in order; see `closure_of`."""
        closure = closure_of(target, self.experiment, self.stages)
        if lines := missing_data_of(closure, self.stages, self.experiment):
            raise UserError(lines)
        return closure


def closure_of(target: str, experiment: Common, stages: Mapping[str, Stage]) -> list[str]:
    """Return a stage and everything that it builds on, in order."""
    wanted, order = {target}, list(stages)
    for name in reversed(order):
        if name in wanted:
            needs = all_needs(stages[name], experiment)
            late = [need for need in needs if need not in order[: order.index(name)]]
            assert not late, f"{name} needs {late}, which must be listed before it"
            wanted.update(needs)
    return [name for name in order if name in wanted]


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
