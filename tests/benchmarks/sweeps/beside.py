"""Experiments beside a main one: they share each of its finished stages that would be the same, and run the rest.

What is the same is the pipeline's own word: the fingerprint of a stage, in which the experiment's name does not count.
"""

import json
import os
import shutil
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import api, cli
from pipeline.chain import Chain
from pipeline.commands import make_console
from pipeline.config.sections import Common
from pipeline.config.validation import validate_tree
from pipeline.config.yaml_tree import read_tree
from pipeline.errors import UserError
from pipeline.launch import environment as launch
from pipeline.launch.signals import stop_on_signals
from pipeline.plan import bring_up_to_date
from pipeline.stage import Stage, StopFlag
from pipeline.state import Flags, StageState
from pipeline.store import files
from pipeline.store.artifacts import ArtifactStore
from sweeps.words import markdown


@dataclass
class Workshop:
    """The experiments of one config, run one after the other in this process: libraries are imported once."""

    config: str
    overrides: list[str]
    stop: StopFlag
    console: Any = field(default_factory=make_console)
    stages: dict[str, Stage] = field(default_factory=api.stages)  # by name
    experiment_class: type[Common] = field(default_factory=api.experiment_class)

    def load(self, *more: str) -> Any:
        """Return the validated experiment with `more` overrides on top, and set the environment for it."""
        tree = read_tree(self.config, [*self.overrides, *more])
        launch.set_environment(tree.values)
        return validate_tree(tree, self.experiment_class, [stage.check for stage in self.stages.values()])

    def open(self) -> Any:
        """The main experiment; from here on the sweeps' own stage `samples` is known, too."""
        experiment = self.load()
        from sweeps import samples  # imports torch

        self.stages = {**self.stages, samples.STAGE.name: samples.STAGE}
        self.experiment_class = samples.SweepExperiment
        return experiment

    def bring(self, experiment: Any, store: ArtifactStore, *targets: str) -> None:
        """Brings stages of the main experiment up to date, as `rlhf run` does."""
        launch.prepare(experiment)
        for target in targets:
            bring_up_to_date(target, experiment, store, self.stages, Flags(), self.stop, self.console)

    def bring_beside(self, experiment: Any, store: ArtifactStore, target: str, *others: ArtifactStore) -> None:
        """The same for an experiment beside `others`: what one of them has finished is shared, and only the rest runs.
        An interrupted run that no longer fits is dropped: nobody but this command made it."""
        states = share(target, experiment, store, self.stages, *others)
        if damage := [line for state in states.values() if state.kind == "damaged" for line in state.reasons]:
            raise UserError([f"{line.partition(';')[0]}; remove {store.base} and run again" for line in damage])
        for name in [name for name, state in states.items() if state.kind != "done"] or [target]:
            flags = Flags(only=True, restart=bool(states[name].changes or states[name].waiting))
            bring_up_to_date(name, experiment, store, self.stages, flags, self.stop, self.console)

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def show(self, title: str, headings: list[str], rows: list[list[str]]) -> None:
        """Print a table, as Markdown."""
        self.say(f"\n{title}\n\n{markdown(headings, rows)}\n")


def share(
    target: str, experiment: Any, store: ArtifactStore, stages: dict[str, Any], *others: ArtifactStore
) -> dict[str, StageState]:
    """Publishes in `store` every finished stage of `others` that `experiment` would make the same on the way to
    `target`; returns the state of all stages on that way."""
    chain = Chain(experiment, store, stages)
    for name in chain.closure(target):
        state = chain.assess(name)
        if state.kind in ("missing", "stale", "damaged"):
            for other in others:
                theirs = other.manifest(name)
                if theirs is not None and theirs["fingerprint"] == chain.today(name).fingerprint:
                    link(name, other, store)
                    state = chain.assess(name)
                    assert state.kind == "done", f"{name} was shared and is {state.sentence()}"
                    break
        chain.states[name] = state
    return chain.states


def link(name: str, main: ArtifactStore, store: ArtifactStore) -> None:
    """Publishes a stage of `main` in `store` under the same manifest. Files are hard links where the disk has them:
    artifacts are only ever replaced whole, never written into."""
    manifest = main.verify(name)
    with store.lock(name):
        content = store.folder(name) / ".tmp-publish"
        files.remove(content)
        for file in manifest["outputs"]:
            there = content / file
            there.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(main.folder(name) / file, there)
            except OSError:  # another disk, or one without links
                shutil.copyfile(main.folder(name) / file, there)
        record = {key: value for key, value in manifest.items() if key not in ("outputs", "digest")}
        published = store.publish(name, content, record)
    assert published["digest"] == manifest["digest"], f"{name}: what was shared is not what was there"


def options(program: str, doc: str, results: Path) -> cli.Parser:
    """What every comparison may be told. doc: its module's docstring; results: the folder of its lines."""
    parser = cli.Parser(prog=program, description=doc.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("-c", "--config", default="configs/tiny.yaml", metavar="FILE", help="the experiment's YAML")
    parser.add_argument("--artifacts", default="artifacts", metavar="DIR", help="where finished stages are kept")
    parser.add_argument("--results", default=results, type=Path, metavar="DIR", help="where lines are kept")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def parsed(parser: cli.Parser, argv: list[str]) -> Namespace:
    """The command line, its `key=value` as `overrides`."""
    asked = parser.parse_args([word for word in argv if not cli.is_setting(word)])
    asked.overrides = [word for word in argv if cli.is_setting(word)]
    return asked


def sampling(experiment: Any, policy: str, count: int) -> list[str]:
    """Settings of the stage `samples` as overrides: evaluate's, as JSON, which is YAML."""
    settings = experiment.evaluate.model_dump(mode="json", exclude={"policies", "best_of"})
    settings |= {"policy": policy, "samples_per_prompt": count}
    return [f"samples.{key}={json.dumps(value)}" for key, value in settings.items()]


def adaptive(experiment: Any) -> list[str]:
    """A line where PPO itself moves kl_coef, so that setting it would say nothing."""
    target = experiment.ppo.kl_target
    what = f"ppo.kl_target: is {target} and moves kl_coef, which is what is compared; set ppo.kl_target=null"
    return [] if target is None else [what]


def command(body: Callable[[list[str], StopFlag], None], argv: list[str]) -> int:
    """Runs a benchmark with `rlhf`'s signals, error lines and exit codes."""
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
    """A path as short as it can be said from here."""
    return os.path.relpath(path) if Path(path).resolve().is_relative_to(Path.cwd()) else str(path)
