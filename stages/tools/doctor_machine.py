"""Check the device, bfloat16, threads and memory of this machine."""

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.tools.doctor_checks import BAD, GOOD, NOTE, Line

MEMORY = 3
"""GB of memory that a run of the embedded world needs."""


def check_machine(experiment: Any) -> Iterator[Line]:
    """Check the device, bfloat16, threads and memory."""
    import torch

    device = experiment.launch.device if experiment else "auto"
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus:
        for i in range(gpus):
            properties = torch.cuda.get_device_properties(i)
            yield Line(GOOD, f"device cuda:{i}", f"{properties.name}, {properties.total_memory / 1e9:.0f} GB")
    elif device == "cuda":
        cuda = torch.version.cuda
        built = f"torch is built for CUDA {cuda}" if cuda else "this torch is a CPU build"
        yield Line(
            BAD,
            "device",
            f"launch.device is cuda, but torch finds no GPU ({built})",
            "set launch.device: auto, or install a CUDA build of torch and the driver",
        )
    else:
        yield Line(GOOD, "device", "cpu" + ("" if torch.version.cuda is None else ", no GPU found"))
    yield check_bfloat16(experiment, bool(gpus))
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    quota = cpu_quota()
    usable = max(1, int(min(cores, quota or cores)))
    found = f"{threads} threads on {cores} cores"
    if quota:
        found += f", this container may use {quota:.2g}"
    yield Line(
        GOOD if threads <= usable else NOTE,
        "threads",
        found,
        "" if threads <= usable else f"set launch.threads: {usable}",
    )
    total, free = memory_gb()
    yield Line(
        GOOD if free >= MEMORY else NOTE,
        "memory",
        f"{free:.1f} GB free of {total:.1f}",
        "" if free >= MEMORY else f"{MEMORY} GB are needed: close something, or lower batch sizes",
    )


def check_bfloat16(experiment: Any, has_gpu: bool) -> Line:
    """Check whether bfloat16 is supported, and measure how much faster than float32 it is."""
    import torch

    device = "cuda" if has_gpu else "cpu"
    wanted = experiment is not None and experiment.model.dtype == "bfloat16"
    if has_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        return Line(NOTE, "bfloat16", "this GPU does not support it", "set model.dtype: float32" if wanted else "")
    speed = {}
    for dtype in (torch.float32, torch.bfloat16):
        size = 4096 if has_gpu else 768
        matrix, best = torch.ones(size, size, dtype=dtype, device=device), float("inf")
        for _ in range(5):  # the fastest of five, because other processes may be running
            start = time.perf_counter()
            (matrix @ matrix)[0, 0].item()
            best = min(best, time.perf_counter() - start)
        speed[dtype] = 2 * size**3 / best / 1e9
    speedup = speed[torch.bfloat16] / speed[torch.float32]
    found = f"{speed[torch.bfloat16]:,.0f} GFLOP/s, float32 {speed[torch.float32]:,.0f}"
    if speedup < 1:
        remedy = f"{'set' if wanted else 'keep'} model.dtype: float32"
        return Line(NOTE, "bfloat16", f"{found}: slower", remedy)
    hint = "" if wanted or speedup < 1.5 else "model.dtype: bfloat16 is worth trying from 100M parameters up"
    return Line(GOOD, "bfloat16", f"{found}: {speedup:.1f} × as fast", hint)


def cpu_quota() -> float | None:
    """Return how many cores this container may use (cgroup v2); None without a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def memory_gb() -> tuple[float, float]:
    """Return total and free memory in GB, within the container's limit if it has one."""
    fields = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text()))
    total, free = int(fields["MemTotal"]) * 1024, int(fields["MemAvailable"]) * 1024
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        total, free = min(total, limit), min(free, limit - used)
    except (OSError, ValueError):
        pass
    return total / 1e9, free / 1e9
