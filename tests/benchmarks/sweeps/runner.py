"""Run experiments that vary a main one and share its finished stages.

Two stages are the same if the pipeline gives them the same fingerprint, which does not depend on
the experiment's name.
"""

import json
import os
import shutil
import subprocess
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import api, cli
from pipeline.chain import Chain
from pipeline.commands import make_console
from pipeline.config.sections import Common
from pipeline.config.validation import validate_tree
from pipeline.config.yaml_tree import read_tree
from pipeline.errors import Interrupted, UserError
from pipeline.launch import environment as launch
from pipeline.launch.signals import stop_on_signals
from pipeline.plan import bring_up_to_date
from pipeline.stage import Stage, StopFlag
from pipeline.state import Flags, StageState
from pipeline.store import files
from pipeline.store.artifacts import ArtifactStore
from sweeps.text import markdown

ROOT = Path(__file__).resolve().parents[3]
"""The checkout, in which processes run."""


@dataclass
class ExperimentRunner:
    """Run the experiments of one config in turn in this process, so that libraries load once."""

    config: str
    """The YAML file."""
    overrides: list[str]
    """Settings of the command line, as `key=value`."""
    stop: StopFlag
    """Set by a signal."""
    console: Any = field(default_factory=make_console)
    """Where progress is printed."""
    stages: dict[str, Stage] = field(default_factory=api.stages)
    """Stages by name."""
    experiment_class: type[Common] = field(default_factory=api.experiment_class)
    """The class that validates the config."""

    def load(self, *more: str) -> Any:
        """Return the validated experiment with `more` overrides, and set its environment."""
        tree = read_tree(self.config, [*self.overrides, *more])
        launch.set_environment(tree.values)
        return validate_tree(tree, self.experiment_class, [stage.check for stage in self.stages.values()])

    def main_experiment(self) -> Any:
        """Return the config's own experiment, and register the stage `samples`."""
        experiment = self.load()
        from sweeps import samples  # imports torch

        self.stages = {**self.stages, samples.STAGE.name: samples.STAGE}
        self.experiment_class = samples.SweepExperiment
        return experiment

    def update(self, experiment: Any, store: ArtifactStore, *targets: str) -> None:
        """Bring stages of the main experiment up to date, as `rlhf run` does."""
        launch.prepare(experiment)
        for target in targets:
            bring_up_to_date(target, experiment, store, self.stages, Flags(), self.stop, self.console)

    def update_variant(self, experiment: Any, store: ArtifactStore, target: str, *others: ArtifactStore) -> None:
        """Bring a stage of a variant up to date, sharing the finished stages of other experiments.

        An interrupted run whose settings have changed is discarded, because only this program makes
        these runs.

        Args:
            experiment: The variant.
            store: Its artifacts.
            target: The stage.
            *others: Artifacts of the experiments to share with.

        Raises:
            UserError: An artifact of the variant is damaged.
        """
        states = share(target, experiment, store, self.stages, *others)
        damage: list[str] = []
        for state in states.values():
            if state.kind == "damaged":
                damage += state.reasons
        if damage:
            raise UserError([f"{line.partition(';')[0]}; remove {store.base} and run again" for line in damage])
        unfinished = [name for name, state in states.items() if state.kind != "done"]
        for name in unfinished or [target]:
            flags = Flags(only=True, restart=bool(states[name].changes or states[name].waiting))
            bring_up_to_date(name, experiment, store, self.stages, flags, self.stop, self.console)

    def print_line(self, line: str) -> None:
        """Print a line as it is."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def print_table(self, title: str, headings: list[str], rows: list[list[str]]) -> None:
        """Print a Markdown table of headings and rows below a title."""
        self.print_line(f"\n{title}\n\n{markdown(headings, rows)}\n")


def share(
    target: str, experiment: Any, store: ArtifactStore, stages: dict[str, Any], *others: ArtifactStore
) -> dict[str, StageState]:
    """Publish in `store` the stages of other experiments that `experiment` would make alike.

    Args:
        target: The stage that is wanted; only stages on the way to it are considered.
        experiment: The experiment.
        store: Its artifacts.
        stages: Stages by name.
        *others: Artifacts of the other experiments.

    Returns:
        The state of every stage on the way to the target.
    """
    chain = Chain(experiment, store, stages)
    for name in chain.closure(target):
        state = chain.assess(name)
        if state.kind in ("missing", "stale", "damaged"):
            for other in others:
                theirs = other.manifest(name)
                if theirs is not None and theirs["fingerprint"] == chain.today(name).fingerprint:
                    link(name, other, store)
                    state = chain.assess(name)
                    assert state.kind == "done", f"{name} was shared, but is {state.sentence()}"
                    break
        chain.states[name] = state
    return chain.states


def link(name: str, main: ArtifactStore, store: ArtifactStore) -> None:
    """Publish a stage of another experiment in `store` under the same manifest.

    Files are hard links if the file system has them. That is safe because artifacts are only
    replaced as a whole, never written to.

    Args:
        name: The stage.
        main: Artifacts to share from.
        store: Artifacts to publish in.
    """
    manifest = main.verify(name)
    with store.lock(name):
        content = store.folder(name) / ".tmp-publish"
        files.remove(content)
        for file in manifest["outputs"]:
            target = content / file
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(main.folder(name) / file, target)
            except OSError:  # another disk, or one without links
                shutil.copyfile(main.folder(name) / file, target)
        record = {key: value for key, value in manifest.items() if key not in ("outputs", "digest")}
        published = store.publish(name, content, record)
    assert published["digest"] == manifest["digest"], f"{name}: the shared files differ from the original ones"


def rlhf_words(stage: str, config: str, artifacts: str, name: str, settings: Sequence[str]) -> list[str]:
    """Return the command that brings a stage of an experiment up to date, to be run in ROOT.

    Args:
        stage: The stage.
        config: The YAML file.
        artifacts: Folder of all experiments.
        name: Name of the experiment.
        settings: Its settings, as `key=value`; the last of a key counts.
    """
    words = [sys.executable, "-c", "import sys; from pipeline.cli import main; sys.exit(main(sys.argv[1:]))"]
    return [*words, "run", stage, "-c", config, "--artifacts", artifacts, f"name={name}", *settings]


def run_rlhf(
    args: Namespace, stop: StopFlag, stage: str, name: str, settings: Sequence[str], called: str | None = None
) -> None:
    """Bring a stage of an experiment up to date, in a process of its own.

    Args:
        args: The command line: `config` and `artifacts`.
        stop: Set by a signal.
        stage: The stage.
        name: Name of the experiment.
        settings: Its settings, as `key=value`; the last of a key counts.
        called: What the experiment is called in an error line; None: its name.

    Raises:
        Interrupted: The stage did not end well, and a signal had come.
        UserError: The stage did not end well.
    """
    words = rlhf_words(stage, args.config, args.artifacts, name, settings)
    code = subprocess.run(words, cwd=ROOT, stdout=sys.stderr).returncode
    if code:
        raise (
            Interrupted() if stop.requested else UserError(f"{called or name}: ended with exit code {code}; see above")
        )


def make_parser(program: str, doc: str, results: Path) -> cli.Parser:
    """Return a parser with the options that all comparisons have.

    Args:
        program: Name of the program.
        doc: Docstring of its module.
        results: Default folder of the results files.
    """
    parser = cli.Parser(prog=program, description=doc.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("-c", "--config", default="configs/tiny.yaml", metavar="FILE", help="the experiment's YAML")
    parser.add_argument("--artifacts", default="artifacts", metavar="DIR", help="folder of finished stages")
    parser.add_argument("--results", default=results, type=Path, metavar="DIR", help="folder of the results files")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def parse_arguments(parser: cli.Parser, argv: list[str]) -> Namespace:
    """Parse the command line, with its `key=value` words as `overrides`."""
    args = parser.parse_args([word for word in argv if not cli.is_setting(word)])
    args.overrides = [word for word in argv if cli.is_setting(word)]
    return args


def sampling_overrides(experiment: Any, policy: str, count: int) -> list[str]:
    """Return overrides for the stage `samples`: the settings of evaluate, as JSON, which is YAML.

    Args:
        experiment: The experiment whose settings of evaluate are taken.
        policy: Policy that is sampled.
        count: Samples of each prompt.
    """
    settings = experiment.evaluate.model_dump(mode="json", exclude={"policies", "best_of"})
    settings |= {"policy": policy, "samples_per_prompt": count}
    return [f"samples.{key}={json.dumps(value)}" for key, value in settings.items()]


def adaptive_kl_errors(experiment: Any) -> list[str]:
    """Return an error line if PPO adapts kl_coef, since setting it would then mean nothing."""
    target = experiment.ppo.kl_target
    if target is None:
        return []
    return [f"ppo.kl_target: is {target}, which adapts the kl_coef to compare; use ppo.kl_target=null"]


def run_command(body: Callable[[list[str], StopFlag], None], argv: list[str]) -> int:
    """Run a benchmark with the signals, error lines and exit codes of `rlhf`.

    Args:
        body: The benchmark, called with the command line and the stop flag.
        argv: The command line.

    Returns:
        The exit code.
    """
    stop = StopFlag()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    try:
        with stop_on_signals(stop):
            body(argv, stop)
    except SystemExit as error:  # --help
        return int(error.code or 0)
    except Exception as error:
        if "--debug" in argv:
            traceback.print_exc()
        return cli.explain(error)
    return 0


def relative(path: Path) -> str:
    """Return a path relative to the current folder if it lies inside it."""
    return os.path.relpath(path) if Path(path).resolve().is_relative_to(Path.cwd()) else str(path)
