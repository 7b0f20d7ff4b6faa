"""Build the tiny models and tokenizers that tests share."""

from types import SimpleNamespace

import torch

TEXTS = ("the fox is red .", "what color is the fox ?", "say hello twice .")
LAYERS = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}
PAD, EOS, VOCAB = 0, 1, 48
IDS = SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS)  # stands in for a tokenizer of which only ids are read


def tiny_tokenizer(vocab_size: int = 300):
    """Train a byte-level BPE tokenizer with our chat template on three sentences."""
    from data.tokenizer import train_tokenizer

    return train_tokenizer(list(TEXTS) * 3, vocab_size=vocab_size)


def tiny_config(kind: str = "llama", tokenizer=None, **options):
    """Return the configuration of a model of a few thousand parameters.

    Args:
        kind: "llama", "qwen2" or "gpt2".
        tokenizer: Gives the vocabulary and the special ids; None for VOCAB ids with PAD and EOS.
        options: Changes of the configuration. Weights are wide by default (initializer_range 0.3),
            so that every token's context shows in the numbers.
    """
    from transformers import GPT2Config, LlamaConfig, Qwen2Config

    ids = tokenizer or IDS
    common = {
        "vocab_size": VOCAB if tokenizer is None else len(tokenizer),
        "pad_token_id": ids.pad_token_id,
        "eos_token_id": ids.eos_token_id,
        "bos_token_id": None,
        "use_cache": False,
        "initializer_range": 0.3,
    }
    if kind == "gpt2":
        without_dropout = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
        shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
        return GPT2Config(**{**shape, **without_dropout, **common, **options})
    configs = {"llama": LlamaConfig, "qwen2": Qwen2Config}
    return configs[kind](**{**LAYERS, **common, **options})


def tiny_causal(kind: str = "llama", seed: int = 0, tokenizer=None, **options):
    """Return a random causal language model in eval mode; arguments as of `tiny_config`."""
    from transformers import AutoModelForCausalLM

    return build(AutoModelForCausalLM, seed, tiny_config(kind, tokenizer, **options))


def tiny_scalar(kind: str = "llama", seed: int = 0, tokenizer=None, bias: float = 0.0, **options):
    """Return a random reward or value model in eval mode.

    Args:
        kind: As of `tiny_config`.
        seed: Of its weights.
        tokenizer: As of `tiny_config`.
        bias: Its reward_bias.
        options: As of `tiny_config`.
    """
    from transformers import AutoModelForSequenceClassification

    model = build(AutoModelForSequenceClassification, seed, tiny_config(kind, tokenizer, num_labels=1, **options))
    model.config.reward_bias = bias
    return model


def build(auto, seed: int, config):
    """Return a model of an Auto class with random float32 weights from `seed`, in eval mode."""
    torch.manual_seed(seed)
    return auto.from_config(config, attn_implementation="sdpa").float().eval()
