"""Name the trackers that accelerate has, what to install for each, and what we set ourselves."""

import sys
from collections.abc import Iterable
from importlib import util
from typing import Literal, NamedTuple, get_args

TrackerName = Literal[
    "tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "aim", "clearml", "dvclive", "swanlab"
]  # as accelerate's `log_with` spells them


class Package(NamedTuple):
    """Name what a tracker needs installed, and those of its arguments that users may not set."""

    modules: tuple[str, ...]
    """Modules of which one must be importable."""
    install: str
    """Arguments of pip install."""
    ours: tuple[str, ...]
    """Arguments of its start that `tracking.options` cannot set: resuming depends on them."""


PACKAGES: dict[str, Package] = {
    "tensorboard": Package(("tensorboard", "tensorboardX"), "-e '.[tensorboard]'", ("log_dir", "logdir", "purge_step")),
    "wandb": Package(("wandb",), "wandb", ("project", "group", "name", "id", "resume", "mode", "dir", "config")),
    "mlflow": Package(("mlflow",), "-e '.[mlflow]'", ("run_id", "run_name")),
    "trackio": Package(("trackio",), "-e '.[trackio]'", ("project", "group", "name", "resume", "config")),
    "comet_ml": Package(("comet_ml",), "comet_ml", ("project_name", "experiment_key", "mode")),
    "aim": Package(("aim",), "aim", ("repo", "run_hash", "experiment", "force_resume")),
    "clearml": Package(("clearml",), "clearml", ("project_name", "task_name", "reuse_last_task_id")),
    "dvclive": Package(("dvclive",), "dvclive", ("dir", "resume")),
    "swanlab": Package(("swanlab",), "swanlab", ("project", "name", "log_dir", "group", "id", "resume", "config")),
}
NAMES: tuple[str, ...] = get_args(TrackerName)
FOLDERS = ("tensorboard", "wandb", "mlflow", "aim", "dvclive", "swanlab")  # in an experiment's folder


def is_installed(name: str) -> bool:
    """Return whether a tracker's package can be imported; it is not imported."""
    return any(_is_found(module) for module in PACKAGES[name].modules)


def missing_packages(names: Iterable[str]) -> list[str]:
    """Return a line for each of the trackers whose package is not installed."""
    return [
        f"tracking.with: {name} is not installed; .venv/bin/pip install {PACKAGES[name].install}, or leave it out"
        for name in names
        if not is_installed(name)
    ]


def _is_found(module: str) -> bool:
    if module in sys.modules:
        return sys.modules[module] is not None
    return util.find_spec(module) is not None
