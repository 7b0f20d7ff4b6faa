"""Provide random models of a few thousand parameters in three shapes, ragged rows, and a
tokenizer.
"""

import sys
from pathlib import Path

import pytest

from data.groups import make_rows
from tests.builders import PAD, tiny_causal, tiny_scalar, tiny_tokenizer

sys.path.insert(0, str(Path(__file__).parent))  # families
KINDS = ("llama", "gpt2", "qwen2")
PROMPTS = [[5, 9, 2], [7], [3, 3, 8, 40, 12, 6], [11, 4]]
RESPONSES = [[14, 1], [30, 31, 32, 33, 1], [1], [22, 23, 24]]


def shape_of(kind: str) -> dict:
    """Return what the models here have beside the builders' defaults: heads that share a key
    head.
    """
    return {} if kind == "gpt2" else {"num_key_value_heads": 1, "tie_word_embeddings": True}


@pytest.fixture
def causal():
    """Return causal(kind, seed, **config), which makes a random causal model in eval mode."""

    def build(kind, seed=0, **options):
        return tiny_causal(kind, seed, **{**shape_of(kind), **options})

    return build


@pytest.fixture
def scalar():
    """Return scalar(kind, seed, bias, **config), which makes a random reward model in eval mode."""

    def build(kind, seed=0, bias=0.75, **options):
        return tiny_scalar(kind, seed, bias=bias, **{**shape_of(kind), **options})

    return build


@pytest.fixture(params=KINDS)
def kind(request):
    """Return each kind of model in turn."""
    return request.param


@pytest.fixture
def ragged():
    """Return four prompts and responses of four lengths each; one response has no EOS."""
    return PROMPTS, RESPONSES


@pytest.fixture
def rows():
    """Return the ragged prompts and responses as padded rows."""
    return make_rows(PROMPTS, RESPONSES, PAD)


@pytest.fixture(scope="session")
def tokenizer():
    """Return a tokenizer of at most 300 ids with a chat template."""
    return tiny_tokenizer()
