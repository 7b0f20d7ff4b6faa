"""Provide a micro chain, made once for the tests of whole stages."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # micro_chain, second_route


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    """Return a MicroChain that no test may change."""
    from micro_chain import MicroChain

    torch.set_num_threads(1)
    return MicroChain(tmp_path_factory.mktemp("micro"))
