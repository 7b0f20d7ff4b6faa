"""Describe the machine for people who read a manifest; nothing becomes stale because of it."""

import os
import platform
import re
from pathlib import Path
from typing import Any

from pipeline.launch import devices
from pipeline.launch.environment import usable_cores


def describe_hardware() -> dict[str, Any]:
    """Describe processor, memory and GPUs.

    Returns:
        cpu: the processor's model name.
        cores: how many cores this process may use.
        memory_gb: memory of the machine, or the container's limit if that is lower, in 10⁹ bytes;
            None if the system does not say.
        devices: number of GPUs that torch sees; Apple's counts as one.
        device_memory_gb: memory of the first GPU in 10⁹ bytes; None without one.
    """
    kind = devices.kind_of("auto")
    memory = devices.total_memory(kind)
    return {
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "memory_gb": _memory_gb(),
        "devices": devices.count(kind),
        "device_memory_gb": None if memory is None else round(memory / 1e9, 1),
    }


def _cpu_name() -> str:
    """Return the processor's model name on Linux; elsewhere its architecture."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    """Return the machine's memory or the container's limit, whichever is lower."""
    total = total_memory()
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        total = limit if total is None else min(total, limit)
    except (OSError, ValueError):  # without a limit, the file says "max"
        pass
    return None if total is None else round(total / 1e9, 1)


def total_memory() -> int | None:
    """Return the bytes of the machine's memory; None if the system does not say."""
    try:
        match = re.search(r"^MemTotal:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:  # macOS has no /proc
        match = None
    if match:
        return int(match[1]) * 1024
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
