"""Make random models of a few thousand parameters with decided next-token distributions."""

import pytest

from tests.builders import tiny_causal

VOCAB = 20


@pytest.fixture(params=["packed", "wide", "recorded", "padded"])
def causal(request, monkeypatch):
    """Return causal(kind, seed, spread), which makes a model.

    spread is the standard deviation of the weights: the larger, the more decided its distributions.
    Every test runs on models that read packed rows, on models whose layers count as wide, with the
    lane of a GPU (a CPU records no step), and on models that do not pack.
    """
    from stages.models.packing import can_pack
    from stages.rollouts.lanes import RecordedLane

    if request.param == "wide":
        monkeypatch.setattr("stages.rollouts.lanes.WIDE_INPUTS", 16)
    if request.param == "recorded":
        monkeypatch.setattr("stages.rollouts.lanes.COLUMN_BLOCK", 4)
        monkeypatch.setattr("stages.rollouts.transformers.lane_for", lambda *_: RecordedLane)

    def build(kind="llama", seed=0, spread=0.3):
        heads = {} if kind == "gpt2" else {"num_attention_heads": 4, "num_key_value_heads": 2}
        model = tiny_causal(kind, seed, vocab_size=VOCAB, initializer_range=spread, **heads)
        assert request.param == "padded" or can_pack(model, 64)
        return model

    return build
