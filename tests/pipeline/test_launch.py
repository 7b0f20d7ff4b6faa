"""The environment that a run gives the libraries before it imports them."""

import os
import subprocess
import sys

ARROW = """
import os, pipeline.launch
pipeline.launch.set_environment({})
import pyarrow
print(pyarrow.default_memory_pool().backend_name, len(os.listdir("/proc/self/task")))
"""


def test_arrow_starts_no_thread_and_brings_no_allocator():
    """A process that forks must have one thread; and crashes in Arrow's own allocator are reported."""
    unset = {name: value for name, value in os.environ.items() if "ARROW" not in name} | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-c", ARROW], env=unset, capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["system", "1"]
