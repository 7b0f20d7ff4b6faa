import fcntl
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for resume_worker, also in the processes that it starts

from resume_worker import CONFIG, rlhf


@pytest.fixture(scope="session")
def oracle(tmp_path_factory):
    """Return the artifacts of the whole chain, run without interruption; no test may change them.

    The workers of pytest-xdist share one run: the first that needs it makes it, others wait.
    """
    base = tmp_path_factory.getbasetemp()
    place = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    root, made = place / "oracle", place / "oracle.made"
    with (place / "oracle.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            assert rlhf("run", "evaluate", "-c", str(CONFIG), "--artifacts", str(root)) == 0
            made.touch()
    return root
