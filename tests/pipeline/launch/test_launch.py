"""Test the environment variables that a run sets, and the description of the hardware."""

import os
import subprocess
import sys

ARROW = """
import os, pipeline.launch.environment
pipeline.launch.environment.set_environment({})
import pyarrow
print(pyarrow.default_memory_pool().backend_name, len(os.listdir("/proc/self/task")))
"""


def test_arrow_starts_no_thread_and_brings_no_allocator():
    """A process that forks needs one thread; crashes in Arrow's own allocator are reported."""
    unset = {name: value for name, value in os.environ.items() if "ARROW" not in name} | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-c", ARROW], env=unset, capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["system", "1"]


def test_the_hardware_is_described(monkeypatch):
    """A system without Linux's files gives what Python knows, and no error."""
    import pathlib

    from pipeline.launch.hardware import describe_hardware

    found = describe_hardware()
    assert found["cpu"] and found["cores"] == len(os.sched_getaffinity(0)) and found["memory_gb"] > 0.1
    files = {
        "/proc/cpuinfo": "processor\t: 0\nmodel name\t: Some CPU 9000 @ 3GHz\n",
        "/proc/meminfo": "MemTotal:       16000000 kB\nMemFree: 1 kB\n",
        "/sys/fs/cgroup/memory.max": "8000000000\n",
    }
    monkeypatch.setattr(pathlib.Path, "read_text", lambda self: files[str(self)])
    assert describe_hardware() | {"cores": 0} == {
        "cpu": "Some CPU 9000 @ 3GHz", "cores": 0, "memory_gb": 8.0,
        "devices": found["devices"], "device_memory_gb": found["device_memory_gb"],
    }  # fmt: skip
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert describe_hardware()["memory_gb"] == 16.4

    def nothing(self):
        raise FileNotFoundError(self)

    monkeypatch.setattr(pathlib.Path, "read_text", nothing)
    assert describe_hardware()["cpu"] and describe_hardware()["memory_gb"] > 0.1  # as macOS says it
    monkeypatch.setattr(os, "sysconf", nothing)
    assert describe_hardware()["memory_gb"] is None
