"""Test the scorer `model:`: ensembles, Hub ids, several logits, and another tokenizer."""

import contextlib

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from data.encode import encode_prompt, encode_response
from pipeline.config.sections import names_hub
from pipeline.errors import UserError
from stages.models.adapter_folder import adapter_parameters
from stages.models.adapters import AdapterSettings, with_adapter
from stages.models.ensemble import combine
from stages.models.publish import save_model
from stages.scorers.reward_model import RewardModelScorer
from stages.scorers.scorer import ScoreRequest, ScorerSpec
from stages.scorers.scorers import make_scorer
from stages.scorers.text_model import TextModelScorer
from stages.settings.scorers.model import ModelScorer
from tests.builders import tiny_config, tiny_scalar, tiny_tokenizer

ROWS = [
    ({"prompt": "what color is the fox ?"}, "red ."),
    ({"prompt": [{"role": "user", "content": "hi"}]}, "the fox is red and the sky is blue ."),
]


class OneProcess:
    """Stand in for accelerate's Accelerator."""

    device = torch.device("cpu")
    mixed_precision = "no"
    autocast = staticmethod(contextlib.nullcontext)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def request_of_two(tokenizer):
    prompts = [encode_prompt(tokenizer, row["prompt"]) for row, _ in ROWS]
    responses = [encode_response(tokenizer, text) for _, text in ROWS]
    return ScoreRequest(prompts, responses, tokenizer, data_rows=[row for row, _ in ROWS])


def save(folder, tokenizer, seed=0, labels=1):
    """Save a random reward model; with one logit it has a bias of 0.5."""
    if labels == 1:
        model = tiny_scalar("llama", seed, tokenizer, bias=0.5)
    else:
        torch.manual_seed(seed)
        config = tiny_config(vocab_size=len(tokenizer), num_labels=labels, pad_token_id=tokenizer.pad_token_id)
        model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def scorer_of(settings):
    return make_scorer(ScorerSpec(None, 0, OneProcess, batch_size=1, settings=settings, name="judge"))


def test_a_model_that_reads_texts_scores_as_one_that_reads_the_same_ids(tokenizer, request_of_two, tmp_path):
    """Two routes to one number: rendered again from the rows of data, and from the policy's ids."""
    folder = save(tmp_path / "rm", tokenizer)
    scorer = scorer_of(ModelScorer(model=str(folder)))
    assert isinstance(scorer, TextModelScorer) and not scorer.reads_rows
    model = tiny_scalar("llama", 0, tokenizer, bias=0.5)
    right = RewardModelScorer(ScorerSpec(model, tokenizer.pad_token_id, OneProcess, batch_size=2)).score(request_of_two)
    torch.testing.assert_close(scorer.score(request_of_two).total, right.total, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["prefix_tuning", "houlsby"])
def test_a_model_with_an_adapter_that_stays_in_it_scores_with_it(tokenizer, request_of_two, tmp_path, method):
    settings = AdapterSettings(method=method, num_virtual_tokens=3, bottleneck_size=4)
    model = with_adapter(tiny_scalar("llama", 0, tokenizer, bias=0.5), settings, scalar=True)
    with torch.no_grad():
        for p in adapter_parameters(model).values():
            p += 0.3
    save_model(model, tokenizer, tmp_path / "rm", card="")
    right = RewardModelScorer(ScorerSpec(model, tokenizer.pad_token_id, OneProcess, batch_size=2)).score(request_of_two)
    found = scorer_of(ModelScorer(model=str(tmp_path / "rm"))).score(request_of_two)
    torch.testing.assert_close(found.total, right.total, rtol=1e-4, atol=1e-5)


def test_several_logits_are_weighed_and_shown(tokenizer, request_of_two, tmp_path):
    folder = save(tmp_path / "heads", tokenizer, labels=3)
    scores = scorer_of(ModelScorer(model=str(folder), heads=[1.0, 0.0, -2.0])).score(request_of_two)
    parts = list(scores.parts.values())
    assert list(scores.parts) == ["LABEL_0", "LABEL_1", "LABEL_2"]
    torch.testing.assert_close(scores.total, parts[0] - 2 * parts[2])


def test_several_logits_without_weights_are_refused(tokenizer, tmp_path):
    folder = save(tmp_path / "heads", tokenizer, labels=3)
    with pytest.raises(Exception, match=r"judge: the model in .* has 3 logits .*; give heads a weight for each"):
        scorer_of(ModelScorer(model=str(folder)))


def test_special_tokens_that_a_response_spells_out_stay_plain_text(tokenizer, tmp_path):
    """The policy's tokenizer may not know them, and so cannot keep them out of its text."""
    scorer = scorer_of(ModelScorer(model=str(save(tmp_path / "rm", tokenizer))))
    spelled = f"red {tokenizer.eos_token} blue"
    plain, tricky = ([{"role": "user", "content": "hi"}, {"role": "assistant", "content": x}] for x in ("red", spelled))
    counts = [row.count(tokenizer.eos_token_id) for row in scorer.members[0].encode([plain, tricky])]
    assert counts[0] == counts[1] > 0


def test_a_prompt_that_the_template_refuses_is_a_line(tokenizer, request_of_two, tmp_path):
    folder = save(tmp_path / "rm", tokenizer)
    refuses = (
        "{% if messages[0].content == 'hi' %}{{ raise_exception('no greetings') }}{% endif %}{{ messages[0].content }}"
    )
    (folder / "chat_template.jinja").write_text(refuses)
    with pytest.raises(
        UserError, match=r'judge: the chat template of .*/rm fails on the prompt "hi" \(no greetings\); take'
    ):
        scorer_of(ModelScorer(model=str(folder))).score(request_of_two)


@pytest.mark.parametrize("labels", [1, 2])
def test_a_language_model_is_refused(tokenizer, tmp_path, labels):
    """Its head would be drawn at random, and PPO would climb that."""
    folder = tmp_path / "policy"
    config = tiny_config(vocab_size=len(tokenizer), num_labels=labels)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=r"judge: the model in .* lacks the weights .*score.*; give a trained reward"):
        scorer_of(ModelScorer(model=str(folder), heads=[1.0] * labels))


def test_a_list_of_folders_is_an_ensemble(tokenizer, request_of_two, tmp_path):
    folders = [str(save(tmp_path / str(seed), tokenizer, seed)) for seed in (1, 2, 3)]
    scores = scorer_of(ModelScorer(model=folders, how="mean_minus_std", deviations=2.0)).score(request_of_two)
    each = torch.stack([scorer_of(ModelScorer(model=folder)).score(request_of_two).total for folder in folders])
    spread = ((each - each.mean(0)) ** 2).mean(0).sqrt()
    torch.testing.assert_close(scores.total, each.mean(0) - 2 * spread)
    torch.testing.assert_close(torch.stack(list(scores.parts.values())), each)


def test_combining_by_hand():
    scores = [torch.tensor([1.0, 4.0]), torch.tensor([3.0, 0.0])]
    assert combine(scores, "mean").tolist() == [2.0, 2.0]
    assert combine(scores, "min").tolist() == [1.0, 0.0]
    assert combine(scores, "mean_minus_std", 0.5).tolist() == [1.5, 1.0]


@pytest.mark.parametrize(
    "settings, line",
    [
        ({"model": "org/name"}, "key.revision: is missing; should be the commit of org/name"),
        ({"model": "org/name", "revision": "main"}, "key.revision: is 'main'; should be the commit"),
        ({"model": "rm", "revision": "a" * 40}, "key.revision: rm is not a Hub id"),
        ({"model": ["rm", "nowhere"]}, "key.model: rm cannot stand in a list"),
        ({"model": ["nowhere"]}, "key.model: nowhere has no config.json"),
        ({"model": "rm", "heads": [1.0, 2.0]}, "key.heads: has no effect with model: rm, which has one logit"),
        ({"model": "rm", "deviations": 2.0}, "key.deviations: has no effect with how: mean; leave it out"),
    ],
)
def test_mistakes_are_lines(settings, line):
    assert any(line in problem for problem in ModelScorer(**settings).problems("key"))


def test_a_hub_model_of_a_scorer_lets_the_libraries_use_the_network():
    assert names_hub({"ppo": {"rewards": [{"model": "org/name", "revision": "a" * 40}]}})
    assert not names_hub({"ppo": {"rewards": [{"model": "rm"}, {"python": "a.py:f"}]}})
