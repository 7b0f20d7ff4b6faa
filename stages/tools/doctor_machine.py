"""Check the device, 16-bit products, threads and memory of this machine."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.launch import devices
from pipeline.launch.environment import usable_cores
from stages.tools.doctor_checks import BAD, GOOD, NOTE, Line

MEMORY = 3
"""GB of memory that a run of the embedded world needs."""


def check_machine(experiment: Any) -> Iterator[Line]:
    """Check the device, 16-bit products, threads and memory."""
    import torch

    asked = experiment.launch.device if experiment else "auto"
    kind = devices.kind_of(asked)
    yield from check_device(asked, kind)
    if devices.is_there(kind):
        yield check_16_bits(experiment, kind)
    cores, threads = usable_cores(), torch.get_num_threads()
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


def check_device(asked: str, kind: str) -> Iterator[Line]:
    """Check that the device is there, and name it.

    Args:
        asked: launch.device.
        kind: What it comes to: "cpu", "cuda" or "mps".
    """
    import torch

    hip = getattr(torch.version, "hip", None)
    built = f"for ROCm {hip}" if hip else f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for the CPU"
    if not devices.is_there(kind):
        remedies = {
            "cuda": "set launch.device: auto, or install a CUDA or ROCm build of torch and the driver",
            "mps": "set launch.device: auto; mps needs a Mac with Apple silicon",
        }
        found = f"launch.device is {asked}, but torch finds no such GPU (torch is built {built})"
        yield Line(BAD, "device", found, remedies[kind])
        return
    for i in range(devices.count(kind)):
        memory = devices.total_memory(kind, i) or 0
        where = f"cuda:{i}" if kind == "cuda" else kind
        shared = " of the machine's memory" if kind == "mps" else ""
        shown_as = f", ROCm {hip}, which torch calls cuda" if kind == "cuda" and hip else ""
        yield Line(GOOD, f"device {where}", f"{devices.name(kind, i)}, {memory / 1e9:.0f} GB{shared}{shown_as}")
    if kind == "cpu":
        no_gpu = asked == "auto" and (torch.version.cuda or hip)
        yield Line(GOOD, "device", "cpu" + (", no GPU found" if no_gpu else ""))


def check_16_bits(experiment: Any, kind: str) -> Line:
    """Check which 16-bit dtype is supported, and measure how much faster than float32 it is.

    Args:
        experiment: The validated experiment, or None.
        kind: "cpu", "cuda" or "mps".
    """
    import torch

    dtype = "float16" if kind == "cuda" and not devices.has_native_bfloat16(kind) else "bfloat16"
    wanted = experiment is not None and experiment.model.dtype == dtype
    if experiment is not None and experiment.model.dtype == "bfloat16" and dtype == "float16":
        return Line(NOTE, "bfloat16", "this GPU does not compute in it natively", "set model.dtype: float16, or auto")
    if kind == "mps" and not devices.computes_in(kind, dtype):
        return Line(NOTE, dtype, "was tried, and this GPU does not compute in it", "set model.dtype: float32, or auto")
    speed = {}
    for name in ("float32", dtype):
        size = 768 if kind == "cpu" else 4096
        matrix, best = torch.ones(size, size, dtype=getattr(torch, name), device=kind), float("inf")
        for _ in range(5):  # the fastest of five, because other processes may be running
            start = time.perf_counter()
            (matrix @ matrix)[0, 0].item()
            best = min(best, time.perf_counter() - start)
        speed[name] = 2 * size**3 / best / 1e9
    speedup = speed[dtype] / speed["float32"]
    found = f"{speed[dtype]:,.0f} GFLOP/s, float32 {speed['float32']:,.0f}"
    if speedup < 1:
        remedy = f"{'set' if wanted else 'keep'} model.dtype: float32"
        return Line(NOTE, dtype, f"{found}: slower", remedy)
    hint = "" if wanted or speedup < 1.5 else f"model.dtype: {dtype} is worth trying from 100M parameters up"
    return Line(GOOD, dtype, f"{found}: {speedup:.1f} × as fast", hint)


def cpu_quota() -> float | None:
    """Return how many cores this container may use (cgroup v2); None without a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def memory_gb() -> tuple[float, float]:
    """Return total and free memory in GB, within the container's limit if it has one."""
    import psutil  # accelerate needs it, too

    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        total, free = min(total, limit), min(free, limit - used)
    except (OSError, ValueError):
        pass
    return total / 1e9, free / 1e9
