"""Which YAML made a finished stage: two files that bear one `name:` share a folder, and one must not silently replace
what the other made."""

import os
import select
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pipeline import files
from pipeline.config import load_experiment
from pipeline.errors import Interrupted, UserError
from pipeline.stage import StopFlag
from pipeline.yaml_tree import read_tree

APART = ("name", "launch", "tracking", "checkpoints")  # what of a file no finished stage depends on


@dataclass(frozen=True)
class Origin:
    """A config file. settings: the digest of what it says, defaults filled in, without the command line's settings;
    shared: whether the artifacts are also those of other machines, and where this one keeps them says nothing."""

    path: str
    settings: str
    shared: bool = False

    @classmethod
    def of(
        cls,
        path: str | Path,
        Experiment: type[BaseModel],
        checks: Iterable[Callable[[Any], list[str]]] = (),
        shared: bool = False,
    ) -> "Origin":
        """Return the origin of what is made with this file."""
        try:
            values = load_experiment(path, [], Experiment, checks).model_dump(mode="json")
        except UserError:  # it needs the command line's settings to be whole
            values = read_tree(path).values
        settings = files.sha256_json({key: value for key, value in values.items() if key not in APART})
        return cls(os.path.realpath(path), settings, shared)

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


def ask(question: str, stop: StopFlag) -> bool:
    """Ask a person at a terminal; False where there is none. Interrupted where a signal comes first."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    print(f"{question} [y/N] ", end="", flush=True)
    while not select.select([sys.stdin], [], [], 0.2)[0]:
        if stop.requested:
            raise Interrupted()
    return sys.stdin.readline().strip().lower() in ("y", "yes")
