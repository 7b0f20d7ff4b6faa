"""Test frozen weights in the dtype of autocast: half the memory, and the same numbers."""

import copy

import pytest
import torch

from pipeline.errors import UserError
from stages.models.adapters import AdapterSettings, merge_adapter, trainable_parameters, unwrapped, with_adapter
from stages.models.ensemble import Ensemble
from stages.models.forward import head_is_linear, response_logprobs, response_scores
from stages.models.packing import can_pack
from stages.models.precision import cast_frozen, castable, frozen, require_finite, uncast
from stages.rollouts.transformers import Decoding, sample_with_logprobs

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")
HALF = torch.bfloat16


def shake(model):
    """Move every trainable weight, as training would."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in trainable_parameters(model).values():
            p += 0.3 * torch.randn(p.shape)


def pair(model):
    """Return a model and a copy with frozen weights cast; both were tried out before."""
    can_pack(model, 64), head_is_linear(model)
    other = copy.deepcopy(model)
    cast_frozen(other, HALF)
    return model, other


def test_numbers_that_are_not_finite_are_refused():
    require_finite(torch.tensor([1.0, -2.0]), "dpo: scores")
    for bad in (float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"^dpo: scores are not finite: .*; set model.dtype: bfloat16 or float32$"):
            require_finite(torch.tensor([1.0, bad]), "dpo: scores")


@pytest.mark.parametrize("method", ["lora", "ia3", "dora"])
@pytest.mark.parametrize("tied", [True, False])
def test_an_adapted_policy_trains_the_same(method, tied, causal, kind, rows):
    """Loss, gradients and samples are equal, bit for bit."""
    model = with_adapter(causal(kind, tie_word_embeddings=tied), AdapterSettings(method=method, r=2))
    shake(model)
    found = []
    for one in pair(model):
        with torch.autocast("cpu", HALF):
            logprobs = response_logprobs(one, rows)
            decoding = Decoding(6, eos_id=1, pad_id=0, temperature=0.7)
            drawn = sample_with_logprobs(one, [[5, 9, 2], [7]], [1, 2], decoding)
        logprobs.sum().backward()
        found.append([logprobs.detach(), drawn.logprobs, *(p.grad for p in trainable_parameters(one).values())])
        assert drawn.responses
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@torch.no_grad()
def test_what_only_predicts_says_the_same_with_half_the_weights(causal, scalar, rows):
    for model, read in (
        (causal("llama", tie_word_embeddings=False), response_logprobs),
        (scalar("llama"), response_scores),
    ):
        small = frozen(copy.deepcopy(model), "bfloat16")
        whole = frozen(copy.deepcopy(model), "float32")
        with torch.autocast("cpu", HALF):
            before = read(model, rows)
            assert torch.equal(read(small, rows), before) and torch.equal(read(whole, rows), before)
        linear = {p.dtype for one in (small, whole) for p in castable(one)}
        assert linear == {HALF, torch.float32} and not any(p.requires_grad for p in small.parameters())


def test_what_is_cast_and_what_is_not(causal, scalar):
    untied = causal("llama", tie_word_embeddings=False).requires_grad_(False)
    cast_frozen(untied, HALF)
    kinds = {name: p.dtype for name, p in untied.named_parameters()}
    assert kinds["lm_head.weight"] == kinds["model.layers.0.self_attn.q_proj.weight"] == HALF
    assert kinds["model.embed_tokens.weight"] == kinds["model.norm.weight"] == torch.float32
    tied = causal("llama").requires_grad_(False)
    cast_frozen(tied, HALF)
    assert tied.lm_head.weight.dtype == torch.float32 and tied.model.layers[0].mlp.up_proj.weight.dtype == HALF
    training = causal("llama")
    cast_frozen(training, HALF)
    assert all(p.dtype == torch.float32 for p in training.parameters())
    rewards = Ensemble([scalar("llama", seed).requires_grad_(False) for seed in range(2)], "mean")
    cast_frozen(rewards, HALF)
    for member in rewards.members:
        assert member.score.weight.dtype == torch.float32 and member.model.layers[0].mlp.up_proj.weight.dtype == HALF
    dora = with_adapter(causal("llama"), AdapterSettings(method="dora", r=2))
    assert castable(dora) == []


def test_frozen_scorers_score_the_same(scalar, kind, rows):
    found = []
    for one in pair(scalar(kind).requires_grad_(False)):
        with torch.autocast("cpu", HALF), torch.no_grad():
            found.append(response_scores(one, rows))
    assert torch.equal(*found)


@pytest.mark.parametrize("method", ["lora", "ia3", "bitfit"])
def test_publication_has_the_weights_that_were_loaded(method, causal, rows):
    """The merged weights are as if nothing had been cast."""
    load = lambda: causal("qwen2", seed=3)  # noqa: E731  (its queries, keys and values have biases)
    model = with_adapter(load(), AdapterSettings(method=method, r=2))
    shake(model)
    whole, other = pair(model)
    assert any(p.dtype == HALF for p in other.parameters())
    uncast(other, load)
    assert all(p.dtype == torch.float32 for p in unwrapped(other).parameters())
    for p, q in zip(merge_adapter(whole).parameters(), merge_adapter(other).parameters(), strict=True):
        assert torch.equal(p, q)
