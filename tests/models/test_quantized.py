"""Test QLoRA: quantized weights have bitsandbytes' bytes; products and merging use these
weights.
"""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.errors import UserError
from stages.models.adapters import (
    AdapterSettings,
    adapter_off,
    merge_adapter,
    trainable_parameters,
    unwrapped,
    with_adapter,
)
from stages.models.forward import head_is_linear, response_logprobs, response_scores, response_values
from stages.models.loading import load_policy, load_scalar_model
from stages.models.packing import can_pack
from stages.models.precision import cast_frozen, uncast
from stages.models.publish import save_model
from stages.models.quantized import Quantized, quantize
from stages.rollouts.transformers import Decoding, sample_with_logprobs

try:
    import bitsandbytes
except ImportError:
    bitsandbytes = None
needs_it = pytest.mark.skipif(bitsandbytes is None, reason="bitsandbytes is not installed (the extra qlora)")
BITS = pytest.mark.parametrize("bits", [4, 8])
SHAPES = pytest.mark.parametrize("inner, outer", [(16, 48), (64, 64), (300, 130)])  # whole blocks of 64, and cut ones
# QLoRA, appendix E
NF4 = [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0]
NF4 += [0.0795803, 0.1609302, 0.24611230, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]


def linear(inner, outer, seed=0):
    torch.manual_seed(seed)
    layer = nn.Linear(inner, outer)
    with torch.no_grad():
        layer.weight[1] = 0.0  # a row without a scale
        layer.weight[2] *= 50.0
    return layer


def qlora(model, bits, scalar=False):
    """Return `model` with an adapter, moved from its start, on its quantized layers."""
    model = with_adapter(model, AdapterSettings(method="qlora", bits=bits, r=4, lora_alpha=8), scalar=scalar)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in trainable_parameters(model).values():
            p += 0.3 * torch.randn(p.shape, generator=generator)
    return model


def held_by_bitsandbytes(weight, bits):
    """Return the float32 weight of a layer of bitsandbytes, and its bytes.

    4 bits are dequantized here: bitsandbytes 0.50.2 takes wrong scales on a CPU if a block crosses
    the end of a row.
    """
    if bits == 4:
        own = bitsandbytes.nn.Params4bit(weight.clone(), quant_type="nf4", compress_statistics=True).to("cpu")
        state, pairs = own.quant_state, own.data.flatten().long()
        scales = bitsandbytes.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        whole = torch.tensor(NF4)[torch.stack([pairs >> 4, pairs & 15], 1).flatten()][: weight.numel()]
        return (whole * scales.repeat_interleave(64)[: len(whole)]).view_as(weight), own.data
    own = bitsandbytes.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False).to("cpu")
    return own.data.float() * own.SCB.unsqueeze(1) / 127, own.data


@needs_it
@SHAPES
@BITS
def test_held_is_what_bitsandbytes_own_layers_hold(bits, inner, outer):
    layer = linear(inner, outer)
    weight, data = held_by_bitsandbytes(layer.weight.detach(), bits)
    held = Quantized(layer, bits)
    assert torch.equal(held.weight[: len(data)], data)
    torch.testing.assert_close(held.dequantized(), weight, rtol=1e-6, atol=1e-8)


@needs_it
@SHAPES
@BITS
def test_held_is_what_the_papers_say(bits, inner, outer):
    """Compute by hand: the nearest of 16 numbers times the largest weight of a block, which is
    itself in 8 bits; or integers from −127 to 127 times the largest weight of a row.
    """
    layer = linear(inner, outer)
    weight = layer.weight.detach()
    if bits == 8:
        scale = weight.half().float().abs().amax(1, keepdim=True)
        expected = (weight.half().float() * (127 / scale)).round().nan_to_num() * scale / 127
        torch.testing.assert_close(Quantized(layer, 8).dequantized(), expected, rtol=1e-5, atol=1e-7)
        return
    blocks = F.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    code = torch.tensor(NF4)
    nearest = code[((blocks / scale.clamp(min=1e-30)).unsqueeze(-1) - code).abs().argmin(-1)]
    found = F.pad(Quantized(layer, 4).dequantized().flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    rounded = 0.01 * (scale - scale.mean()).abs().max()  # of the scales: a table of 256 steps, finer towards 0
    assert ((found - nearest * scale).abs() <= rounded * nearest.abs() + 1e-6).all()


@needs_it
@BITS
def test_the_same_weights_give_the_same_bytes(bits):
    one, other = (Quantized(linear(64, 64), bits) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    copied = copy.deepcopy(one)
    assert torch.equal(copied.dequantized(), one.dequantized()) and copied.weight.data_ptr() != one.weight.data_ptr()


@needs_it
@BITS
@pytest.mark.parametrize("training", [True, False])
def test_a_product_and_its_gradient_are_those_of_the_weights_held(bits, training):
    """In training and in eval mode, with any rows beside a row; nothing as large as the weight is
    kept between forward and backward.
    """
    layer, x = linear(64, 48), torch.randn(5, 3, 64, requires_grad=True)
    held = Quantized(layer, bits).train(training)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        out = held(x)
    weight = held_by_bitsandbytes(layer.weight.detach(), bits)[0]
    expected = F.linear(x, weight, layer.bias)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(held(x[:1, :1]), expected[:1, :1])
    (grad,), (by_hand,) = (torch.autograd.grad(y.square().sum(), x) for y in (out, expected))
    torch.testing.assert_close(grad, by_hand)
    assert max(kept, default=0) < weight.numel()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(held(x), F.linear(x, weight, layer.bias)) and held(x).dtype == torch.bfloat16


@needs_it
@BITS
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_published_model_is_the_one_that_was_trained(bits, kind, tied, causal, rows, tmp_path, tokenizer):
    """Folder and model in memory give the same log-probs. Each weight is what bitsandbytes' bytes
    stand for plus B·A, computed here; other layers are unchanged.
    """
    before = causal(kind, tie_word_embeddings=tied)
    policy = qlora(causal(kind, tie_word_embeddings=tied), bits)
    head_is_linear(policy), can_pack(policy, 64)
    trained = response_logprobs(policy, rows).detach()
    delta = {
        name.removesuffix(".lora_A.default.weight").removeprefix("base_model.model."): (p.double(), 2.0)
        for name, p in policy.named_parameters()
        if "lora_A" in name
    }
    other = dict(policy.named_parameters())
    for name, (a, scale) in delta.items():
        delta[name] = scale * other[f"base_model.model.{name}.lora_B.default.weight"].double() @ a
    save_model(merge_adapter(policy), tokenizer, tmp_path, card="")
    published = load_policy(tmp_path)
    torch.testing.assert_close(response_logprobs(published, rows), trained, rtol=1e-4, atol=1e-4)
    assert delta and not any("quant" in key for key in published.config.to_dict())
    changed = dict(published.named_parameters())
    for name, p in before.named_parameters():
        layer = name.removesuffix(".weight")
        if layer in delta:
            expected = held_by_bitsandbytes(p.detach(), bits)[0].double() + delta.pop(layer).detach()
            torch.testing.assert_close(changed[name].double(), expected, rtol=0, atol=1e-6)
        else:
            assert torch.equal(changed[name], p), name
    assert not delta


@needs_it
@BITS
def test_a_published_reward_model_has_its_head_and_the_weights_held(bits, scalar, rows, tmp_path, tokenizer):
    model = qlora(scalar("qwen2"), bits, scalar=True)
    heads = [p for name, p in trainable_parameters(model).items() if "lora_" not in name]
    assert [p.dtype for p in heads] == [torch.float32] and heads[0].shape == (1, 16)
    scores, values = response_scores(model, rows).detach(), response_values(model, rows).detach()
    save_model(merge_adapter(model), tokenizer, tmp_path, card="")
    loaded = load_scalar_model(tmp_path)
    torch.testing.assert_close(response_scores(loaded, rows), scores, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(response_values(loaded, rows), values, rtol=1e-4, atol=1e-4)


@needs_it
@BITS
def test_off_the_policy_is_the_quantized_base(bits, causal, rows):
    """The reference of PPO and DPO is what a fresh adapter starts from, not the float model."""
    policy, base = qlora(causal("llama"), bits), causal("llama")
    whole = response_logprobs(base, rows)
    quantize(base, bits)
    expected = response_logprobs(base, rows)
    with adapter_off(policy) as reference:
        torch.testing.assert_close(response_logprobs(reference, rows), expected, rtol=0, atol=0)
    fresh = with_adapter(causal("llama"), AdapterSettings(method="qlora", bits=bits, r=4))
    torch.testing.assert_close(response_logprobs(fresh, rows), expected, rtol=0, atol=0)
    assert not torch.allclose(response_logprobs(policy, rows), expected, atol=1e-3)
    assert not torch.allclose(whole, expected, atol=1e-4 if bits == 8 else 1e-2)


@needs_it
@BITS
def test_a_step_changes_only_adapters_and_head(bits, scalar, rows):
    model = qlora(scalar("llama"), bits, scalar=True)
    before = {name: p.clone() for name, p in model.named_parameters()}
    response_scores(model, rows).square().sum().backward()
    torch.optim.SGD(trainable_parameters(model).values(), lr=0.1).step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(trainable_parameters(model)) and all("lora_" in n or "score" in n for n in moved)


@needs_it
@BITS
def test_sampler_and_update_agree_under_autocast(bits, causal):
    """Packed and token by token, a bfloat16 policy with an untied head gives the same numbers."""
    policy = qlora(causal("llama", tie_word_embeddings=False), bits)
    can_pack(policy, 64), head_is_linear(policy)
    cast_frozen(policy, torch.bfloat16)
    assert unwrapped(policy).lm_head.weight.dtype == torch.bfloat16
    prompts = [[5, 9, 2], [7]]
    from data.groups import make_rows

    with torch.autocast("cpu", torch.bfloat16):
        drawn = sample_with_logprobs(policy, prompts, [1, 2], Decoding(6, eos_id=1, pad_id=0))
        again = response_logprobs(policy, make_rows(prompts, drawn.responses, 0, packed=True))
    torch.testing.assert_close(again.detach(), drawn.logprobs, rtol=0, atol=0.1)


@needs_it
@BITS
def test_publication_restores_what_was_cast_and_leaves_what_is_packed(bits, causal):
    load = lambda: causal("qwen2", seed=3, tie_word_embeddings=False)  # noqa: E731
    whole, cast = qlora(load(), bits), qlora(load(), bits)
    cast_frozen(cast, torch.bfloat16)
    uncast(cast, load)
    for p, q in zip(merge_adapter(whole).parameters(), merge_adapter(cast).parameters(), strict=True):
        assert p.dtype == torch.float32 and torch.equal(p, q)


@needs_it
def test_a_model_without_linear_layers_is_refused(causal):
    with pytest.raises(UserError, match="this gpt2 model has none; use lora"):
        with_adapter(causal("gpt2"), AdapterSettings(method="qlora", bits=4))


def test_without_bitsandbytes_it_says_what_to_install(causal, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"needs the package bitsandbytes.*pip install -e '\.\[qlora\]'"):
        with_adapter(causal("llama"), AdapterSettings(method="qlora", bits=4))
