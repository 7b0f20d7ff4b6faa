import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for resume_worker, also in the processes that it starts

from resume_worker import CONFIG, rlhf


@pytest.fixture(scope="session")
def oracle(tmp_path_factory):
    """Return the artifacts of the whole chain, run without interruption."""
    root = tmp_path_factory.mktemp("oracle")
    assert rlhf("run", "evaluate", "-c", str(CONFIG), "--artifacts", str(root)) == 0
    return root
