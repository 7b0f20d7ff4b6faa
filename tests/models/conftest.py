"""Random models of a few thousand parameters in three shapes, ragged rows for them, and a tokenizer."""

import sys
from pathlib import Path

import pytest
import torch

from data.groups import make_rows
from data.tokenizer import train_tokenizer

sys.path.insert(0, str(Path(__file__).parent))  # families
KINDS = ("llama", "gpt2", "qwen2")
PAD, VOCAB = 0, 48


def _config(kind, **options):
    from transformers import GPT2Config, LlamaConfig, Qwen2Config

    ids = {
        "vocab_size": VOCAB,
        "pad_token_id": PAD,
        "eos_token_id": 1,
        "bos_token_id": None,
        "use_cache": False,
        "initializer_range": 0.3,
    }  # wide, so that every token's context shows in the numbers
    if kind == "gpt2":
        calm = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
        return GPT2Config(**{"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, **calm, **ids, **options})
    shape = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 24,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    return {"llama": LlamaConfig, "qwen2": Qwen2Config}[kind](**{**shape, **ids, **options})


def _build(auto, kind, seed, **options):
    torch.manual_seed(seed)
    return auto.from_config(_config(kind, **options), attn_implementation="sdpa").float()


@pytest.fixture
def causal():
    """causal(kind, seed, **config) → a random AutoModelForCausalLM in eval mode."""
    from transformers import AutoModelForCausalLM

    return lambda kind, seed=0, **options: _build(AutoModelForCausalLM, kind, seed, **options).eval()


@pytest.fixture
def scalar():
    """scalar(kind, seed, bias, **config) → a random AutoModelForSequenceClassification, one label, in eval
    mode."""
    from transformers import AutoModelForSequenceClassification

    def build(kind, seed=0, bias=0.75, **options):
        model = _build(AutoModelForSequenceClassification, kind, seed, num_labels=1, **options).eval()
        model.config.reward_bias = bias
        return model

    return build


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


PROMPTS = [[5, 9, 2], [7], [3, 3, 8, 40, 12, 6], [11, 4]]
RESPONSES = [[14, 1], [30, 31, 32, 33, 1], [1], [22, 23, 24]]


@pytest.fixture
def ragged():
    """Four prompts and responses of four lengths each (one without EOS)."""
    return PROMPTS, RESPONSES


@pytest.fixture
def rows():
    return make_rows(PROMPTS, RESPONSES, PAD)


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(["the fox is red .", "what color is the fox ?", "say hello twice ."] * 3, vocab_size=300)
