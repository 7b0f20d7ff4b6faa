"""Test the scorers: the table, what a request holds, and the reward model's scores."""

import contextlib

import pytest
import torch

from data.encode import encode_prompt, encode_response
from data.groups import make_rows
from stages.models.ensemble import Ensemble
from stages.models.forward import response_scores
from stages.models.packing import can_pack
from stages.scorers.scorer import ScoreRequest, ScorerSpec
from stages.scorers.scorers import make_scorer
from tests.builders import tiny_scalar, tiny_tokenizer

TEXTS = [("what color is the fox ?", "red ."), ("hi", "the fox is red and the sky is blue ."), ("what ?", "")]


class OneProcess:
    """Stand in for accelerate's Accelerator."""

    device = torch.device("cpu")
    mixed_precision = "no"
    autocast = staticmethod(contextlib.nullcontext)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def request_of_three(tokenizer):
    """Return a request for the responses of TEXTS, the second of them cut off."""
    prompts = [encode_prompt(tokenizer, prompt) for prompt, _ in TEXTS]
    responses = [encode_response(tokenizer, response, finished=i != 1) for i, (_, response) in enumerate(TEXTS)]
    return ScoreRequest(prompts, responses, tokenizer)


@pytest.fixture(params=["one model", "ensemble"])
def reward_model(request, tokenizer):
    if request.param == "one model":
        return tiny_scalar("llama", 0, tokenizer, bias=0.5)
    return Ensemble([tiny_scalar("llama", seed, tokenizer, bias=seed) for seed in (1, 2)], "min")


def spec_of(reward_model, tokenizer, **changed):
    return ScorerSpec(reward_model, tokenizer.pad_token_id, OneProcess, batch_size=2, **changed)


def test_a_request_has_its_texts(request_of_three):
    assert request_of_three.response_texts() == [response for _, response in TEXTS]
    for text, (prompt, _) in zip(request_of_three.prompt_texts(), TEXTS, strict=True):
        assert prompt in text


@pytest.mark.parametrize("packed", [False, True])
def test_the_reward_model_scores_each_response_at_its_last_token(reward_model, tokenizer, request_of_three, packed):
    """With rows and without, as transformers' own head on a row of its own, minus the bias."""
    assert not packed or can_pack(reward_model, 64)
    members = list(reward_model.members) if isinstance(reward_model, Ensemble) else [reward_model]
    right = []
    for prompt, response in zip(request_of_three.prompts, request_of_three.responses, strict=True):
        ids = torch.tensor([prompt + response])
        states = [member.model(ids).last_hidden_state[0, -1] for member in members]
        scores = [
            (member.score(state) - member.config.reward_bias).item()
            for member, state in zip(members, states, strict=True)
        ]
        right.append(min(scores))
    scorer = make_scorer(spec_of(reward_model, tokenizer, packed=packed))
    rows = make_rows(request_of_three.prompts, request_of_three.responses, tokenizer.pad_token_id, packed=packed)
    with_rows = ScoreRequest(request_of_three.prompts, request_of_three.responses, tokenizer, rows)
    for request in (request_of_three, with_rows):
        scores = scorer.score(request).total
        assert scores.shape == (3,) and scores.dtype == torch.float32 and not scores.requires_grad
        torch.testing.assert_close(scores, torch.tensor(right), rtol=2e-4, atol=2e-5)


def test_rows_are_not_laid_out_again(tokenizer, request_of_three, monkeypatch):
    """A request with rows costs one forward pass over exactly these rows."""
    model = tiny_scalar("llama", 0, tokenizer)
    rows = make_rows(request_of_three.prompts, request_of_three.responses, tokenizer.pad_token_id)
    seen = []
    monkeypatch.setattr("stages.scorers.reward_model.score_all", lambda *_, **__: pytest.fail("laid out again"))
    model.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    request = ScoreRequest(request_of_three.prompts, request_of_three.responses, tokenizer, rows)
    scores = make_scorer(spec_of(model, tokenizer)).score(request).total
    assert len(seen) == 1 and seen[0] is rows.input_ids
    assert torch.equal(scores, response_scores(model, rows))
