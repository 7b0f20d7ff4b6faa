"""Check that no model learns an end where a response was cut off at the length limit."""

import json
from types import SimpleNamespace

import pytest
import torch

from data.encode import encode_prompt
from data.groups import PromptGroup, batch_groups
from data.records import Ranking, judged_pairs, write_jsonl
from data.world.world import World
from stages import dpo, rankings
from stages.models.forward import response_logprobs, response_scores
from stages.models.packing import can_pack
from stages.objectives.logprobs import sequence_logps
from stages.settings import rankings as rankings_settings
from stages.shared.inputs import LengthLimit, load_groups
from tests.builders import build, tiny_config, tiny_tokenizer

PROMPT = "what color is the fox ?"
RANKINGS = [
    Ranking("a", PROMPT, ("the fox is red .", "the fox is", ""), (1, 2, 3), "ada", finished=(True, False, False)),
    Ranking("b", PROMPT, ("the fox is red .", "the fox is", ""), (2, 1, 3), "ben", finished=(True, True, True)),
    Ranking("c", PROMPT, ("the fox is red .", "the fox is red ."), (1, 2), finished=(True, False)),
    Ranking("d", PROMPT, ("hello", "the fox"), (1, 2)),
]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def groups(tmp_path, tokenizer):
    write_jsonl(tmp_path / "train.jsonl", RANKINGS)
    return load_groups(tmp_path / "train.jsonl", tokenizer, LengthLimit(64, "error", "rm"))[0]


def model_of(auto, tokenizer):
    return build(auto, 0, tiny_config("llama", tokenizer, num_labels=1))


def test_rm_and_dpo_get_no_eos_after_a_cut_response(groups, tokenizer):
    """In padded and packed rows; a finished response has one EOS, at its end."""
    ended = [(True, False, False), (True, True, True), (True, False), (True, True)]
    assert [g.id for g in groups] == ["a", "b", "c", "d"]  # the same texts, cut and finished, are two groups
    eos = tokenizer.eos_token_id
    for packed in (False, True):
        rows = batch_groups(groups, tokenizer.pad_token_id, packed=packed).rows
        taught = [ids[:n].tolist() for ids, n in zip(rows.responses, rows.lengths.tolist(), strict=True)]
        assert taught == [response for group in groups for response in group.responses]
        for ids, finished in zip(taught, sum(ended, ()), strict=True):
            assert ids.count(eos) == finished and (not finished or ids[-1] == eos)
        assert (rows.input_ids == eos).sum() == sum(sum(ended, ()))  # no prompt here has one
    cut = groups[2].responses[1]
    assert [*cut, eos] == groups[2].responses[0] and len(groups[2].pairs()) == 1


@pytest.mark.parametrize("packed", [False, True])
def test_a_cut_response_is_judged_by_its_own_tokens_and_scored_at_its_last(groups, tokenizer, packed):
    """Compare with plain transformers, which reads prompt and text without EOS.

    An empty response has log-probability 0, and its score is read where the prompt ends."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    policy, reward_model = (model_of(x, tokenizer) for x in (AutoModelForCausalLM, AutoModelForSequenceClassification))
    reward_model.config.reward_bias = 0.0
    assert not packed or all([can_pack(model, 64) for model in (policy, reward_model)])
    rows = batch_groups(groups[:1], tokenizer.pad_token_id, packed=packed).rows
    with torch.no_grad():
        logps = sequence_logps(response_logprobs(policy, rows), rows.response_mask)
        scores = response_scores(reward_model, rows)
    prompt = encode_prompt(tokenizer, PROMPT)
    for i, (text, finished) in enumerate(RANKINGS[0].answers):
        ids = prompt + tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * finished
        with torch.no_grad():
            expected = policy(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            hidden = reward_model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
            score = reward_model.score(hidden).item()
        logp = sum(expected[at - 1, ids[at]].item() for at in range(len(prompt), len(ids)))
        assert logps[i].item() == pytest.approx(logp, abs=1e-4) and scores[i].item() == pytest.approx(score, abs=1e-5)


def test_the_sft_loss_of_a_cut_response_ends_with_its_tokens_and_of_none_is_zero(tokenizer):
    """The loss is −Σ log π of the first-ranked responses over their tokens; 0 without any."""
    eos = tokenizer.eos_token_id
    for first, tokens in (([5, 6], 2), ([], 0)):
        group = PromptGroup([1, 2], [first, [7, 8, eos]], (1, 2))
        rows = batch_groups([group], tokenizer.pad_token_id)
        assert dpo.tokens_first(group) == tokens and rows.rows.lengths.tolist() == [tokens, 3]
        logps = torch.tensor([-3.0 * tokens, -100.0], requires_grad=True)
        loss = dpo.loss_of("sft", logps, logps.detach(), rows, 0.1, 0.0, 1, dpo.tokens_first(group))
        loss.backward()
        assert loss.item() == (3.0 if tokens else 0.0) and logps.grad.isfinite().all() and logps.grad[1] == 0


def test_rankings_of_samples_say_which_were_cut_off():
    """A labeler may prefer a finished text to the same text that was cut off."""
    world = World.build(0, documents=1, demonstrations=1, prompts=20, evaluation_prompts=1)
    prompts = [row["prompt"] for row in world.prompts()]
    texts = [["the fox is red .", "the fox is red .", "the fox is red .", "i do not know ."]] * len(prompts)
    finished = [[True, False, False, i % 2 == 0] for i in range(len(prompts))]
    responses = rankings.SampledResponses(prompts, texts, finished)
    reloaded = World.from_json(json.loads(json.dumps(world.to_json())))
    settings = rankings_settings.RankingsSettings(labelers_per_prompt=5, agreement=0.6)
    session = SimpleNamespace(seed=0, say=lambda text: None)
    rows, figures = rankings.simulate(reloaded, responses, settings, session)
    of_prompt = dict(zip(prompts, finished, strict=True))
    assert len(rows) > 2 * len(prompts) and all(list(r.finished) == of_prompt[r.prompt] for r in rows)
    for r in rows:
        verdicts = {(min(i, j), max(i, j)): verdict for i, j, verdict in judged_pairs(r)}
        assert verdicts[0, 1] == verdicts[0, 2] == "usable" and verdicts[1, 2] == "identical"
        assert r.ranks[1] == r.ranks[2]
    better = sum(r.ranks[0] < r.ranks[1] for r in rows) / len(rows)
    assert 0.5 < better < 1.0 and figures["unfinished"] == pytest.approx(0.625)
