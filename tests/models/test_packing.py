"""Test packed rows and the packed cache against plain, unpadded rows, over common families."""

import pytest
import torch

from data.groups import make_rows
from stages.models import packing
from stages.models.forward import response_logprobs
from stages.models.loading import prepare
from stages.models.packing import can_pack
from stages.rollouts.transformers import Decoding, sample_with_logprobs

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
    "initializer_range": 0.2,
}  # fmt: skip
FAMILIES = {  # family: (what its configuration wants beside, whether it packs)
    "llama": ({}, True),
    "mistral": ({"sliding_window": None}, True),
    "qwen2": ({}, True),
    "qwen3": ({"head_dim": 8}, True),
    "gemma": ({"head_dim": 8}, True),
    "gemma2": ({"head_dim": 8, "sliding_window": 128}, False),  # caps its attention scores, which sdpa cannot
    "gemma3": (None, False),  # the same window, inside its text_config
    "gemma3_text": ({"head_dim": 8, "sliding_window": 64}, False),  # a window shorter than the texts
    "phi": ({}, True),  # a head with a bias
    "phi3": ({}, True),
    "gpt_neox": ({}, True),
    "opt": ({"ffn_dim": 48, "word_embed_proj_dim": 32}, True),  # learned positions, counted from the mask
    "bloom": ({"n_layer": 2, "n_head": 4}, False),  # ALiBi
    "olmo2": ({}, True),
    "granite": ({}, True),  # scales its logits
    "cohere": ({}, True),
    "starcoder2": ({}, True),
    "mixtral": ({"num_local_experts": 4, "sliding_window": None}, True),
    "smollm3": ({}, True),
}
PROMPTS = [list(range(3, 3 + n)) for n in (5, 12, 12, 40)]
RESPONSES = [[7, 9, 1], [8] * 20, [9, 10, 11, 1], [30] * 15]


def alone(model, prompt, response):
    """Return log-probs of a response in a row of its own, unpadded, through the plain model."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0].float()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reads_and_samples_as_its_plain_self(family):
    """A model that packs uses packed rows and a packed cache, another one padded rows. Either way
    the numbers are those of the plain model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    options, packs = FAMILIES[family]
    if options is None:
        config = AutoConfig.for_model("gemma3_text", **{**SMALL, "head_dim": 8, "sliding_window": 64})
        vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        config = AutoConfig.for_model(family, text_config=config.to_dict(), vision_config=vision)
    else:
        config = AutoConfig.for_model(family, **{**SMALL, **options})
    torch.manual_seed(0)
    plain = prepare(AutoModelForCausalLM.from_config(config).float())
    model = prepare(AutoModelForCausalLM.from_config(config).float())
    model.load_state_dict(plain.state_dict())
    assert can_pack(model, 100) == packs
    found = response_logprobs(model, make_rows(PROMPTS, RESPONSES, 0, packed=packs))
    for i, pair in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        torch.testing.assert_close(found[i, : len(pair[1])], alone(plain, *pair), rtol=1e-4, atol=1e-4)
    drawn = sample_with_logprobs(model, PROMPTS, range(4), Decoding(24, eos_id=1, pad_id=0))
    for i, pair in enumerate(zip(PROMPTS, drawn.responses, strict=True)):
        torch.testing.assert_close(drawn.logprobs[i, : len(pair[1])], alone(plain, *pair), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_both_ways_of_attention_are_one(causal, kind, monkeypatch):
    """Span by span (CPU) and gathered into rows (GPU, short spans) give the same outputs and the
    same gradient of every weight, up to rounding.
    """
    prompts, responses = [PROMPTS[1]] * 3 + PROMPTS, [[5], [6, 7, 8], [9] * 11, *RESPONSES]
    rows = make_rows(prompts, responses, 0, packed=True)
    results = []
    taken = []
    for name in ("span_by_span", "in_rows"):
        attend = getattr(packing, name)
        monkeypatch.setattr(packing, name, lambda *a, n=name, f=attend: (taken.append(n), f(*a))[1])
    for short in (0, 1000):
        monkeypatch.setattr(packing, "SHORT", short)
        model = causal(kind)
        assert can_pack(model, 64)
        found = response_logprobs(model, rows)
        (found * torch.arange(found.numel()).view_as(found).cos()).sum().backward()
        results.append((found.detach(), {n: p.grad for n, p in model.named_parameters()}))
    assert set(taken[: len(taken) // 2]) == {"span_by_span"} and set(taken[len(taken) // 2 :]) == {"in_rows"}
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], rtol=1e-3, atol=1e-4)


def test_short_spans_are_gathered_into_rows(causal, monkeypatch):
    """The mean length counts: a prompt with one response is one span, with more it is a span of its
    own.
    """
    monkeypatch.setattr(packing, "SHORT", 8)

    def short(prompts, responses):
        rows = make_rows(prompts, responses, 0, packed=True)
        return packing.trunk_options(rows)["packing"].short

    assert not short([[3] * 4], [[5] * 4]) and short([[3] * 4], [[5] * 3])
    assert not short([[3] * 8] * 2, [[5] * 8] * 2) and short([[3] * 8] * 2, [[5] * 8, [5] * 7])
    long_one_among_many = [[3] * 60, *([i] for i in range(4, 24))], [[5]] * 21
    assert not short(*long_one_among_many) and short(*(part[1:] for part in long_one_among_many))


@pytest.mark.parametrize("short", [0, 1000])
def test_a_response_sees_nothing_of_its_siblings(causal, short, monkeypatch):
    """Change one response: the numbers of the others stay the same, bit for bit."""
    monkeypatch.setattr(packing, "SHORT", short)
    model = causal("llama")
    assert can_pack(model, 64)
    one, other = ([[9, 8], last, [7] * 5] for last in ([5, 6, 7], [11, 30, 2]))
    a, b = (response_logprobs(model, make_rows([PROMPTS[0]] * 3, rs, 0, packed=True)).detach() for rs in (one, other))
    assert torch.equal(a[[0, 2]], b[[0, 2]]) and not torch.equal(a[1], b[1])
