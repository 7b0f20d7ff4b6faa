"""Describe the state of a stage, and decide what the flags of `rlhf run` allow in that state."""

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.changes import Change
from pipeline.launch import environment

FLAG_NAMES = ("only", "force", "restart", "override_config", "allow_elastic", "trust_remote_code")


@dataclass(frozen=True)
class Flags:
    """Hold the flags of `rlhf run`."""

    only: bool = False
    """Run only this stage; what it needs must be up to date."""
    force: bool = False
    """Run it even if it is up to date or damaged."""
    restart: bool = False
    """Drop an interrupted run and start from the beginning."""
    override_config: bool = False
    """Resume an interrupted run under changed settings; replace what other configs made."""
    allow_elastic: bool = False
    """Resume an interrupted run with another number of processes."""
    trust_remote_code: bool = False
    """Run code that a model brings."""
    command: str = ""
    """The command as it was typed; it is recorded in the manifests of what it makes."""


def flags_of(arguments: argparse.Namespace) -> Flags:
    """Return the flags of `rlhf run` from its parsed arguments."""
    return Flags(
        only=arguments.only,
        force=arguments.force,
        restart=arguments.restart,
        override_config=arguments.override_config,
        allow_elastic=arguments.allow_elastic,
        trust_remote_code=arguments.trust_remote_code,
        command=shlex.join(["rlhf", *arguments.words]),
    )


def command_of(stage: str, config: str, artifacts: str, overrides: Sequence[str], flags: Flags) -> str:
    """Return the command `rlhf run` that does the same as a call from Python.

    Args:
        stage: The stage.
        config: The experiment's YAML file.
        artifacts: Folder or address of the finished stages.
        overrides: Settings on top of the file, `key=value` each.
        flags: The flags of the call.
    """
    words = ["rlhf", "run", stage, "-c", config]
    if artifacts != "artifacts":
        words += ["--artifacts", artifacts]
    for name in FLAG_NAMES:
        if getattr(flags, name):
            words.append("--" + name.replace("_", "-"))
    return shlex.join([*words, *overrides])


@dataclass
class StageState:
    """Describe what is there of one stage."""

    kind: str
    """done, stale, interrupted, running, missing or damaged."""
    reasons: list[str] = field(default_factory=list)
    """Why it is not done, one phrase each."""
    step: int | None = None
    """Last saved step of an interrupted run; None if nothing was saved."""
    total: int | None = None
    """Steps of that run in all, if known."""
    manifest: dict[str, Any] | None = None
    """Manifest of the finished artifact, up to date or stale, if its digests hold."""
    run: dict[str, Any] | None = None
    """run.json of an interrupted run."""
    changes: list[Change] = field(default_factory=list)
    """What changed since the stage was finished, or since the interrupted run began."""
    waiting: list[str] = field(default_factory=list)
    """Stages that must run first, as phrases: "rm is stale"."""
    taken_from: str = ""
    """Experiment that the stage is taken from; "" for one that is made here."""
    is_beside: bool = False
    """Whether the stage is taken although this experiment has an artifact of its own."""

    def sentence(self) -> str:
        """Return the state as `rlhf status` shows it: "stale because ppo.kl_coef 0.05 → 0.1"."""
        text = self.kind
        if self.kind in ("interrupted", "running") and self.step is not None:
            text += f" at step {self.step}" + (f" of {self.total}" if self.total else "")
        elif self.kind == "interrupted":
            text += " before anything was saved"
        if self.reasons:
            text += {"damaged": ": ", "interrupted": "; "}.get(self.kind, " because ") + "; ".join(self.reasons)
        if not self.taken_from:
            return text
        return f"{text}, {self.origin()}" if self.kind == "done" else f"{self.origin()}: {text}"

    def origin(self) -> str:
        """Return where the stage is taken from, in words; "" if it is made here."""
        if not self.taken_from:
            return ""
        return f"from {self.taken_from}" + (" (the artifact here is not used)" if self.is_beside else "")

    def can_be_fetched(self) -> bool:
        """Return whether the stage is not done here and no run of it is active or interrupted."""
        return self.kind in ("missing", "stale", "damaged") and self.run is None and not self.taken_from


def is_dropped(is_target: bool, state: StageState, flags: Flags) -> bool:
    """Return whether the interrupted run of a stage is dropped.

    --restart drops the run of the stage that the command names. It drops the run of another stage
    only if that run could not be resumed.
    """
    return flags.restart and (is_target or bool(state.changes or state.waiting))


def refusals(name: str, is_target: bool, state: StageState, flags: Flags, processes: int | None = None) -> list[str]:
    """Return why a stage can neither start nor resume, one line each.

    Args:
        name: The stage.
        is_target: Whether the command names it.
        state: Its state.
        flags: The flags of the command.
        processes: Number of processes that will run it; None: as many as run this command.

    Returns:
        No lines if it can run, or need not run.
    """
    forced = is_target and flags.force
    if state.taken_from:
        return refusals_of_taken(name, is_target, state, flags)
    if state.kind == "damaged":
        return [] if forced or (is_target and flags.restart) else state.reasons
    if state.kind not in ("interrupted", "done") or (state.kind == "done" and not forced):
        return []
    if state.step is None or is_dropped(is_target, state, flags):
        return []
    inputs = state.waiting + [change.text for change in state.changes if not change.is_setting]
    settings = [change for change in state.changes if change.is_setting]
    since = f"{name}: interrupted at step {state.step}, since then"
    if inputs:
        return [f"{since} {text}; --restart starts again" for text in inputs + [change.text for change in settings]]
    fixed = "which cannot change while a run is interrupted; set it back to resume, --restart starts again"
    lines = [f"{since} {change.text}, {fixed}" for change in settings if change.is_fixed]
    if not flags.override_config:
        remedy = "--restart starts again, --override-config resumes with the new settings"
        for change in settings:
            if not change.is_fixed:
                lines.append(f"{since} {change.text}; {command_to_resume(name, state, change)}{remedy}")
    if lines or state.run is None:
        return lines
    before, today = state.run["world_size"], processes or environment.facts()["world_size"]
    if before != today and not flags.allow_elastic:
        return [f"{since} the number of processes {before} → {today}; --allow-elastic resumes"]
    return []


def refusals_of_taken(name: str, is_target: bool, state: StageState, flags: Flags) -> list[str]:
    """Return why a stage cannot be taken from another experiment, one line each; see `refusals`."""
    own = f"leave {name} and the stages made from it out of from.stages to make them here"
    if is_target and (flags.force or flags.restart):
        flag = "--force" if flags.force else "--restart"
        return [f"{name}: is taken from {state.taken_from}, which {flag} must not change; {own}"]
    if state.kind == "done":
        return []
    if state.kind == "damaged":
        return [f"{name}: is taken from {state.taken_from}: {reason}" for reason in state.reasons]
    remedy = f"run {name} with the config of {state.taken_from}, or {own}"
    if state.kind == "missing" and state.reasons:
        why = "; ".join(state.reasons)
        return [
            f"{name}: is taken from {state.taken_from}, but {why}; name that experiment in `from` instead, or {own}"
        ]
    if state.kind == "missing":
        return [f"{name}: is taken from {state.taken_from}, which has no finished {name}; {remedy}"]
    if state.waiting and not state.changes:
        return []  # what it is made from is taken too, and has a line of its own
    return [
        f"{name}: is taken from {state.taken_from}, and this config needs another one ({'; '.join(state.reasons)}); "
        f"make the settings the same, or {own}"
    ]


def command_to_resume(name: str, state: StageState, change: Change) -> str:
    """Return the command that repeats the setting with which the run was started.

    Returns:
        A phrase that ends in ", "; "" if the setting was not on that run's command line.
    """
    recorded = [] if state.run is None else state.run["config"].get("command_line", [])
    for word in recorded:
        if word.partition("=")[0] == change.key:
            return f"`rlhf run {name} -c CONFIG {shlex.quote(word)}` resumes with the old setting, "
    return ""
