"""Random models of a few thousand parameters whose next-token distributions are far from flat."""

import pytest
import torch

PAD, EOS, VOCAB = 0, 1, 20


@pytest.fixture(params=["packed", "wide", "recorded", "padded"])
def causal(request, monkeypatch):
    """causal(kind, seed, spread): spread = standard deviation of the weights; wide means decided. Every test runs on
    models that read packed rows, on such with layers that count as wide, on such as a GPU would serve them (its steps
    run as they are: a CPU records none), and on models that do not pack."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    from stages.models.packing import can_pack
    from stages.rollouts.lanes import RecordedLane

    if request.param == "wide":
        monkeypatch.setattr("stages.rollouts.lanes.WIDE", 16)
    if request.param == "recorded":
        monkeypatch.setattr("stages.rollouts.lanes.COLUMNS", 4)
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
