"""Load experiments and bring stages up to date: the core of `rlhf run`, also for Python code.

Of this package only this file, `commands.py`, `data_commands.py` and `init.py` import the stages or
the data room.
Imports are late: environment variables must be set before torch is imported.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.config.sections import Common, ConfigFile
    from pipeline.config.yaml_tree import Tree
    from pipeline.stage import Stage
    from pipeline.state import Flags
    from pipeline.store.artifacts import ArtifactStore
    from stages.settings.experiment import Experiment

STAGES = ("world", "base", "sft", "rankings", "rm", "ppo", "dpo", "evaluate", "report")
OPTIONAL = ("rm_base", "rm_sft")
"""Stages of the chain that only some experiments have (`rm.base`)."""
TESTS = ("lm_eval", "reward_bench", "refusals")
"""Stages outside the chain, which run where they are asked for (`rlhf evaluate --lm-eval`)."""


def stages() -> dict[str, Stage]:
    """Return the declarations of the chain's stages, each after the stages it may need."""
    from stages.settings import experiment

    return experiment.STAGES


def all_stages() -> dict[str, Stage]:
    """Return the declarations of the chain's stages and of TESTS, each after those it may need."""
    from stages.settings import experiment

    chain = stages()
    last = list(chain)[-1]  # it shows what TESTS found
    tests = {name: experiment.TESTS[name] for name in TESTS}
    return {name: stage for name, stage in chain.items() if name != last} | tests | {last: chain[last]}


def experiment_class() -> type[Common]:
    """Return the class of a whole experiment."""
    from stages.settings.experiment import Experiment

    return Experiment


@dataclass(frozen=True)
class Location:
    """Say where finished stages are kept."""

    folder: Path
    """Folder on this machine."""
    url: str | None = None
    """Address on object storage, if they are kept there too."""

    @classmethod
    def of(cls, place: str | Path) -> Location:
        """Return the location that `--artifacts` names: a folder, or an address as s3://bucket/prefix."""
        from pipeline.store.remote import is_url, local_folder

        text = str(place)
        return cls(local_folder(text), text) if is_url(text) else cls(Path(place))


def load_experiment(path: str | Path, *overrides: str) -> Experiment:
    """Load and validate an experiment, and set this process's environment as it asks.

    Call it before anything imports torch, if possible: torch and the Hugging Face libraries read
    some environment variables only once.

    Args:
        path: The YAML file.
        *overrides: Settings on top of it, `section.key=value` each.

    Raises:
        UserError: With one line for every mistake in the config.
    """
    from pipeline.config.yaml_tree import read_tree

    return validate(read_tree(path, overrides))


def validate(tree: Tree) -> Any:
    """Set this process's environment for a parsed config, and validate the config."""
    from pipeline.launch import environment

    environment.set_environment(tree.values)
    return check(tree)


def check(tree: Tree) -> Any:
    """Validate a parsed config, and leave this process's environment as it is."""
    from pipeline import taking
    from pipeline.config.validation import validate_tree

    checks = [stage.check for stage in all_stages().values()]
    return validate_tree(tree, experiment_class(), [*checks, partial(taking.problems, stages=stages())])


def check_unchanged(experiment: Common) -> ConfigFile:
    """Check that an experiment is what its file and its overrides say today.

    A copy with other values (`model_copy`) was never validated, and the manifests would record
    settings that no file and no command line has.

    Returns:
        The file and the overrides.

    Raises:
        UserError: If it differs, or was not loaded from a file.
    """
    from pipeline.config.yaml_tree import read_tree

    file = experiment.file
    if file is None:
        raise UserError("experiment: was not loaded from a file; use load_experiment")
    loaded = validate(read_tree(file.path, file.overrides))
    if loaded.model_dump(mode="json") != experiment.model_dump(mode="json"):
        raise UserError(
            "experiment: was changed after it was loaded, or its file was; load it again, and pass settings to "
            "load_experiment, as load_experiment(PATH, 'dpo.beta=0.2')"
        )
    return file


def open_store(experiment: Common, location: Location) -> ArtifactStore:
    """Return the artifacts of an experiment, to read them."""
    from pipeline import taking
    from pipeline.store.artifacts import ArtifactStore

    taken = taking.taken_stores(experiment, location.folder)
    store = ArtifactStore(location.folder, experiment.name, taken=taken)
    locate_ranked(experiment, store, takes=False)
    return store


def open_store_to_run(experiment: Common, location: Location) -> ArtifactStore:
    """Return the artifacts of an experiment, to make them: manifests record the config's file."""
    from pipeline import taking
    from pipeline.origin import Origin
    from pipeline.store.artifacts import ArtifactStore

    file = experiment.file
    if file is None:
        raise UserError("experiment: was not loaded from a file; use load_experiment")
    checks = [stage.check for stage in all_stages().values()]
    origin = Origin.of(file.path, type(experiment), checks, location.url is not None, file.overrides)
    taken = taking.taken_stores(experiment, location.folder)
    store = ArtifactStore(location.folder, experiment.name, origin, taken)
    locate_ranked(experiment, store, takes=True)
    return store


def locate_ranked(experiment: Common, store: ArtifactStore, takes: bool) -> None:
    """Find the snapshot that `data.rankings: ranked` means, if the config says so.

    Args:
        experiment: The experiment, which gets to know it.
        store: Its artifacts.
        takes: Whether to take the first snapshot where there is none yet.
    """
    if not experiment.waits_for_people:
        return
    from stages.people.rank import snapshots

    find = snapshots.first if takes else snapshots.current
    experiment._ranked = find(store.base, experiment.name)


def run(
    stage: str,
    experiment: Experiment,
    artifacts: str | Path = "artifacts",
    flags: Flags | None = None,
    console: Console | None = None,
) -> Path:
    """Bring a stage up to date, and first what it needs: what `rlhf run STAGE` does.

    In the main thread Ctrl-C saves and stops; the next call resumes.

    Args:
        stage: Name of the stage, such as "sft".
        experiment: What `load_experiment` returned, unchanged.
        artifacts: Folder in which finished stages are kept, or an address as s3://bucket/prefix.
        flags: The flags of `rlhf run`.
        console: Where progress is printed; by default the terminal or notebook. Another
            console prints lines as they are, with CONFIG for the experiment's file.

    Returns:
        The stage's folder.

    Raises:
        UserError: If something must be corrected first.
        Interrupted: If a signal stopped it; what was done is saved.
        TrainingStopped: If a training stopped itself.
    """
    from pipeline import hints
    from pipeline.console import FilledConsole
    from pipeline.state import Flags, command_of

    declarations = all_stages()
    if stage not in declarations:
        raise UserError(f"stage: {stage!r} is not a stage; choose from {', '.join(declarations)}")
    if experiment.launch.processes * experiment.launch.nodes > 1:
        raise UserError("launch.processes: a Python process runs stages alone; set it to 1, or use `rlhf run`")
    if experiment.sweep:
        raise UserError(
            "sweep: a Python process runs one experiment; use `rlhf run`, or load_experiment(…, 'sweep=null')"
        )
    file, flags = check_unchanged(experiment), flags or Flags()
    path, place = str(file.path), str(artifacts)
    if not flags.command:
        flags = replace(flags, command=command_of(stage, path, place, file.overrides, flags))
    trust = ["--trust-remote-code"] if flags.trust_remote_code else []
    caller = hints.caller_of(path, place, file.overrides, trust)
    try:
        return run_loaded(stage, experiment, Location.of(artifacts), flags, console or FilledConsole(caller))
    except UserError as error:
        raise UserError([hints.filled(line, caller) for line in error.lines]) from None


def run_loaded(stage: str, experiment: Experiment, location: Location, flags: Flags, console: Console) -> Path:
    """Bring a stage of a checked experiment up to date and return its folder; see `run`."""
    from pipeline import plan
    from pipeline.launch import environment
    from pipeline.launch.signals import stop_on_signals
    from pipeline.stage import StopFlag
    from pipeline.store.remote import Remote

    declarations, stop = all_stages(), StopFlag()
    with stop_on_signals(stop):
        environment.prepare(experiment)
        store = open_store_to_run(experiment, location)
        remote = None if location.url is None else Remote(location.url, store)
        plan.bring_up_to_date(stage, experiment, store, declarations, flags, stop, console, remote=remote)
        declarations[stage].show(store.folder(stage), console)
    return store.folder(stage)
