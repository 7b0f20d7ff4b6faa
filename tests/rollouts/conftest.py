"""Make random models of a few thousand parameters with decided next-token distributions."""

import pytest
import torch

PAD, EOS, VOCAB = 0, 1, 20


@pytest.fixture(params=["packed", "wide", "recorded", "padded"])
def causal(request, monkeypatch):
    """Return causal(kind, seed, spread), which makes a model.

    spread is the standard deviation of the weights: the larger, the more decided its distributions.
    Every test runs on models that read packed rows, on models whose layers count as wide, with the
    lane of a GPU (a CPU records no step), and on models that do not pack.
    """
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    from stages.models.packing import can_pack
    from stages.rollouts.lanes import RecordedLane

    if request.param == "wide":
        monkeypatch.setattr("stages.rollouts.lanes.WIDE_INPUTS", 16)
    if request.param == "recorded":
        monkeypatch.setattr("stages.rollouts.lanes.COLUMN_BLOCK", 4)
        monkeypatch.setattr("stages.rollouts.transformers.lane_for", lambda *_: RecordedLane)

    def build(kind="llama", seed=0, spread=0.3):
        ids = {
            "vocab_size": VOCAB,
            "pad_token_id": PAD,
            "eos_token_id": EOS,
            "bos_token_id": None,
            "initializer_range": spread,
            "use_cache": False,
        }
        if kind == "gpt2":
            config = GPT2Config(
                n_embd=16, n_layer=2, n_head=2, n_positions=64, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, **ids
            )
        else:
            config = LlamaConfig(
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                intermediate_size=24,
                max_position_embeddings=64,
                **ids,
            )
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float().eval()
        assert request.param == "padded" or can_pack(model, 64)
        return model

    return build
