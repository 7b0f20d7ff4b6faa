"""Build what a manifest records of a run: figures, versions, code and machine."""

import os
import platform
import socket
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.config.sections import AXES, Common
from pipeline.launch import environment, hardware
from pipeline.stage import Stage
from pipeline.store.artifacts import now
from pipeline.tracking import format_number

LIBRARIES = (
    "torch",
    "transformers",
    "trl",
    "datasets",
    "accelerate",
    "peft",
    "bitsandbytes",
    "tokenizers",
    "safetensors",
    "numpy",
)


def manifest_of(
    run: dict[str, Any], seed: int, metrics: dict[str, Any], command: str, tracker_run_id: str | None
) -> dict[str, Any]:
    """Return the manifest of a finished run, without what publication adds.

    Args:
        run: Content of its run.json.
        seed: The experiment's seed.
        metrics: What the stage's `run` returned.
        command: The command as it was typed, or "".
        tracker_run_id: Id of the run in the tracker, if there is one.
    """
    return {
        "stage": run["stage"],
        "status": "done",
        "run_id": run["run_id"],
        "fingerprint": run["fingerprint"],
        "config": run["config"],
        "inputs": run["inputs"],
        "metrics": metrics,
        "versions": versions(),
        "git": git_state(),
        "seed": seed,
        "world_size": run["world_size"],
        "threads": run["threads"],
        "device": run.get("device"),
        "strategy": run.get("strategy"),
        **{key: run[key] for key in AXES if run.get(key)},
        "hardware": hardware.describe_hardware(),
        "command": command or None,
        "started_at": run["started_at"],
        "finished_at": now(),
        "resumes": run["resumes"],
        "tracker_run_id": tracker_run_id,
    }


def process_facts(experiment: Common) -> dict[str, Any]:
    """Return who runs the stage, and what the last bits of its results may depend on."""
    facts = environment.facts(experiment.launch.device)
    launch = experiment.launch
    axes = {key: size for key in AXES if (size := getattr(launch, key) or 1) > 1}
    layout = launch.layout(facts["world_size"])
    return {"pid": os.getpid(), "host": socket.gethostname(), **facts, "strategy": layout, **axes}


def headline(stage: Stage, metrics: dict[str, Any]) -> list[str]:
    """Return the figures that a stage shows first, as far as it has them: "kl 3.2"."""
    return [f"{key} {format_number(metrics[key])}" for key in stage.headline if metrics.get(key) is not None]


def versions() -> dict[str, str]:
    """Return the versions of Python, of this package and of the libraries, as far as installed."""
    installed = {"python": platform.python_version()}
    for name in ("rlhf-pipeline", *LIBRARIES):
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def git_state() -> dict[str, Any] | None:
    """Return the commit of the running code and whether files differ from it.

    Returns:
        {"commit": hash, "dirty": bool}; None outside a git checkout.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = git(root, "rev-parse", "HEAD")
        changes = git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.strip(), "dirty": bool(changes.strip())}


def git(root: Path, *words: str) -> str:
    """Run a git command in a folder and return its output."""
    command = ["git", "-C", str(root), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
