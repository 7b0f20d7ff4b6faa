"""Run rm, ppo and evaluate with a reward model on a base of its own, of another family.

The policy is a Llama with a token for each word, the reward model a GPT-2 that reads bytes and
pieces. All scores are computed again from the texts, by transformers alone.
"""

import contextlib
import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from micro_chain import spy

from data.encode import encode_prompt
from pipeline.errors import UserError
from stages.models.loading import load_policy, load_scalar_model
from stages.ppo import run as ppo_run
from stages.scorers.reward_model import RewardModelScorer
from stages.scorers.scorer import ScoreRequest, ScorerSpec
from stages.scorers.text_reader import TextReader, text_reader_of
from stages.settings.reward_base import own_names, with_own_base
from tests.builders import tiny_causal, tiny_scalar, tiny_tokenizer

CONTEXT = 160
LENGTHS = [
    *("rm.max_length=160", "ppo.max_length=64", "ppo.response_length=6", "ppo.missing_eos_score=null"),
    *("evaluate.max_length=64", "evaluate.response_length=6", "evaluate.missing_eos_score=null"),
]
PPO = [
    *("ppo.total_episodes=16", "ppo.batch_size=8", "ppo.mini_batch_size=8", "ppo.samples_per_prompt=2"),
    *("ppo.eval_prompts=3", "ppo.ptx_coef=0"),
]


class OneProcess:
    """Stand in for accelerate's Accelerator."""

    device = torch.device("cpu")
    mixed_precision = "no"
    autocast = staticmethod(contextlib.nullcontext)


def score_of(folder, prompt, text, finished):
    """Return the score of a response by transformers alone, from its text."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    opened = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = (
        tokenizer(opened, add_special_tokens=False)["input_ids"]
        + tokenizer(text, add_special_tokens=False)["input_ids"]
    )
    ids += [tokenizer.eos_token_id] * finished
    with torch.no_grad():
        return model(torch.tensor([ids])).logits.item() - model.config.reward_bias


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Return the folder of a GPT-2 with a tokenizer of its own."""
    folder, tokenizer = tmp_path_factory.mktemp("given"), tiny_tokenizer()
    tiny_causal("gpt2", 3, tokenizer, n_positions=CONTEXT).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(chain, given, tmp_path_factory):
    """Return the folders of rm_base, rm_sft and rm."""
    root = tmp_path_factory.mktemp("made")
    settings = [f"rm.base={{name_or_path: {given}, sft: {{max_steps: 2, max_length: 128}}}}", *LENGTHS]
    base = chain.run("rm_base", root / "rm_base", *settings)
    sft = chain.run("rm_sft", root / "rm_sft", *settings, inputs={"rm_base": base.folder})
    inputs = {"rm_sft": sft.folder}
    rm = chain.run("rm", root / "rm", *settings, "rm.max_steps=2", "rm.learning_rate=1e-2", inputs=inputs)
    return SimpleNamespace(settings=settings, base=base, sft=sft, rm=rm, inputs={**inputs, "rm": rm.folder})


def test_its_base_is_fine_tuned_and_becomes_the_reward_model(made, given):
    trained, start = (load_policy(folder).state_dict() for folder in (made.sft.folder / "model", given))
    assert any(not torch.equal(trained[name], start[name]) for name in start)
    assert made.sft.figures["rows"] > 0 and made.sft.figures["steps"] == 2
    model = load_scalar_model(made.rm.folder / "model")
    assert model.config.model_type == "gpt2"
    assert [row["step"] for row in made.rm.rows("metrics.jsonl")] == [1, 2]


def test_demonstrations_score_zero_on_average_in_its_own_tokens(chain, made):
    scores = [
        score_of(made.rm.folder / "model", row["prompt"], row["completion"], True)
        for row in chain.rows("demonstrations.jsonl")
    ]
    assert sum(scores) / len(scores) == pytest.approx(0, abs=1e-4)


def test_ppo_climbs_its_score_of_the_text(chain, made, tmp_path, monkeypatch):
    """Whether a response ended by itself is told too; the value model starts as the policy."""
    calls = spy(monkeypatch, ppo_run, "sample")
    done = chain.run("ppo", tmp_path / "ppo", *made.settings, *PPO, inputs=made.inputs)
    assert "tokenizer of its own" in done.said and "policy with a new head" in done.said
    finished = []
    for call in calls:
        rollout = call.result
        for i, ids in enumerate(rollout.responses):
            text = chain.tokenizer.decode(ids, skip_special_tokens=True)
            prompt = chain.tokenizer.decode(rollout.prompts[i], skip_special_tokens=True)
            (asked,) = [row["prompt"] for row in chain.rows("prompts.jsonl") if f" {row['prompt']}" in f" {prompt}"][
                -1:
            ]
            assert encode_prompt(chain.tokenizer, asked) == list(rollout.prompts[i])
            finished.append(ids[-1] == chain.tokenizer.eos_token_id)
            expected = score_of(made.rm.folder / "model", asked, text.strip(), finished[-1])
            assert rollout.scores[i].item() == pytest.approx(expected, abs=1e-4)
    assert len(finished) == 16 and set(finished) == {True, False}
    value = json.loads((done.folder / "value_model" / "config.json").read_text())
    assert value["model_type"] == "llama"


def test_a_policy_with_the_same_tokenizer_has_the_value_model_of_the_paper(chain, tmp_path):
    """A reward model of another size that reads the policy's ids: the value model starts as it."""
    wide = {"hidden_size": 24, "num_attention_heads": 3, "max_position_embeddings": 96}
    for folder, model in (
        ("big/rm_sft/model", tiny_causal("llama", 5, chain.tokenizer, **wide)),
        ("big/rm/model", tiny_scalar("llama", 6, chain.tokenizer, 0.2, **wide)),
    ):
        model.save_pretrained(tmp_path / folder)
        chain.tokenizer.save_pretrained(tmp_path / folder)
    inputs = {name: tmp_path / "big" / name for name in ("rm_sft", "rm")}
    base = f"rm.base={tmp_path / 'big/rm_sft/model'}"
    done = chain.run("ppo", tmp_path / "ppo", base, *LENGTHS[1:], "rm.max_length=64", *PPO, inputs=inputs)
    assert "tokenizer of its own" not in done.said
    value = json.loads((done.folder / "value_model" / "config.json").read_text())
    assert value["hidden_size"] == 24


LORA = "model.peft={method: lora, r: 2}"


def test_an_adapter_on_its_base_is_published_beside_the_sum(chain, made, tmp_path):
    """And ppo, whose value model has an adapter on the policy, scores by that reward model."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    trunk = {"rm_sft": made.sft.folder}
    rm = chain.run("rm", tmp_path / "rm", *made.settings, LORA, "rm.max_steps=2", "rm.learning_rate=1e-1", inputs=trunk)
    folder, ids = rm.folder / "model", torch.tensor([[5, 6, 7, 8]])
    base = AutoModelForSequenceClassification.from_pretrained(made.sft.folder / "model", num_labels=1).eval()
    base.config.pad_token_id = 0
    apart, whole = PeftModel.from_pretrained(base, folder / "adapter"), load_scalar_model(folder)
    with torch.no_grad():
        torch.testing.assert_close(apart(ids).logits, whole(ids).logits, atol=1e-5, rtol=1e-4)
    named = json.loads((folder / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named.endswith(f"{made.sft.folder.name}/model")
    done = chain.run("ppo", tmp_path / "ppo", *made.settings, LORA, *PPO, inputs={**trunk, "rm": rm.folder})
    assert "tokenizer of its own" in done.said
    value = json.loads((done.folder / "value_model" / "config.json").read_text())
    assert value["model_type"] == "llama" and (done.folder / "value_model" / "adapter").is_dir()


def test_the_value_model_goes_on_with_an_adapter_on_that_base(chain, tmp_path):
    """Where the policy reads the same ids: its start has the reward model's scores."""
    wide = {"hidden_size": 24, "num_attention_heads": 3, "max_position_embeddings": 96}
    tiny_causal("llama", 5, chain.tokenizer, **wide).save_pretrained(tmp_path / "rm_sft/model")
    chain.tokenizer.save_pretrained(tmp_path / "rm_sft/model")
    settings = (f"rm.base={tmp_path / 'rm_sft/model'}", *LENGTHS[1:], "rm.max_length=64", LORA)
    inputs = {"rm_sft": tmp_path / "rm_sft"}
    train = ("rm.max_steps=2", "rm.learning_rate=1e-1")
    inputs["rm"] = chain.run("rm", tmp_path / "rm", *settings, *train, inputs=inputs).folder
    frozen = ("ppo.learning_rate=1e-12", "ppo.value_learning_rate=1e-12")
    done = chain.run("ppo", tmp_path / "ppo", *settings, *PPO, *frozen, inputs=inputs)
    value, rm = (load_scalar_model(folder) for folder in (done.folder / "value_model", inputs["rm"] / "model"))
    assert (done.folder / "value_model" / "adapter").is_dir() and value.config.hidden_size == 24
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(value(ids).logits, rm(ids).logits, atol=1e-5, rtol=1e-4)


def test_it_starts_from_a_reward_model_that_is_there(chain, made, tmp_path):
    """With rm.start_from: head and all, from the last round's; another tokenizer is refused."""
    train = ("rm.max_steps=1", "rm.learning_rate=1e-12")
    inputs = {"rm_sft": made.sft.folder}
    start = f"rm.start_from={made.rm.folder / 'model'}"
    again = chain.run("rm", tmp_path / "rm", *made.settings, *train, start, inputs=inputs)
    before, after = (load_scalar_model(folder / "model") for folder in (made.rm.folder, again.folder))
    for (name, p), q in zip(before.named_parameters(), after.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name)
    assert after.config.reward_bias == pytest.approx(before.config.reward_bias, abs=1e-5)
    other = f"rm.start_from={chain.root / 'rm/model'}"
    with pytest.raises(UserError, match=r"rm.start_from"):
        chain.run("rm", tmp_path / "other", *made.settings, *train, other, inputs=inputs)
    with pytest.raises(UserError, match=r"rm.start_from: an adapter"):
        chain.experiment(*made.settings, start, LORA)


def test_an_adapter_on_random_rows_is_refused(chain, made, tmp_path):
    settings = (made.settings[0].replace("sft: {max_steps: 2, max_length: 128}", "sft: false"), *LENGTHS, LORA)
    manifests = {"rm_base": {"digest": "rm_base", "metrics": {"new_tokens": [7]}}}
    run = partial(chain.run, "rm", inputs={"rm_base": made.base.folder}, manifests=manifests)
    with pytest.raises(UserError, match=r"rm.base.sft: false leaves the new rows of"):
        run(tmp_path / "rm", *settings)
    assert run(tmp_path / "full", *settings, "rm.peft=full", "rm.max_steps=1").figures["loss"] > 0


def test_evaluate_judges_by_the_text(chain, made, tmp_path):
    settings = [
        "evaluate.policies=[sft,best_of_n]",
        "evaluate.best_of=2",
        "evaluate.greedy_prompts=2",
        "evaluate.perplexity_length=32",
    ]
    done = chain.run("evaluate", tmp_path / "e", *made.settings, *settings, inputs=made.inputs)
    rows = done.rows("responses.jsonl")
    assert {row["policy"] for row in rows} == {"sft", "best_of_n"}
    for row in rows:
        expected = score_of(made.rm.folder / "model", row["prompt"], row["response"], row["finished"])
        assert row["raw_score"] == pytest.approx(expected, abs=1e-4)


class TestTexts:
    """A row that is too long for the reward model in its own tokens."""

    def reader(self, on_too_long, context=20):
        return TextReader(tiny_tokenizer(), context, on_too_long)

    def test_an_error_says_what_to_set(self):
        with pytest.raises(UserError, match=r"rows:3: \d+ tokens .* reads 20; set rm.on_too_long: truncate"):
            self.reader("error").encode([[{"role": "user", "content": "hi"}]], [("the fox " * 20, True)], ["rows:3"])

    @pytest.mark.parametrize("on_too_long", ["truncate", "drop"])
    def test_a_response_loses_its_end_and_its_eos(self, on_too_long):
        reader = self.reader(on_too_long)
        asked = [{"role": "user", "content": "hi"}]
        (prompt, same), (short, long) = reader.encode([asked, asked], [("red", True), ("the fox " * 20, True)])
        assert prompt == same == encode_prompt(reader.tokenizer, "hi")
        assert short[-1] == reader.tokenizer.eos_token_id
        assert len(prompt) + len(long) == 20 and reader.tokenizer.eos_token_id not in long

    def test_a_prompt_that_leaves_no_room_is_refused(self):
        with pytest.raises(UserError, match="reads 5"):
            self.reader("truncate", 5).encode([[{"role": "user", "content": "hello there"}]], [("red", True)])


def test_equal_tokenizers_need_no_reader(chain, made):
    trust = {"trust_remote_code": False}
    assert text_reader_of(chain.root / "rm/model", chain.tokenizer, "error", **trust) is None
    reader = text_reader_of(made.rm.folder / "model", chain.tokenizer, "error", **trust)
    assert reader is not None and reader.context == CONTEXT


def test_a_scorer_of_texts_looks_for_signals(chain, made):
    """Between forward passes, as a reward model of any size may need long."""
    reader = text_reader_of(made.rm.folder / "model", chain.tokenizer, "error", trust_remote_code=False)
    model, polled = load_scalar_model(made.rm.folder / "model"), []
    scorer = RewardModelScorer(ScorerSpec(model, 0, OneProcess, batch_size=1, text_reader=reader))
    ids = [chain.tokenizer("the fox")["input_ids"]] * 20
    rows = [{"prompt": "hello"}] * 20
    request = ScoreRequest(ids, ids, chain.tokenizer, data_rows=rows, poll=lambda: polled.append(1))
    assert len(scorer.score(request).total) == 20 and len(polled) == 3 and not scorer.reads_rows


@pytest.mark.parametrize(
    "settings, line",
    [
        (["rm.base={sft: true}"], "rm.base: names no model and no size"),
        (["rm.base={hidden_size: 15}"], "rm.base.num_attention_heads: 4 heads do not share a width of 15"),
        (["rm.base={name_or_path: FOLDER, vocab_size: 90}"], "rm.base.vocab_size: has no effect beside"),
        (["rm.base=nowhere/at/all"], "rm.base.name_or_path: no such folder: nowhere/at/all"),
        (["rm.base={name_or_path: FOLDER, chat_template: nowhere}"], "rm.base.chat_template: no such file"),
        (["rm.base={name_or_path: FOLDER, revision: main}"], "rm.base.revision: .* is not a Hub id"),
        (["rm.base={hidden_size: 32, chat_template_kwargs: {a: 1}}"], "rm.base.chat_template_kwargs: has no effect"),
        (["rm.base={hidden_size: 32, max_position_embeddings: 90}"], "rm.max_length: 512 tokens is more .* of 90"),
    ],
)
def test_mistakes_are_lines(settings, line, chain, given):
    with pytest.raises(UserError, match=line):
        chain.experiment(*[text.replace("FOLDER", str(given)) for text in settings])


def test_its_settings_are_seen_in_the_policys_sections(chain, given):
    experiment = chain.experiment(f"rm.base={{name_or_path: {given}, sft: {{max_steps: 3}}}}", "sft.learning_rate=0.5")
    seen = with_own_base(experiment)
    assert (seen.model.name_or_path, seen.sft.max_steps, seen.sft.learning_rate) == (str(given), 3, 0.5)
    assert experiment.sft.max_steps is None
    tokens = ["model.control_tokens=[<|bad|>,<|good|>]", "sft.conditional={scorer: [{rule: words, target: 4}]}"]
    seen = with_own_base(chain.experiment(f"rm.base={given}", *tokens))
    assert (seen.model.control_tokens, seen.sft.conditional) == (None, None)
    assert with_own_base(chain.experiment()).model.name_or_path == chain.experiment().model.name_or_path
    assert own_names("sft.max_length: too long; raise it") == "rm.base.sft.max_length: too long; raise it"
    assert own_names("data/sft.jsonl:3: model.peft.method") == "data/sft.jsonl:3: model.peft.method"


def test_which_stages_run(chain, given):
    stages = chain.stages
    for own, needs in (("null", []), (f"{given}", ["rm_sft"]), (f"{{name_or_path: {given}, sft: false}}", ["rm_base"])):
        experiment = chain.experiment(f"rm.base={own}")
        assert [name for name in stages["rm"].needs(experiment) if name.startswith("rm_")] == needs
        assert stages["rm_base"].used(experiment) == bool(needs)
    assert "rm.base: is null" in stages["rm_base"].missing_requirements(chain.experiment())[0]
