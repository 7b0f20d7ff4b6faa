"""Record which YAML and command line produced a stage, to protect it from other ones.

Two files with the same `name:` share a folder, and one must not silently replace what the other
produced. Nor must a command silently retrain a stage because it leaves out a setting that an
earlier command line contained.
"""

import json
import os
import re
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.changes import Change
from pipeline.config.sections import Common
from pipeline.config.validation import load_experiment
from pipeline.config.yaml_tree import read_tree
from pipeline.errors import UserError
from pipeline.store import integrity

IGNORED_KEYS = (
    "name",
    "launch",
    "tracking",
    "checkpoints",
    "from_",
    "from",
    "round",
    "sweep",
)  # no finished stage depends on them
YAML_WORDS = ("null", "true", "false")  # YAML does not parse them as strings


@dataclass(frozen=True)
class Origin:
    """The config file of a command, and the settings on its command line."""

    path: str
    """The file's absolute path, links resolved."""
    settings: str
    """Digest of the file's settings with defaults filled in, without the command line's."""
    shared: bool = False
    """Whether the artifacts are also in a storage that other machines use."""
    overrides: tuple[str, ...] = ()
    """The settings on the command line, `key=value` each."""

    @classmethod
    def of(
        cls,
        path: str | Path,
        experiment_class: type[Common],
        checks: Iterable[Callable[[Any], list[str]]] = (),
        shared: bool = False,
        overrides: tuple[str, ...] = (),
    ) -> "Origin":
        """Load a config file and return its origin.

        Args:
            path: the file.
            experiment_class: the type that it is validated as.
            checks: further checks of the settings.
            shared: see the field.
            overrides: see the field.
        """
        try:
            values = load_experiment(path, [], experiment_class, checks).model_dump(mode="json")
        except UserError:  # it is complete only together with the command line's settings
            values = read_tree(path).values
        settings = integrity.sha256_json({key: value for key, value in values.items() if key not in IGNORED_KEYS})
        return cls(os.path.realpath(path), settings, shared, overrides)

    def record(self, base: Path) -> dict[str, str]:
        """Return what manifests record of the file.

        Args:
            base: the experiment's folder. The file's path relative to it is recorded too, which
                stays the same when a checkout is moved or copied with its artifacts. With shared
                artifacts it means nothing.
        """
        record = {"path": self.path, "settings": self.settings}
        if not self.shared:
            record["from_artifacts"] = os.path.relpath(self.path, os.path.realpath(base))
        return record

    def matches(self, config: dict[str, Any], base: Path) -> bool:
        """Return whether a stage was produced with this file or with one of the same settings.

        Args:
            config: the config in the stage's manifest or run.json.
            base: the experiment's folder.
        """
        recorded = config.get("file")
        if recorded is None:  # an older version recorded no file
            return True
        return any(value == recorded.get(key) for key, value in self.record(base).items())


def errors_about_other_files(origin: Origin, base: Path, replaced: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """Return an error line for each other config file whose stages a command would replace.

    Args:
        origin: the config file of the command.
        base: the experiment's folder.
        replaced: stages, each with the manifest or run.json of what would be replaced.
    """
    stages_by_path: dict[str, list[str]] = {}
    for stage, record in replaced:
        if not origin.matches(record["config"], base):
            stages_by_path.setdefault(record["config"]["file"]["path"], []).append(stage)
    return [
        f"{base}: {', '.join(dict.fromkeys(stages))}: made with {path}, and {origin.path} has the same name and other "
        f"settings; name=OTHER gives it a folder of its own, --override-config replaces what is there"
        for path, stages in stages_by_path.items()
    ]


def dropped_overrides(record: dict[str, Any], changes: list[Change], overrides: Iterable[str]) -> list[str]:
    """Return the settings of an old command line whose absence is the only reason for staleness.

    Args:
        record: the stage's manifest; its config has the `command_line` that produced it.
        changes: what makes the stage stale.
        overrides: the settings on the present command line.

    Returns:
        `key=value` as they were typed. The list is empty if another change would redo the stage
        anyway, if the present command line sets the same key, or if an older version recorded no
        command line.
    """
    old_words = {word.partition("=")[0]: word for word in record["config"].get("command_line", [])}
    new_keys = [word.partition("=")[0] for word in overrides]
    missing = [key for key in old_words if not any(_overlap(key, other) for other in new_keys)]
    if not changes or not all(any(_overlap(key, change.key) for key in missing) for change in changes):
        return []
    return [old_words[key] for key in missing if any(_overlap(key, change.key) for change in changes)]


def _overlap(one: str, other: str) -> bool:
    """Return whether two dotted keys are the same or one is a section that contains the other."""
    return bool(one and other) and (f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}."))


def errors_about_dropped_overrides(
    target: str, base: Path, stale: dict[str, tuple[list[str], list[Change]]]
) -> list[str]:
    """Return an error line about settings that the present command line leaves out.

    Args:
        target: the stage that the command asks for.
        base: the experiment's folder.
        stale: stage → what `dropped_overrides` returned, and the stage's changes.

    Returns:
        One line with the two commands to choose from; none if `stale` is empty.
    """
    if not stale:
        return []
    changes = {change.key: change for _, stage_changes in stale.values() for change in stage_changes}
    words = {word.partition("=")[0]: word for stage_words, _ in stale.values() for word in stage_words}
    # Where each word sets exactly one changed setting, the new values can be put on the command
    # line.
    if all(key in changes and changes[key].is_setting for key in words):
        new_words = shlex.join(f"{key}={format_override(changes[key].new)}" for key in words)
    else:
        new_words = "--override-config"
    stages_by_words: dict[str, list[str]] = {}
    for stage, (stage_words, _) in stale.items():
        stages_by_words.setdefault(" ".join(stage_words), []).append(stage)
    described = "; ".join(f"{', '.join(stages)} with {joined}" for joined, stages in stages_by_words.items())
    run = f"`rlhf run {target} -c CONFIG"
    return [
        f"{base}: last made with settings on the command line that this one leaves out ({described}); "
        f"{run} {shlex.join(words.values())}` keeps what is there, {run} {new_words}` trains again with the file's"
    ]


def format_override(value: Any) -> str:
    """Format a value so that the command line parses it back to the same one."""
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w./-]*", value) and value.lower() not in YAML_WORDS:
        return value
    return json.dumps(value, ensure_ascii=False)
