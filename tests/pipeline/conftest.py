"""Give each test of the pipeline its own folder, one thread, and restore os.environ."""

import os
from types import SimpleNamespace

import pytest
import torch

from pipeline.config.validation import load_experiment
from pipeline.store.artifacts import ArtifactStore
from tests.pipeline import fakes


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    before, threads = dict(os.environ), torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # no test here cuts the power
    yield
    os.environ.clear()
    os.environ.update(before)
    torch.set_num_threads(threads)


class Lines:
    """A console that keeps its lines."""

    is_terminal = False

    def __init__(self):
        self.lines = []

    def print(self, line="", **_):
        self.lines.append(str(line))

    @property
    def text(self):
        return "\n".join(self.lines)


@pytest.fixture
def world(tmp_path):
    """An experiment of the fake stages: `world.load("fit.steps=3")`, `world.run("fit", …)`,
    `world.states()`."""
    from pipeline import chain, plan
    from pipeline.state import Flags

    (tmp_path / "small.yaml").write_text(fakes.CONFIG)
    here = SimpleNamespace(path=tmp_path / "small.yaml", store=ArtifactStore(tmp_path / "artifacts", "small"))
    here.stages, here.overrides, here.remote = fakes.stages(), [], None

    def load():
        return load_experiment(here.path, here.overrides, fakes.experiment_class(here.stages))

    def run(target, *overrides, stop=None, **flags):
        here.overrides, here.console = list(overrides), Lines()
        return plan.bring_up_to_date(
            target, load(), here.store, here.stages, Flags(**flags), stop, here.console, remote=here.remote
        )

    def states(*overrides):
        here.overrides = list(overrides)
        return chain.assess(load(), here.store, here.stages)

    here.load, here.run, here.states = load, run, states
    return here
