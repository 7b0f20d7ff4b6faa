"""No network and no telemetry (trl's trainers phone home at construction), and a tiny Llama with its
tokenizer."""

import pytest


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        monkeypatch.setenv(name, "1")
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):  # read from the environment at import, maybe before
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", True)


@pytest.fixture(scope="session")
def tokenizer():
    from data.tokenizer import train_tokenizer

    return train_tokenizer(["the fox is red .", "what color is the fox ?", "say hello twice ."] * 3, vocab_size=300)


@pytest.fixture
def llama(tokenizer):
    """llama(auto class, seed, **config) → a random Llama of a few thousand parameters."""
    import torch
    from transformers import LlamaConfig

    def build(auto, seed, **options):
        torch.manual_seed(seed)
        return (
            auto.from_config(
                LlamaConfig(
                    vocab_size=len(tokenizer),
                    hidden_size=16,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    intermediate_size=24,
                    max_position_embeddings=64,
                    pad_token_id=tokenizer.pad_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                    bos_token_id=None,
                    initializer_range=0.2,
                    use_cache=False,
                    **options,
                )
            )
            .float()
            .eval()
        )

    return build
