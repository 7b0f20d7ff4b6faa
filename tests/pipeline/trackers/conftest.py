"""Put stand-ins for trackers on the path, and accelerate's state into place."""

import sys

import pytest

from tests.pipeline.trackers import standins


@pytest.fixture
def accelerate_state():
    """accelerate's loggers need its state; the next test may need another one."""
    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    PartialState(cpu=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def standin(tmp_path, monkeypatch):
    """A folder of stand-ins on the path of this process, and of those that it starts."""
    folder = tmp_path / "standins"
    standins.install(folder, standins.MODULES)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    yield folder
    for name in list(sys.modules):
        if name.split(".")[0] in (*standins.MODULES, "standin"):
            del sys.modules[name]
