"""What the tests of whole stages share: a micro chain, made once."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # micro_chain, second_route


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    from micro_chain import MicroChain

    torch.set_num_threads(1)
    return MicroChain(tmp_path_factory.mktemp("micro"))
