"""Run base and sft with control tokens: rows, levels, rounds, and what is published."""

import json

import numpy as np
import pytest

from data.encode import encode_prompt, encode_response
from pipeline.errors import UserError
from stages.models.control_tokens import control_ids_of
from stages.models.loading import load_tokenizer
from stages.settings.sft import learns_samples
from stages.shared.conditional import levels_of
from tests.stages.micro_chain import spy

TOKENS = "model.control_tokens=[<|bad|>, <|good|>]"
BY_WORDS = "sft.conditional.scorer=[{rule: words, at_most: 2, tolerance: 8}]"
SFT = (TOKENS, BY_WORDS, "sft.max_length=64", "sft.sample_tokens=0", "sft.per_device_train_batch_size=2")
SHORT = ("sft.max_steps=2", "sft.gradient_accumulation_steps=1")
SAMPLES = (
    "sft.conditional.samples_per_prompt=3",
    "sft.conditional.prompts_per_round=6",
    "sft.conditional.response_length=8",
)


@pytest.fixture(scope="module")
def based(chain, tmp_path_factory):
    """Return the folder that base publishes with control tokens, and its figures."""
    return chain.run("base", tmp_path_factory.mktemp("with_tokens") / "base", TOKENS, BY_WORDS)


def run(chain, based, folder, *settings):
    """Run sft after base."""
    inputs, manifests = {"base": based.folder}, {"base": {"digest": "base", "metrics": based.figures}}
    return chain.run("sft", folder, *SFT, *SHORT, *settings, inputs=inputs, manifests=manifests)


def score_of(text):
    words = text.replace("?", " ").replace(".", " ").split()
    return 1 - min(8, max(0, len(words) - 2)) / 8


def test_demonstrations_are_learnt_after_the_token_of_their_score(chain, based, tmp_path, monkeypatch):
    """Only the answer and its EOS have labels; the token is read, and not learnt."""
    import stages.sft

    calls = spy(monkeypatch, stages.sft, "train_language_model")
    done = run(chain, based, tmp_path / "sft", "sft.conditional.thresholds=[0.8]")
    task, tokenizer = calls[0].args[4], load_tokenizer(based.folder / "model")
    control = control_ids_of(based.folder / "model")
    rows = [*task.train_rows, *task.held_out_rows]
    expected = []
    for row in chain.rows("demonstrations.jsonl"):
        prompt, answer = encode_prompt(tokenizer, row["prompt"]), encode_response(tokenizer, row["completion"])
        level = control[score_of(row["completion"]) >= 0.8]
        ids = [*prompt[:-1], level, *answer]
        expected.append({"input_ids": ids, "labels": [-100] * len(prompt) + answer})
    assert sorted(rows, key=str) == sorted(expected, key=str) and task.held_out_rows
    assert {row["input_ids"][row["labels"].count(-100) - 1] for row in rows} == {*control}
    assert done.figures["level_0"] + done.figures["level_1"] == len(rows) and done.figures["samples"] == 0
    published = tmp_path / "sft" / "model"
    assert control_ids_of(published) == control and not (tmp_path / "sft" / "ppo_init").exists()
    assert encode_prompt(load_tokenizer(published), "hello ?")[-1] == control[1]
    assert json.loads((published / "generation_config.json").read_text())["suppress_tokens"] == control


def test_samples_are_relabelled_in_rounds(chain, based, tmp_path, monkeypatch):
    """The first round has no control token before its samples; later rounds ask for the best."""
    import stages.sft
    from stages.rollouts.transformers import TransformersEngine

    asked = []
    sample = TransformersEngine.sample

    def watched(engine, request, poll):
        asked.append(request)
        return sample(engine, request, poll)

    monkeypatch.setattr(TransformersEngine, "sample", watched)
    calls = spy(monkeypatch, stages.sft, "train_language_model")
    done = run(chain, based, tmp_path / "sft", *SAMPLES, "sft.conditional.rounds=2")
    control = control_ids_of(based.folder / "model")
    tokenizer = load_tokenizer(based.folder / "model")
    known = {tuple(encode_prompt(tokenizer, row["prompt"])) for row in chain.rows("prompts.jsonl")}
    assert len(asked) == len(calls) == 2 and done.figures["samples"] == 36
    assert {(*prompt, control[1]) for prompt in map(tuple, asked[0].prompts)} <= known
    assert {*map(tuple, asked[1].prompts)} <= known
    first, second = ({tuple(p) for p in request.prompts} for request in asked)
    assert len(first) == len(second) == 6 and not {(*p, control[1]) for p in first} & second
    assert not {*asked[0].seeds} & {*asked[1].seeds} and len({*asked[0].seeds}) == 18
    for call in calls:
        task = call.args[4]
        rows = [*task.train_rows, *task.held_out_rows]
        scores = [score_of(tokenizer.decode([i for i in row["labels"] if i >= 0][:-1]).strip())
                  for row in rows if row["labels"][-1] == tokenizer.eos_token_id]  # fmt: skip
        levels = [row["input_ids"][row["labels"].count(-100) - 1] for row in rows]
        ended = [level for row, level in zip(rows, levels, strict=True) if row["labels"][-1] == tokenizer.eos_token_id]
        good = [score for score, level in zip(scores, ended, strict=True) if level == control[1]]
        bad = [score for score, level in zip(scores, ended, strict=True) if level == control[0]]
        assert not bad or min(good) >= max(bad)
        assert len(rows) == 18
    assert [row["step"] for row in done.rows("metrics.jsonl")] == [1, 2, 3, 4]
    assert done.figures["score_2"] == done.figures["score"] and "score_1" in done.figures


def test_samples_that_were_cut_off_get_the_score_that_is_set(chain, based, tmp_path, monkeypatch):
    import stages.sft

    calls = spy(monkeypatch, stages.sft, "train_language_model")
    done = run(chain, based, tmp_path / "sft", *SAMPLES, "sft.conditional.missing_eos_score=-9",
               "sft.conditional.thresholds=[-5]")  # fmt: skip
    tokenizer, control = load_tokenizer(based.folder / "model"), control_ids_of(based.folder / "model")
    task = calls[0].args[4]
    for row in [*task.train_rows, *task.held_out_rows]:
        ended = row["labels"][-1] == tokenizer.eos_token_id
        assert row["input_ids"][row["labels"].count(-100) - 1] == control[ended]
    assert 0 < done.figures["finished"] < 1


def test_an_adapter_trains_the_rows_of_the_tokens(chain, based, tmp_path):
    from safetensors.torch import load_file

    lora = ("model.peft={method: lora, r: 2}", "sft.learning_rate=1e-2")
    run(chain, based, tmp_path / "sft", *lora, *SAMPLES, "sft.conditional.rounds=2")
    control = control_ids_of(based.folder / "model")
    assert based.figures["new_tokens"] == control
    before, after = (
        load_file(folder / "model" / "model.safetensors")["model.embed_tokens.weight"]
        for folder in (based.folder, tmp_path / "sft")
    )
    changed = (before != after).any(-1).nonzero().flatten().tolist()
    assert changed and {*changed} <= {*control}


def test_levels_are_equally_many_or_by_thresholds():
    scores = np.random.default_rng(0).normal(size=120).tolist()
    levels, thresholds = levels_of(scores, 3, None)
    assert [levels.count(level) for level in range(3)] == [40, 40, 40] and len(thresholds) == 2
    for score, level in zip(scores, levels, strict=True):
        assert level == sum(score >= one for one in thresholds)
    assert levels_of([0.0, 1.0, 2.0], 2, [1.0]) == ([0, 1, 1], [1.0])
    assert levels_of([5.0, 5.0], 2, None)[0] == [1, 1]


def test_a_method_that_cannot_train_their_rows_is_refused_after_base_too(chain, based, tmp_path):
    """`base` is not made again where only the adapter of sft changes."""
    with pytest.raises(UserError, match=r"houlsby cannot train the new rows of <.bad.>, <.good.>"):
        run(chain, based, tmp_path / "sft", "sft.peft={method: houlsby}")


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ((TOKENS,), "model.control_tokens: nothing teaches what they mean"),
        ((BY_WORDS,), "sft.conditional: labels answers with control tokens; name them"),
        ((TOKENS, "sft.conditional.scorer=[{model: rm}]"), "is trained from sft, so it cannot score for it"),
        (("model.control_tokens=[<|good|>]", BY_WORDS), "should be two or more different names"),
        (("model.control_tokens=[a, a]", BY_WORDS), "should be two or more different names"),
        ((TOKENS, BY_WORDS, "sft.conditional.thresholds=[1, 2]"), "should be 1 that ascend"),
        ((TOKENS, BY_WORDS, "sft.conditional.rounds=2"), "sft.conditional.rounds: has no effect on demonstrations"),
        ((TOKENS, BY_WORDS, "sft.ppo_init={}"), "sft.ppo_init: has no conditional training"),
        ((*SFT, *SAMPLES, "sft.conditional.response_length=64"), "leaves no room for a prompt within sft.max_length"),
        ((*SFT, *SAMPLES, "launch.strategy=fsdp2"), "does not sample under launch.strategy fsdp2"),
        ((*SFT, *SAMPLES, "sft.conditional.rounds=2", "model.peft={method: adalora}"), "adalora prunes to its rank"),
        ((TOKENS, "sft.conditional.scorer=[]"), "is an empty list"),
        ((TOKENS, BY_WORDS, "model.name_or_path=null", "sft.peft={method: houlsby}"),
         "sft.peft.method: houlsby cannot train the new rows of model.control_tokens"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(chain, settings, error):
    with pytest.raises(UserError) as refused:
        chain.experiment(*settings)
    assert any(error in line for line in refused.value.lines)


def test_what_is_read_and_what_decides(chain, tmp_path):
    """The policy's own samples need prompts and no demonstrations; a reward model is an input."""
    plain, labelled = chain.experiment(), chain.experiment(*SFT)
    scorer = f"sft.conditional.scorer=[{{model: {chain.root / 'other_rm' / 'model'}}}]"
    sampled = chain.experiment(*SFT[:1], scorer, *SFT[2:], *SAMPLES)
    stage = chain.stages["sft"]
    assert [stage.reads(one) for one in (plain, labelled, sampled)] == [["demonstrations"]] * 2 + [["prompts"]]
    assert [learns_samples(one) for one in (plain, labelled, sampled)] == [False, False, True]
    assert stage.folders(plain) == {}
    assert stage.folders(sampled) == {"sft.conditional.scorer[0].model": chain.root / "other_rm" / "model"}


def test_a_reward_model_scores(chain, based, tmp_path):
    scorer = f"sft.conditional.scorer=[{{model: {chain.root / 'other_rm' / 'model'}}}]"
    done = run(chain, based, tmp_path / "sft", scorer, *SAMPLES)
    assert done.figures["level_0"] == done.figures["level_1"] == 9
