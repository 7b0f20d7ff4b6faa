"""Provide a tiny Llama with its tokenizer, and refuse network and telemetry.

trl's trainers send telemetry when they are made.
"""

import pytest

from tests.builders import build, tiny_config, tiny_tokenizer


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Turn off network and telemetry, also in libraries that read the environment when imported."""
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        monkeypatch.setenv(name, "1")
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", True)


@pytest.fixture(scope="session")
def tokenizer():
    """Return a tokenizer of at most 300 ids with a chat template."""
    return tiny_tokenizer()


@pytest.fixture
def llama(tokenizer):
    """Return llama(auto class, seed, **config), which makes a random Llama in eval mode."""

    def make(auto, seed, **options):
        return build(auto, seed, tiny_config("llama", tokenizer, **{"initializer_range": 0.2, **options}))

    return make
