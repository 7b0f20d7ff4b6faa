"""This process: environment variables before torch is imported, threads and device after."""

import logging
import os
import platform
import re
from pathlib import Path
from typing import Any

from pipeline.config.sections import names_hub
from pipeline.errors import UserError

QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub, transformers, datasets and trl all ask this one
    "DO_NOT_TRACK": "1",
    "DISABLE_TELEMETRY": "1",
    "WANDB_SILENT": "true",
    "WANDB_ERROR_REPORTING": "false",
    "TOKENIZERS_PARALLELISM": "false",  # tokenizers warns of forks otherwise
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",  # else each retry of a missing id is a line
    "TRANSFORMERS_VERBOSITY": "error",  # what matters is said by the stages
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",  # progress is shown by tracking.py
    "ARROW_DEFAULT_MEMORY_POOL": "system",  # crashes in Arrow's own mimalloc are reported
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # else importing Arrow starts a thread, which a fork loses
    "GOMP_SPINCOUNT": "1000",  # waiting threads soon sleep: beside a busy program a step takes 2 × as long, not 12 ×
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # cuBLAS repeats itself only with a fixed workspace
}


def set_environment(tree: dict[str, Any]) -> None:
    """Must come before torch and the Hugging Face libraries are imported: they read these once. `tree`: the
    config as read ({} without one). What the user's own environment says wins, but for what the config says
    outright."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it asks for a kernel that nothing here calls
    if not names_hub(tree):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if (rank := os.environ.get("RANK", "0")) != "0":  # code that a model brings is copied there before it is imported
        home = os.path.expanduser(os.environ.get("HF_HOME", "~/.cache/huggingface"))
        modules = os.environ.get("HF_MODULES_CACHE", os.path.join(home, "modules"))
        if not modules.endswith(f"-{rank}"):
            os.environ["HF_MODULES_CACHE"] = f"{modules}-{rank}"
    launch, tracking = (tree.get(name) if isinstance(tree.get(name), dict) else {} for name in ("launch", "tracking"))
    wandb = tracking.get("wandb")
    os.environ["WANDB_MODE"] = wandb if wandb in ("online", "offline") else "disabled"
    if launch.get("device") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # also for the libraries that choose a device themselves
    threads = launch.get("threads")
    if isinstance(threads, int) and threads > 0:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    else:
        share = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // share)))


def prepare(experiment: Any) -> None:
    """Sets torch's threads and checks what only torch knows. Once a process, before any work."""
    if experiment.launch.nodes > 1 and "WORLD_SIZE" not in os.environ:
        raise UserError(
            f"launch.nodes: {experiment.launch.nodes} machines are not started from here; use --submit slurm, or "
            f"torchrun on each of them"
        )
    import warnings

    import torch

    warnings.filterwarnings("ignore", category=FutureWarning)  # libraries' words to each other
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if experiment.launch.device == "cuda" and not torch.cuda.is_available():
        raise UserError("launch.device: cuda, and torch sees no GPU; use auto or cpu, or install a CUDA build of torch")


def facts() -> dict[str, Any]:
    """What a run's bytes may depend on beside its settings: recorded in manifests, compared on resume."""
    import torch

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    return {"world_size": int(os.environ.get("WORLD_SIZE", "1")), "threads": torch.get_num_threads(), "device": device}


def hardware() -> dict[str, Any]:
    """Describe the machine for people who read a manifest; nothing is made stale by it.

    Returns:
        {"cpu": its model's name, "cores": those that this process may use, "memory_gb": of the machine or of the
        container's limit (10⁹ bytes; None where the system does not say), "devices": GPUs that torch sees,
        "device_memory_gb": of the first of them, or None}.
    """
    import torch

    gpu = torch.cuda.is_available()
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": _memory_gb(),
        "devices": torch.cuda.device_count() if gpu else 0,
        "device_memory_gb": round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1) if gpu else None,
    }


def _cpu_name() -> str:
    """Return the processor's name as Linux knows it, otherwise the architecture."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    """Return the machine's memory, or the container's limit where that is less; None where neither is known."""
    limits = []
    try:
        fields = re.search(r"^MemTotal:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
        limits += [int(fields[1]) * 1024] if fields else []
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no limit is written as a word
        pass
    return round(min(limits) / 1e9, 1) if limits else None
