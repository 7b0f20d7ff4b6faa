"""Test padded rows against one row at a time, unpadded, through the plain model."""

import contextlib

import pytest
import torch

from data.groups import make_rows
from stages.models import forward
from stages.models.adapters import AdapterSettings, trainable_parameters, with_adapter
from stages.models.ensemble import Ensemble
from stages.models.forward import response_logprobs, response_scores, response_values, score_all
from stages.models.loading import prepare
from stages.models.packing import can_pack

CLOSE = {"rtol": 2e-4, "atol": 2e-5}


def alone(prompt, response):
    return torch.tensor([[*prompt, *response]])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_each_row_by_itself(causal, kind, rows, ragged, temperature):
    """The reference is the log-softmax of the plain model's logits over the temperature."""
    model = causal(kind)
    found = response_logprobs(model, rows, temperature)
    for b, (prompt, response) in enumerate(zip(*ragged, strict=True)):
        logits = model(alone(prompt, response)).logits[0].double() / temperature
        right = [logits[len(prompt) + t - 1].log_softmax(-1)[token].item() for t, token in enumerate(response)]
        torch.testing.assert_close(found[b][rows.response_mask[b]], torch.tensor(right), **CLOSE)


def test_their_gradient_is_that_of_rows_by_themselves(causal, kind, rows, ragged):
    """d Σ log p / d weights through padded rows is the sum over unpadded rows, for every weight."""
    model = causal(kind)
    response_logprobs(model, rows)[rows.response_mask].sum().backward()
    padded = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    for prompt, response in zip(*ragged, strict=True):
        ids = alone(prompt, response)
        logp = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[len(prompt) - 1 :]
        logp.sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(padded[name], p.grad, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_entropy_is_of_the_same_logits_and_carries_no_gradient(causal, kind, rows, ragged):
    model = causal(kind)
    logprobs, entropies = response_logprobs(model, rows, 0.7, with_entropy=True)
    assert logprobs.requires_grad and not entropies.requires_grad
    for b, (prompt, response) in enumerate(zip(*ragged, strict=True)):
        logits = model(alone(prompt, response)).logits[0, len(prompt) - 1 : -1].double() / 0.7
        right = torch.distributions.Categorical(logits=logits).entropy().float()
        torch.testing.assert_close(entropies[b][rows.response_mask[b]], right, **CLOSE)


def test_scores_are_transformers_own_pooled_logits_minus_the_bias(scalar, kind, rows, ragged):
    """The reference is AutoModelForSequenceClassification on a single row, minus reward_bias."""
    model = scalar(kind, bias=0.75)
    found = response_scores(model, rows)
    right = [model(alone(p, r)).logits.item() - 0.75 for p, r in zip(*ragged, strict=True)]
    torch.testing.assert_close(found, torch.tensor(right), **CLOSE)


def test_scores_do_not_depend_on_the_batch(scalar, kind, rows, ragged):
    """Other rows beside it, in another order, with other padding, change no score."""
    model = scalar(kind)
    first = response_scores(model, make_rows(*([part[i] for i in (2, 0)] for part in ragged), 0))
    torch.testing.assert_close(first, response_scores(model, rows)[[2, 0]], **CLOSE)
    both = make_rows([p + p for p in ragged[0]] + ragged[0], ragged[1] * 2, 0)
    torch.testing.assert_close(response_scores(model, both)[4:], response_scores(model, rows), **CLOSE)


@pytest.mark.parametrize("how", ["mean", "min"])
def test_an_ensemble_scores_as_its_members_do_together(scalar, kind, ragged, how):
    """Each member subtracts its own bias; padded or packed; all members pack or none does."""
    members = [scalar(kind, bias=0.25 * i) for i in (1, 2, 3)]
    with torch.no_grad():
        for i, member in enumerate(members):
            member.score.weight.mul_(1 + i)
    each = torch.stack([response_scores(member, make_rows(*ragged, 0)) for member in members])
    together = Ensemble(members, how)
    right = each.mean(0) if how == "mean" else each.min(0).values
    torch.testing.assert_close(response_scores(together, make_rows(*ragged, 0)), right, **CLOSE)
    assert can_pack(together, 64) and all(can_pack(member, 64) for member in members)
    torch.testing.assert_close(response_scores(together, make_rows(*ragged, 0, packed=True)), right, **CLOSE)


class OneProcess:
    device = "cpu"
    autocast = staticmethod(contextlib.nullcontext)


def test_any_number_of_scores_in_batches_by_length(scalar, kind, rows, ragged):
    model = scalar(kind)
    found = score_all(model, *ragged, pad_id=0, batch_size=3, accelerator=OneProcess)
    torch.testing.assert_close(found, response_scores(model, rows).detach(), **CLOSE)


GROUPS = [([5, 9, 2], [[14, 1], [30, 31, 32, 33, 1], [1]]), ([7], [[22, 23], [8, 1]]), ([3, 3, 8, 40], [[11]])]


@pytest.mark.parametrize("adapted", [False, True])
def test_a_prompt_computed_once_gives_the_numbers_and_gradients_of_one_row_a_response(causal, scalar, kind, adapted):
    """Compare log-probs, values, scores and the gradient of every weight, LoRA's included, for
    groups of mixed K.
    """
    pairs = [p for p, rs in GROUPS for _ in rs], [r for _, rs in GROUPS for r in rs]
    one_by_one, shared = make_rows(*pairs, 0), make_rows(*pairs, 0, packed=True)
    assert shared.input_ids.shape == (1, sum(len(p) + sum(map(len, rs)) for p, rs in GROUPS))
    for role, build in ((response_logprobs, causal), (response_values, scalar), (response_scores, scalar)):
        model = build(kind)
        if adapted:
            model = with_adapter(model, AdapterSettings(method="lora", r=4, lora_alpha=8), scalar=build is scalar)
            with torch.no_grad():
                for p in trainable_parameters(model).values():
                    p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        assert can_pack(model, 64)
        weights = torch.rand(role(model, shared).shape, generator=torch.Generator().manual_seed(3))
        numbers, gradients = [], []
        for rows in (one_by_one, shared):
            out = role(model, rows)
            (out * weights).sum().backward()
            numbers.append(out.detach())
            gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
            model.zero_grad(set_to_none=True)
        torch.testing.assert_close(*numbers, **CLOSE)
        assert set(gradients[0]) == set(gradients[1]) and gradients[0]
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-4)


def test_models_that_can_pack_are_distinguished_from_others(causal, scalar, kind):
    """The user's choice of eager attention is respected; a short sliding window or a recurrent
    state cannot be packed.
    """
    from transformers import AutoModelForCausalLM, MambaConfig, MistralConfig

    assert can_pack(causal(kind), 64) and can_pack(scalar(kind), 64)
    eager = causal(kind)
    eager.set_attn_implementation("eager")
    assert not can_pack(eager, 64) and eager.config._attn_implementation == "eager"
    shape = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24}
    window = MistralConfig(**shape, num_attention_heads=2, num_key_value_heads=1, sliding_window=32)
    mistral = AutoModelForCausalLM.from_config(window).eval()
    assert can_pack(mistral, 32) and not can_pack(mistral, 64)
    recurrent = AutoModelForCausalLM.from_config(MambaConfig(**shape, state_size=4)).eval()
    assert not can_pack(recurrent, 64)


def test_a_model_that_packs_still_reads_padded_rows_and_generates(causal, kind, rows, ragged):
    """Without a layout its attention is transformers' own, masks included."""
    plain, packing = causal(kind), causal(kind)
    assert can_pack(packing, 64)
    torch.testing.assert_close(response_logprobs(packing, rows), response_logprobs(plain, rows), **CLOSE)
    left = torch.tensor([[0, 0, 5, 9], [3, 4, 5, 9]])
    options = {"attention_mask": (left != 0).long(), "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(packing.generate(left, **options), plain.generate(left, **options))


def test_logits_that_are_more_than_an_embedding_of_states_are_seen(rows, ragged):
    """Gemma 2 caps its logits: computed from the hidden states alone they would lack the cap."""
    from transformers import AutoModelForCausalLM, Gemma2Config

    torch.manual_seed(0)
    shape = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24, "head_dim": 8}
    config = Gemma2Config(**shape, num_attention_heads=2, num_key_value_heads=1, final_logit_softcapping=0.5,
                          initializer_range=0.5, pad_token_id=0, eos_token_id=1, bos_token_id=None)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).float().eval()
    found = response_logprobs(model, rows)
    for b, (prompt, response) in enumerate(zip(*ragged, strict=True)):
        logp = model(alone(prompt, response)).logits[0].log_softmax(-1)
        right = torch.stack([logp[len(prompt) + t - 1, token] for t, token in enumerate(response)])
        torch.testing.assert_close(found[b][rows.response_mask[b]], right, **CLOSE)


@pytest.mark.parametrize(
    "kind, options", [("gemma2", {"final_logit_softcapping": 0.5}), ("granite", {"logits_scaling": 3.0}), ("phi", {})]
)
def test_logits_of_such_a_head_are_computed_in_chunks_where_no_gradient_is_wanted(rows, kind, options, monkeypatch):
    """A cap, a scale and a bias, which are the model's own."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 2, "intermediate_size": 24, "initializer_range": 0.5, "pad_token_id": 0,
             "eos_token_id": 1}  # fmt: skip
    model = prepare(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape, **options)).float())
    ids, calls = torch.randint(2, 48, (3, 9)), []
    with torch.no_grad():
        assert not forward.head_is_linear(model) and not forward.in_chunks(model, 24)
        whole = response_logprobs(model, rows, 0.7), forward.text_logprobs(model, ids)
        monkeypatch.setitem(forward.CHUNK, "cpu", 5 * 48)
        assert forward.in_chunks(model, 6)
        model.register_forward_hook(lambda *args: calls.append(args[2].logits.shape[:-1].numel()))
        parts = response_logprobs(model, rows, 0.7), forward.text_logprobs(model, ids)
    for one, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert max(calls) == 5 and sum(calls) == int(rows.response_mask.sum()) + 24
    assert not forward.in_chunks(model, 10**6), "a gradient is that of all logits"


@pytest.mark.parametrize("pad", [0, 1, 5])
def test_what_token_stands_in_the_padding_does_not_count(causal, scalar, kind, ragged, pad):
    """Masks go by position: the pad id may be EOS, or a token that also occurs in the text."""
    rows = make_rows(*ragged, pad)
    clean = make_rows(*ragged, 0)
    mask = clean.response_mask
    torch.testing.assert_close(response_scores(scalar(kind), rows), response_scores(scalar(kind), clean), **CLOSE)
    for role, model in ((response_logprobs, causal(kind)), (response_values, scalar(kind))):
        torch.testing.assert_close(role(model, rows)[mask], role(model, clean)[mask], **CLOSE)


def test_values_are_those_before_each_token(scalar, kind, rows, ragged):
    """V_t is the head at the token before response token t, so it does not depend on t; minus the
    bias.
    """
    model = scalar(kind, bias=0.75)
    found = response_values(model, rows)
    for b, (prompt, response) in enumerate(zip(*ragged, strict=True)):
        right = [model(alone(prompt, response[:t])).logits.item() - 0.75 for t in range(len(response))]
        torch.testing.assert_close(found[b, : len(response)], torch.tensor(right), **CLOSE)


def test_the_value_before_the_last_token_is_not_the_score(scalar, rows):
    """Scores depend on the last token, values do not: they are shifted by one."""
    model = scalar("llama")
    values, scores = response_values(model, rows), response_scores(model, rows)
    last = values.gather(1, rows.response_mask.sum(-1, keepdim=True) - 1).squeeze(1)
    assert (last - scores).abs().min() > 1e-3


def test_half_precision_compute_gives_fp32_numbers(causal, scalar, rows):
    """Under bf16 autocast, log-probs, values and scores are fp32."""
    with torch.autocast("cpu", torch.bfloat16):
        assert response_logprobs(causal("llama"), rows).dtype == torch.float32
        assert response_values(scalar("llama"), rows).dtype == torch.float32
        assert response_scores(scalar("llama"), rows).dtype == torch.float32
