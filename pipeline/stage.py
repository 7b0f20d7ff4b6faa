"""Define what a stage declares (`Stage`) and what it is given when it runs (`StageRun`).

A stage's declaration imports no torch. Its `run` imports the libraries that it needs, late. Both
types are generic over the stage's own section and over the class of the whole experiment, so that
type checkers and editors know every setting: `StageRun[PPOSettings, Experiment]`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic

from rich.console import Console
from typing_extensions import TypeVar  # typing's has no defaults before Python 3.13

from pipeline.config.section import Section
from pipeline.config.sections import Common
from pipeline.store.cache import Cache
from pipeline.store.checkpoints import CheckpointStore
from pipeline.tracking import Tracker

S = TypeVar("S", bound=Section, default=Any)
E = TypeVar("E", bound=Common, default=Any)


@dataclass
class StopFlag:
    """Ask a stage to stop. Signal handlers set it; stages poll it between (and inside) steps."""

    requested: bool = False
    """Whether a stop was asked for."""


@dataclass(frozen=True)
class Source:
    """Locate the records of one kind of data: a local file or folder, or a dataset on the Hub."""

    path: Path | None = None
    """Local file or folder."""
    hub: str | None = None
    """Hub id."""
    split: str = "train"
    """Split of the Hub dataset."""
    subset: str | None = None
    """Subset (configuration) of the Hub dataset."""
    limit: int | None = None
    """Largest number of records; None: all."""
    skip: int = 0
    """Number of records to skip at the start."""
    revision: str | None = None
    """Revision of a Hub dataset: as the config names it; for a stage that runs, the commit."""
    sha256: str | None = None
    """Digest of a local file when the stage was planned; it must still hold when it is read."""
    reading: dict[str, Any] = field(default_factory=dict)
    """Further settings of DataSource that differ from their defaults: how rows are read."""
    parts: tuple["Source", ...] = ()
    """Sources of a mixture; then nothing else is set."""


@dataclass(kw_only=True, frozen=True)
class StageRun(Generic[S, E]):
    """Carry what one run of one stage works with.

    Inputs are verified, `publish` is an empty folder, and the random generators are seeded.
    """

    stage: str
    """Name of the stage."""
    experiment: E
    """The validated experiment."""
    config: S
    """The stage's own section of it."""
    seed: int
    """The experiment's seed."""
    inputs: dict[str, Path]
    """Artifact folder of each stage that this one needs."""
    manifests: dict[str, dict[str, Any]]
    """Manifest of each stage that this one needs."""
    publish: Path
    """Folder whose content becomes the artifact."""
    checkpoints: CheckpointStore
    """Where the run saves its state, and finds it again."""
    cache: Cache
    """Files that may be reused by later runs."""
    tracker: Tracker
    """Where the run logs metrics, samples and progress."""
    stop: StopFlag
    """Set when the run is asked to stop."""
    trust_remote_code: bool = False
    """Whether code that a model brings may run."""
    sources: dict[str, Source] = field(default_factory=dict)
    """Where each kind of data that the stage reads is."""
    data: dict[str, Any] = field(default_factory=dict)
    """What the manifest will record of each kind of data: path, rows and so on."""
    wanted: tuple[str, ...] = ()
    """All stages that the command brings up to date, in order."""
    model_revision: str | None = None
    """Commit of the Hub model that the stage starts from; the revision if it is unknown."""
    confirm_folders: Callable[[], None] = lambda: None
    """Call it after loading models from the folders that `Stage.folders` names. It raises UserError
    if their files were changed in the meantime."""

    def source(self, kind: str) -> Source:
        """Return where the data of a kind is; the kind must be one that the stage reads."""
        return self.sources[kind]


def no_lines(experiment: Any) -> list[str]:
    """Return no problems: the default of `Stage.check` and `Stage.missing_requirements`."""
    return []


def no_folders(experiment: Any) -> dict[str, Path]:
    """Return no folders: the default of `Stage.folders`."""
    return {}


def no_hub_model(experiment: Any) -> tuple[str, str] | None:
    """Return no model: the default of `Stage.hub_model`."""
    return None


def as_it_is(experiment: Any) -> Any:
    """Return the experiment itself: the default of `Stage.view`."""
    return experiment


def always(experiment: Any) -> bool:
    """Return True: the default of `Stage.used`."""
    return True


def show_nothing(folder: Path, console: Console) -> None:
    """Print nothing: the default of `Stage.show`."""


@dataclass(frozen=True, kw_only=True)
class Stage(Generic[S, E]):
    """Declare one stage: everything that the pipeline asks of it."""

    name: str
    """Name of the stage, of its section in the YAML and of its artifact folder."""
    summary: str
    """What the stage does, in one sentence, for `rlhf run STAGE --help`."""
    settings: type[S]
    """Class of its section."""
    run: Callable[[StageRun[S, E]], dict[str, Any]]
    """Function that runs the stage and returns the figures for its manifest."""
    needs: Callable[[E], list[str]]
    """Function that returns the stages that must be done first."""
    shows: Callable[[E], list[str]] = no_lines
    """Function that returns stages whose artifacts it reads where they are finished and were made
    of today's inputs. It never brings them up to date."""
    reads: Callable[[E], list[str]] = no_lines
    """Function that returns the kinds of data it reads (`documents`, `prompts`, …)."""
    metrics: Mapping[str, str] = field(default_factory=dict)
    """Meaning of each metric that it logs."""
    headline: tuple[str, ...] = ()
    """Figures of the manifest that are shown first."""
    check: Callable[[E], list[str]] = no_lines
    """Function that returns a line for each combination of settings that cannot work."""
    missing_requirements: Callable[[E], list[str]] = no_lines
    """Function that returns a line for each thing that this machine lacks. It is called only if the
    stage is going to run."""
    check_data: Callable[[str, Source, Callable[[int, float | None], None]], list[str]] | None = None
    """Function of a kind of data, one source of it, and a function to call now and then with the
    number of rows and the share that has been read, or None. It reads the source and returns a line
    for each mistake in it. It is called only if the stage is going to run."""
    folders: Callable[[E], dict[str, Path]] = no_folders
    """Function that returns the user's model folders, by the setting that names each."""
    hub_model: Callable[[E], tuple[str, str] | None] = no_hub_model
    """Function that returns (setting, Hub id) of the Hub model that it starts from, or None."""
    without: Mapping[str, str] = field(default_factory=dict)
    """For a kind of data: what can be set instead where the config gives none of that kind."""
    fixed: tuple[str | tuple[str, ...], ...] = ()
    """Settings that an interrupted run keeps even with --override-config, because they decide which
    rows come next. Of several settings in a tuple only the product counts. Every stage also keeps
    `seed` and `data`."""
    shared: bool = False
    """Whether several processes run the stage together: all call `run`, and only rank 0's StageRun
    writes."""
    view: Callable[[E], E] = as_it_is
    """Function that returns the experiment as the stage reads it: a stage that trains a second
    model finds that model's settings where others find the policy's."""
    section: str = ""
    """Name of its section in that view; "": that of the stage."""
    used: Callable[[E], bool] = always
    """Function that returns whether the experiment has the stage at all; `status` leaves out others
    that were never made."""
    show: Callable[[Path, Console], None] = show_nothing
    """Function that prints more about the finished artifact, after `rlhf run` of this stage."""
