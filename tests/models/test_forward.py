"""Padded rows against one row at a time, unpadded, through the plain model."""

import pytest
import torch

from data.groups import make_rows
from stages.models.forward import response_logprobs, response_scores, response_values

CLOSE = {"rtol": 2e-4, "atol": 2e-5}


def alone(prompt, response):
    return torch.tensor([[*prompt, *response]])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_each_row_alone(causal, kind, rows, ragged, temperature):
    """Log-softmax of the plain model's logits over temperature, no padding, no position ids, no mask."""
    model = causal(kind)
    found = response_logprobs(model, rows, temperature)
    for b, (prompt, response) in enumerate(zip(*ragged, strict=True)):
        logits = model(alone(prompt, response)).logits[0].double() / temperature
        right = [
            logits[len(prompt) + t - 1].log_softmax(-1)[token].item() for t, token in enumerate(response)
        ]
        torch.testing.assert_close(found[b][rows.response_mask[b]], torch.tensor(right), **CLOSE)


def test_their_gradient_is_that_of_the_rows_alone(causal, kind, rows, ragged):
    """d Σ log p / d weights through padded rows equals the sum over unpadded rows, for every weight."""
    model = causal(kind)
    response_logprobs(model, rows)[rows.response_mask].sum().backward()
    padded = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    for prompt, response in zip(*ragged, strict=True):
        ids = alone(prompt, response)
        logp = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[len(prompt) - 1 :]
        logp.sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            padded[name], p.grad, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_entropy_is_of_the_same_logits_and_carries_no_gradient(causal, kind, rows, ragged):
    model = causal(kind)
    logprobs, entropies = response_logprobs(model, rows, 0.7, with_entropy=True)
    assert logprobs.requires_grad and not entropies.requires_grad
    for b, (prompt, response) in enumerate(zip(*ragged, strict=True)):
        logits = model(alone(prompt, response)).logits[0, len(prompt) - 1 : -1].double() / 0.7
        right = torch.distributions.Categorical(logits=logits).entropy().float()
        torch.testing.assert_close(entropies[b][rows.response_mask[b]], right, **CLOSE)


def test_scores_are_transformers_own_pooled_logits_minus_the_bias(scalar, kind, rows, ragged):
    """What a person gets from AutoModelForSequenceClassification for the row alone, less reward_bias."""
    model = scalar(kind, bias=0.75)
    found = response_scores(model, rows)
    right = [model(alone(p, r)).logits.item() - 0.75 for p, r in zip(*ragged, strict=True)]
    torch.testing.assert_close(found, torch.tensor(right), **CLOSE)


@pytest.mark.parametrize("widths", [(6, 5), (9, 5), (6, 11), (12, 12)])
def test_scores_do_not_depend_on_padding(scalar, kind, rows, ragged, widths):
    """More padding on either side, or other rows in the batch, changes no score."""
    model = scalar(kind)
    wider = make_rows(*ragged, 0, *widths)
    torch.testing.assert_close(response_scores(model, wider), response_scores(model, rows), **CLOSE)
    first = response_scores(model, rows.select(torch.tensor([2, 0])))
    torch.testing.assert_close(first, response_scores(model, rows)[[2, 0]], **CLOSE)


@pytest.mark.parametrize("pad", [0, 1, 5])
def test_what_token_stands_in_the_padding_does_not_count(causal, scalar, kind, ragged, pad):
    """Masks go by position: the pad id may be EOS, or a token that also occurs in the text."""
    rows = make_rows(*ragged, pad)
    clean = make_rows(*ragged, 0)
    mask = clean.response_mask
    torch.testing.assert_close(
        response_scores(scalar(kind), rows), response_scores(scalar(kind), clean), **CLOSE
    )
    for role, model in ((response_logprobs, causal(kind)), (response_values, scalar(kind))):
        torch.testing.assert_close(role(model, rows)[mask], role(model, clean)[mask], **CLOSE)


def test_values_are_those_before_each_token(scalar, kind, rows, ragged):
    """V_t is the head at the token before response token t, so token t cannot be seen in it; bias
    subtracted."""
    model = scalar(kind, bias=0.75)
    found = response_values(model, rows)
    for b, (prompt, response) in enumerate(zip(*ragged, strict=True)):
        right = [model(alone(prompt, response[:t])).logits.item() - 0.75 for t in range(len(response))]
        torch.testing.assert_close(found[b, : len(response)], torch.tensor(right), **CLOSE)


def test_the_value_before_the_last_token_is_not_the_score(scalar, rows):
    """Scores see the last token, values do not: shifted by one."""
    model = scalar("llama")
    values, scores = response_values(model, rows), response_scores(model, rows)
    last = values.gather(1, rows.response_mask.sum(-1, keepdim=True) - 1).squeeze(1)
    assert (last - scores).abs().min() > 1e-3


def test_half_precision_compute_gives_fp32_numbers(causal, scalar, rows):
    """Under bf16 autocast the log-probs, values and scores come out in fp32."""
    with torch.autocast("cpu", torch.bfloat16):
        assert response_logprobs(causal("llama"), rows).dtype == torch.float32
        assert response_values(scalar("llama"), rows).dtype == torch.float32
        assert response_scores(scalar("llama"), rows).dtype == torch.float32
