"""What a stage gets from the pipeline. A stage is a module (or any object) with

NAME, Config, METRICS, HEADLINE, needs(experiment), reads(experiment), run(StageRun) -> metrics, and maybe
check(experiment) -> lines (of settings that do not suit each other), lacks(experiment) -> lines (of what this machine
has not, or a data file that cannot be read; asked only where the stage will run),
folders(experiment) -> {key: folder of a model from outside},
hub_model(experiment) -> (key, name) of a model on the Hub that it starts from, or None,
WITHOUT = {kind of data: what else can be set where the config gives none of it},
FIXED = keys of settings that an interrupted run keeps, --override-config or not: with others it would not know its
place in the order of the rows (of several keys in a tuple the product counts; every stage keeps `seed` and `data`),
SHARED = True where several processes run it together (all call `run`, the first one's StageRun alone writes)
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.store.cache import Cache
from pipeline.store.checkpoints import CheckpointStore
from pipeline.tracking import Tracker


@dataclass
class StopFlag:
    """Set by a signal, polled by stages between (and inside) steps; pipeline/cli.py holds the handlers."""

    requested: bool = False


@dataclass(frozen=True)
class Source:
    """Where the records of one kind are: a local file or folder, or a Hub id."""

    path: Path | None = None
    hub: str | None = None
    split: str = "train"
    subset: str | None = None
    limit: int | None = None  # records; None = all
    skip: int = 0  # records passed over first
    revision: str | None = None  # of a Hub id: as the config names it, for a stage that runs the commit
    sha256: str | None = None  # of a file: what it held when the stage was planned, and must hold when it is read


@dataclass
class StageRun:
    """One run of one stage. Inputs are verified, `publish` is empty, the random generators are seeded."""

    stage: str
    experiment: Any  # the validated experiment; sections are attributes
    config: Any  # the stage's own section
    seed: int  # the experiment's
    inputs: dict[str, Path]  # upstream stage -> its artifact folder
    manifests: dict[str, dict[str, Any]]  # upstream stage -> its manifest
    publish: Path  # what is put here becomes the artifact
    checkpoints: CheckpointStore
    cache: Cache
    tracker: Tracker
    stop: StopFlag
    trust_remote_code: bool = False
    sources: dict[str, Source] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)  # kind -> what the manifest will record of it: path, rows, …
    wanted: tuple[str, ...] = ()  # the stages that the command brings up to date, each after what it needs
    model_revision: str | None = None  # of the model on the Hub that the stage starts from: its commit, if it is known
    # to be called when models from outside (`folders`) are loaded: UserError where their files were touched meanwhile
    confirm_folders: Callable[[], None] = lambda: None

    def source(self, kind: str) -> Source:
        """Where the data of a kind is (`kind` must be in the stage's `reads`)."""
        return self.sources[kind]
