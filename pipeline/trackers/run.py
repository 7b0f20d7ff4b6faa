"""Describe a run of a stage to the process that sends its rows to trackers."""

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TrackedRun:
    """Describe one run of one stage to trackers; travels as JSON."""

    names: tuple[str, ...]
    """The trackers, as in `tracking.with`."""
    folder: str
    """Where the journals grow."""
    base: str
    """The experiment's folder: trackers that keep files keep them here."""
    experiment: str
    """The experiment's name, which groups the runs of its stages."""
    stage: str
    """The stage."""
    run_id: str
    """Id of the run: trackers that take ids get it, the others as a tag."""
    project: str
    """The setting `tracking.project`."""
    config: dict[str, Any] = field(default_factory=dict)
    """The settings that trackers show."""
    resumes: int = 0
    """How often the run has been resumed."""
    wandb_mode: str = "online"
    """online or offline."""
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The setting `tracking.options`."""

    def as_json(self) -> dict[str, Any]:
        """Return the values as JSON can hold them."""
        return asdict(self) | {"names": list(self.names)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TrackedRun":
        """Return the run of what `as_json` returned."""
        return cls(**(values | {"names": tuple(values["names"])}))

    def file(self, *parts: str) -> Path:
        """Return a path in the experiment's folder."""
        return Path(self.base, *parts)


def tracker_run_id(run_id: str, config: dict[str, Any], fingerprint: str) -> str:
    """Return the id of a run in trackers: its own, until it goes on with changed settings.

    Figures after a change are not those that the tracker may already have of the same steps. So a
    run that goes on with changed settings is a new one there, with all rows of its journals.

    Args:
        run_id: The run's id.
        config: Its settings; `overridden` names those that were changed on the way.
        fingerprint: Of what it is made of now.
    """
    if "overridden" not in config:
        return run_id
    return hashlib.sha256(f"{run_id}/{fingerprint}".encode()).hexdigest()[:32]
