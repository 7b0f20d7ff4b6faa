"""Prepare this process: environment variables before torch is imported, threads after."""

import logging
import os
from typing import Any

from pipeline.config.checks import apple_problems
from pipeline.config.sections import names_hub
from pipeline.errors import UserError
from pipeline.launch import devices
from pipeline.launch.processes import rank_and_size_from_environment

DEFAULTS = {
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub, transformers, datasets and trl all read this one
    "DO_NOT_TRACK": "1",
    "DISABLE_TELEMETRY": "1",
    "WANDB_SILENT": "true",
    "WANDB_ERROR_REPORTING": "false",
    "TOKENIZERS_PARALLELISM": "false",  # otherwise tokenizers warns of forks
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",  # otherwise each retry of a missing id prints a line
    "TRANSFORMERS_VERBOSITY": "error",  # stages print what matters
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",  # tracking.py shows progress
    "ARROW_DEFAULT_MEMORY_POOL": "system",  # there are reports of crashes in Arrow's own mimalloc
    # otherwise importing Arrow starts a thread, which does not survive a fork
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    # waiting threads go to sleep early: beside another busy program a step takes 2 × as long, not
    # 12 ×
    "GOMP_SPINCOUNT": "1000",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # cuBLAS gives repeatable results only with a fixed workspace
    "PYTORCH_ENABLE_MPS_FALLBACK": "1",  # what Apple's GPU does not compute, torch computes on the CPU
}


def set_environment(tree: dict[str, Any]) -> None:
    """Set the environment variables that torch and the Hugging Face libraries read.

    They read them once, when imported: call this before. Variables that the user has set are kept,
    unless the config contradicts them.

    Args:
        tree: the config as parsed, before validation; {} for commands without one.
    """
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    # bitsandbytes prints that a kernel is missing which nothing here calls
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not names_hub(tree):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    _separate_module_caches()
    launch, tracking = _section(tree, "launch"), _section(tree, "tracking")
    wandb, trackers = tracking.get("wandb"), tracking.get("with")
    if wandb in ("online", "offline"):
        os.environ["WANDB_MODE"] = wandb
    elif not (isinstance(trackers, (list, str)) and "wandb" in trackers):
        os.environ["WANDB_MODE"] = "disabled"
    if launch.get("device") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # also for the libraries that choose a device themselves
    threads = launch.get("threads")
    if isinstance(threads, int) and threads > 0:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    else:
        processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        share = max(1, usable_cores() // processes_here)
        os.environ.setdefault("OMP_NUM_THREADS", str(share))


def usable_cores() -> int:
    """Return how many cores this process may use; where the system has no affinity, all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _section(tree: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a section of an unvalidated config; {} if it is missing or not a mapping."""
    section = tree.get(name)
    return section if isinstance(section, dict) else {}


def _separate_module_caches() -> None:
    """Give every rank but 0 a folder of its own for a model's remote code.

    transformers copies the code there and then imports it: in a shared folder, one rank could
    import a file that another is still writing.
    """
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        return
    home = os.path.expanduser(os.environ.get("HF_HOME", "~/.cache/huggingface"))
    modules = os.environ.get("HF_MODULES_CACHE", os.path.join(home, "modules"))
    if not modules.endswith(f"-{rank}"):
        os.environ["HF_MODULES_CACHE"] = f"{modules}-{rank}"


def prepare(experiment: Any) -> None:
    """Set torch's threads and check the settings that only torch can check.

    Call this once, before any work.

    Args:
        experiment: the validated config.

    Raises:
        UserError: several nodes are asked for but this process was not started by torchrun or
            SLURM; there is no GPU where the config asks for one; or Apple's GPU, which `auto` has
            found, cannot do what the config asks for.
    """
    if experiment.launch.nodes > 1 and "WORLD_SIZE" not in os.environ:
        raise UserError(
            f"launch.nodes: {experiment.launch.nodes} machines cannot be started from here; use --submit slurm, or "
            f"run torchrun on each of them"
        )
    import warnings

    import torch

    warnings.filterwarnings("ignore", category=FutureWarning)  # meant for the libraries' developers
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    check_device(experiment)


def check_device(experiment: Any) -> None:
    """Check that the device that launch.device asks for is there and can do what is asked of it.

    Raises:
        UserError: It is not, or cannot.
    """
    asked, dtype = experiment.launch.device, experiment.model.dtype
    remedy = {"cuda": "install a CUDA or ROCm build of torch", "mps": "use a Mac with Apple silicon"}
    if not devices.is_there(devices.kind_of(asked)):
        raise UserError(f"launch.device: {asked}, and torch sees no such GPU; use auto or cpu, or {remedy[asked]}")
    if devices.kind_of(asked) != "mps":
        return
    lines, (_, size) = apple_problems(experiment), rank_and_size_from_environment()
    if size > 1 and not lines:
        lines = [f"launch: WORLD_SIZE is {size}, and Apple's GPU (mps) takes one process; or set launch.device: cpu"]
    if lines:
        raise UserError(lines)
    if dtype in ("bfloat16", "float16") and not devices.computes_in("mps", dtype):
        raise UserError(
            f"model.dtype: {dtype} was tried on this Apple GPU ({devices.name('mps')}), which does not compute in it; "
            f"use auto or float32"
        )


def facts(device: str = "auto") -> dict[str, Any]:
    """Return the conditions that last bits of the results may depend on.

    These are the number of processes, threads and the device. Manifests record them, and a resumed
    run compares them.

    Args:
        device: launch.device.
    """
    import torch

    # a GPU that launch.device: cpu leaves alone is hidden from torch, but for Apple's
    kind = devices.kind_of("auto" if device == "cuda" else device)
    return {
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "threads": torch.get_num_threads(),
        "device": devices.name(kind),
    }
