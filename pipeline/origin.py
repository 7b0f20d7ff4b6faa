"""Which YAML and which command line made a finished stage: two files that bear one `name:` share a folder, and one must
not silently replace what the other made; nor must a command that leaves a setting out which an earlier one named."""

import json
import os
import re
import select
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pipeline.config.validation import load_experiment
from pipeline.config.yaml_tree import read_tree
from pipeline.errors import Interrupted, UserError
from pipeline.fingerprints import Change
from pipeline.stage import StopFlag
from pipeline.store import files

APART = ("name", "launch", "tracking", "checkpoints")  # what of a file no finished stage depends on
WORDS = ("null", "true", "false")  # that YAML reads as values


@dataclass(frozen=True)
class Origin:
    """A config file. settings: the digest of what it says, defaults filled in, without the command line's settings;
    shared: whether the artifacts are also those of other machines, and where this one keeps them says nothing;
    overrides: the command line's settings, `key=value` each."""

    path: str
    settings: str
    shared: bool = False
    overrides: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        path: str | Path,
        Experiment: type[BaseModel],
        checks: Iterable[Callable[[Any], list[str]]] = (),
        shared: bool = False,
        overrides: tuple[str, ...] = (),
    ) -> "Origin":
        """Return the origin of what is made with this file."""
        try:
            values = load_experiment(path, [], Experiment, checks).model_dump(mode="json")
        except UserError:  # it needs the command line's settings to be whole
            values = read_tree(path).values
        settings = files.sha256_json({key: value for key, value in values.items() if key not in APART})
        return cls(os.path.realpath(path), settings, shared, overrides)

    def record(self, base: Path) -> dict[str, str]:
        """Return what a manifest in the experiment's folder `base` says of it. `from_artifacts`: its path from there,
        for a checkout that is moved or copied with its artifacts."""
        record = {"path": self.path, "settings": self.settings}
        if not self.shared:
            record["from_artifacts"] = os.path.relpath(self.path, os.path.realpath(base))
        return record

    def made(self, config: dict[str, Any], base: Path) -> bool:
        """Return whether a recorded config is of this file, or of one that says the same, or tells of none."""
        recorded = config.get("file")
        if recorded is None:  # an older version's
            return True
        own = self.record(base)
        return any(own[key] == recorded.get(key) for key in own)


def lines_of_others(origin: Origin, base: Path, replaced: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """Return a line for each other file whose stages would be replaced.

    Args:
        origin: the file of this command.
        base: the experiment's folder.
        replaced: stages, and the manifest or run.json of what would be replaced.
    """
    makers: dict[str, list[str]] = {}
    for stage, record in replaced:
        if not origin.made(record["config"], base):
            makers.setdefault(record["config"]["file"]["path"], []).append(stage)
    return [
        f"{base}: {', '.join(dict.fromkeys(stages))}: made with {path}, and {origin.path} has the same name and other "
        f"settings; name=OTHER gives it a folder of its own, --override-config replaces what is there"
        for path, stages in makers.items()
    ]


def forgotten(record: dict[str, Any], changes: list[Change], overrides: Iterable[str]) -> list[str]:
    """Return the settings of the command line that made a finished stage, if it is stale for want of them alone.

    Args:
        record: the stage's manifest, whose config names the `command_line` that it was made with.
        changes: what makes it stale, as `fingerprints.compare` finds it.
        overrides: the settings of today's command line.

    Returns:
        `key=value` as they were typed. Empty where another change would make the stage anew anyway, where today's
        command line says something of the same key, or where an older version recorded no command line.
    """
    then = {word.partition("=")[0]: word for word in record["config"].get("command_line", [])}
    now = [word.partition("=")[0] for word in overrides]
    missing = [key for key in then if not any(_overlap(key, other) for other in now)]
    if not changes or not all(any(_overlap(key, change.key) for key in missing) for change in changes):
        return []
    return [then[key] for key in missing if any(_overlap(key, change.key) for change in changes)]


def _overlap(one: str, other: str) -> bool:
    """Whether one dotted key is the other, or a section around it."""
    return bool(one and other) and (f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}."))


def lines_of_forgotten(target: str, base: Path, found: dict[str, tuple[list[str], list[Change]]]) -> list[str]:
    """Return a line that names the settings that last time's command lines had and this one has not, and the two
    commands there are to choose from; none where nothing was found.

    Args:
        target: the stage that this command is asked for.
        base: the experiment's folder.
        found: stage → what `forgotten` gave, and the stage's changes.
    """
    if not found:
        return []
    changes = {change.key: change for _, some in found.values() for change in some}
    words = {word.partition("=")[0]: word for some, _ in found.values() for word in some}
    whole = all(key in changes and changes[key].is_setting for key in words)
    anew = shlex.join(f"{key}={_written(changes[key].new)}" for key in words) if whole else "--override-config"
    stages: dict[str, list[str]] = {}
    for stage, (some, _) in found.items():
        stages.setdefault(" ".join(some), []).append(stage)
    made = "; ".join(f"{', '.join(names)} with {said}" for said, names in stages.items())
    run = f"`rlhf run {target} -c CONFIG"
    return [
        f"{base}: last made with settings on the command line that this one leaves out ({made}); "
        f"{run} {shlex.join(words.values())}` keeps what is there, {run} {anew}` trains it anew with the file's"
    ]


def _written(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w./-]*", value) and value.lower() not in WORDS:
        return value
    return json.dumps(value, ensure_ascii=False)


def at_terminal() -> bool:
    """Whether a person reads this and can answer."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def ask(question: str, stop: StopFlag) -> bool:
    """Ask a person at a terminal; False where there is none. Interrupted where a signal comes first."""
    if not at_terminal():
        return False
    print(f"{question} [y/N] ", end="", flush=True)
    while not select.select([sys.stdin], [], [], 0.2)[0]:
        if stop.requested:
            raise Interrupted()
    return sys.stdin.readline().strip().lower() in ("y", "yes")
