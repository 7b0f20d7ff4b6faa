"""Describe the machine for people who read a manifest; nothing becomes stale because of it."""

import os
import platform
import re
from pathlib import Path
from typing import Any


def describe_hardware() -> dict[str, Any]:
    """Describe processor, memory and GPUs.

    Returns:
        cpu: the processor's model name.
        cores: how many cores this process may use.
        memory_gb: memory of the machine, or the container's limit if that is lower, in 10⁹ bytes;
            None if the system does not say.
        devices: number of GPUs that torch sees.
        device_memory_gb: memory of the first GPU in 10⁹ bytes; None without one.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": _memory_gb(),
        "devices": torch.cuda.device_count() if has_gpu else 0,
        "device_memory_gb": round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1) if has_gpu else None,
    }


def _cpu_name() -> str:
    """Return the processor's model name on Linux, or else its architecture."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    """Return the machine's memory or the container's limit, whichever is lower."""
    limits = []
    try:
        match = re.search(r"^MemTotal:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
        if match:
            limits.append(int(match[1]) * 1024)
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # without a limit, the file says "max"
        pass
    return round(min(limits) / 1e9, 1) if limits else None
