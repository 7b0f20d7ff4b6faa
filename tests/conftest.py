"""Keep the tests quiet, offline and repeatable, and start the longest files first.

The environment is the one that `rlhf` sets before its imports. The copies that transformers makes
of models' own code go to a temporary folder.
"""

import os
import sys
import tempfile
from pathlib import Path

import hypothesis
import pytest

from pipeline.launch.environment import set_environment

MODULES = tempfile.TemporaryDirectory(prefix="rlhf-modules-")
os.environ["HF_MODULES_CACHE"] = MODULES.name
set_environment({})
sys.path.insert(0, str(Path(__file__).parent))  # remote_model
# Generated inputs are the same in each run, and a busy machine fails no test.
hypothesis.settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("repeatable")

ROOT = Path(__file__).resolve().parent
LONGEST = (
    "test_demo.py",  # 330 to 550 s on two cores
    "resume/test_faults.py",  # 420 s
    "stages/test_minimal.py",  # 225 s
    "stages/tools/test_memory_held.py",  # 300 s
    "models/test_families.py",  # 120 s
    "resume",
    "people/browser/test_killed.py",  # 80 s
    "test_notebook.py",
)
"""Files and folders whose slow tests take longest, in the order in which they start."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave files without a slow test out of a run of slow ones: importing all takes a minute."""
    if not wants_slow(config) or not collection_path.match("test_*.py") or names_slow(collection_path):
        return None
    return True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the longest files first, so that no worker is alone with one of them in the end.

    Raises:
        pytest.UsageError: `-m slow` would not find a slow test.
    """
    for path in {item.path for item in items if is_slow(item)}:
        if not names_slow(path):
            raise pytest.UsageError(f"{path}: it has a slow test, but not the word slow, by which -m slow finds files")
    if quick := [item.nodeid for item in items if item.get_closest_marker("exhaustive") and not is_slow(item)]:
        raise pytest.UsageError(f"{quick[0]}: what is exhaustive is slow too, or `make test` would run it")
    if not wants_slow(config):
        return

    def place(item: pytest.Item) -> int:
        path = item.path.relative_to(ROOT)
        found = [i for i, name in enumerate(LONGEST) if Path(name) in (path, *path.parents)]
        return min(found, default=len(LONGEST))

    items.sort(key=place)  # stable: the tests of a file keep their order


def is_slow(item: pytest.Item) -> bool:
    """Return whether a test is marked slow."""
    return item.get_closest_marker("slow") is not None


def wants_slow(config: pytest.Config) -> bool:
    """Return whether a run takes slow or exhaustive tests, and no quick ones."""
    return config.option.markexpr in ("slow", "exhaustive", "slow and not exhaustive")


def names_slow(path: Path) -> bool:
    """Return whether a test file has the word slow, as one with a slow test has."""
    return "slow" in path.read_text(encoding="utf-8")
