"""Test families of models: read correctly or refused; scalar heads; caches; equal tokenizers."""

import copy
import json
import pickle
from datetime import datetime

import families
import pytest
import torch
from chat_tokenizers import make
from remote_model import build as build_remote

from data.groups import make_rows
from data.template_text import at_moment
from pipeline.errors import UserError
from stages.models import families as ours
from stages.models.forward import head_is_linear, response_logprobs, response_scores
from stages.models.loading import load_policy, load_scalar_model, load_tokenizer, new_reward_model
from stages.models.loading import load_pretrained as load_as_given
from stages.models.publish import save_model
from stages.models.remote_code import scalar_problem, write_scalar_head
from stages.models.same_tokenizer import check_same_tokenizer, fit_rows
from stages.models.tokens import settle_tokens
from stages.rollouts import lanes
from stages.rollouts.transformers import Decoding, sample_with_logprobs
from stages.rollouts.trial import CACHE, reading_problem

READ = {  # family: how its rows are read, and whether rm has to write it a head
    "mixtral": ("packed", False),
    "qwen2_moe": ("packed", False),
    "qwen3_5_text": ("padded", False),
    "jamba": ("padded", False),
    "minimax": ("padded", False),
    "mamba": ("whole rows", True),
    "deepseek_v4": ("whole rows", True),
    "deepseek_v32": ("padded", True),  # packed prompts would need another cache
    "falcon_h1": ("padded", True),  # has buffers that no file holds
    "granite": ("packed", True),
    "cohere": ("packed", True),
    "olmoe": ("packed", True),
    "llama4_text": ("padded", True),
    "lfm2": ("padded", True),
    "gemma4_text": ("packed", True),
    "modernbert-decoder": ("padded", True),
    "apertus": ("packed", True),  # its activations are made in the configuration's dtype
}


def load_pretrained(name, **options):
    """Return a model and its tokenizer as base has them: loaded, tokens settled."""
    model, tokenizer = load_as_given(name, **options)
    settle_tokens(model, tokenizer, name, moment=datetime(2026, 1, 2))
    return model, tokenizer


def attention_of(family):
    return "eager" if families.EAGER[0] in families.FAMILIES[family].settings else "sdpa"


def published(tmp_path, family):
    """Return the folders of a policy and a reward model, and the trial's verdict on the policy."""
    source = families.build(family, tmp_path / "source")
    attention = attention_of(family)
    model, tokenizer = load_pretrained(str(source), attn_implementation=attention, trust_remote_code=False)
    problem = reading_problem(model, tokenizer.pad_token_id)
    if problem and problem.startswith(CACHE):
        setattr(model.config, ours.WHOLE_ROWS, True)
        problem = reading_problem(model, tokenizer.pad_token_id)
    save_model(model, tokenizer, tmp_path / "policy", card="")
    assert ours.family_problem(model) is None
    scalar = new_reward_model(tmp_path / "policy", seed=1, attn_implementation=attention)
    scalar.config.reward_bias = 0.25
    save_model(scalar, tokenizer, tmp_path / "rm", card="")
    return tmp_path / "policy", tmp_path / "rm", problem


@pytest.mark.parametrize("family", READ)
def test_a_family_computes_what_transformers_computes(family, tmp_path):
    """Compare log-probs, the sampler's log-probs and scores of the published folders."""
    policy, reward, problem = published(tmp_path, family)
    assert problem is None
    way, logprobs, sampler = families.policy_differences(policy, attention_of(family))
    assert (way, (reward / ours.HEAD_FILE).is_file()) == READ[family]
    assert max(logprobs, sampler) <= families.LIMIT
    assert families.score_difference(reward, attention_of(family)) <= families.LIMIT


@pytest.mark.slow
def test_a_family_of_each_kind_goes_through_the_whole_chain():
    """Run the command line, as `python tests/models/families.py` does for all families in half an
    hour.
    """
    rows = families.run(["gpt2", "mixtral", "qwen3_5_text", "granite", "mamba", "bert"], jobs=2)
    assert not [row for row in rows if not row.is_right()]


class TestWhatIsNoCausalLanguageModel:
    @pytest.mark.parametrize("family", ["t5", "bart"])
    def test_an_encoder_decoder_is_refused_before_its_weights_are_read(self, family, tmp_path):
        source = families.build(family, tmp_path / "source")
        (source / "model.safetensors").unlink()
        with pytest.raises(UserError, match="ForConditionalGeneration, an encoder-decoder; take a causal") as refusal:
            load_pretrained(str(source), attn_implementation="sdpa", trust_remote_code=False)
        assert len(refusal.value.lines) == 1

    @pytest.mark.parametrize("family", ["bert", "roberta"])
    def test_bidirectional_models_are_detected_by_their_numbers(self, family, tmp_path):
        source = families.build(family, tmp_path / "source")
        model, tokenizer = load_pretrained(str(source), attn_implementation="sdpa", trust_remote_code=False)
        kind = type(model).__name__
        assert reading_problem(model, tokenizer.pad_token_id) == (
            f"{kind} reads in both directions: not a causal language model"
        )

    def test_a_type_that_only_sees_pictures(self, tmp_path):
        from transformers import ViTConfig

        ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path)
        with pytest.raises(UserError, match="no causal language model of type vit"):
            load_pretrained(str(tmp_path), attn_implementation="sdpa", trust_remote_code=False)

    def test_a_reward_model_has_no_unembedding_to_begin_from(self, tmp_path, scalar, tokenizer):
        """transformers would make one up."""
        save_model(scalar("llama", vocab_size=len(tokenizer), tie_word_embeddings=False), tokenizer, tmp_path, card="")
        with pytest.raises(UserError, match=r"lacks the weights.*lm_head"):
            load_pretrained(str(tmp_path), attn_implementation="sdpa", trust_remote_code=False)
        tied = scalar("qwen2", vocab_size=len(tokenizer), tie_word_embeddings=True)
        save_model(tied, tokenizer, tmp_path, card="")
        with pytest.raises(
            UserError, match="Qwen2ForSequenceClassification, and lacks a head that predicts tokens; give"
        ):
            load_pretrained(str(tmp_path), attn_implementation="sdpa", trust_remote_code=False)


@pytest.mark.parametrize("fault, told", [
    (lambda layer: setattr(layer.self_attn, "is_causal", False), "both directions"),
    (lambda layer: setattr(layer.self_attn, "layer_idx", 0), CACHE),
])  # fmt: skip
def test_the_trial_tells_a_model_that_reads_wrong(causal, fault, told):
    """With small weights, an error makes little difference to the numbers."""
    model = causal("qwen2", initializer_range=0.02)
    assert reading_problem(model, 0) is None
    fault(model.model.layers[1])
    if told == "both directions":
        model.set_attn_implementation("eager")
        model.config.is_causal = False
    assert told in str(reading_problem(model, 0))


def test_attention_that_only_a_gpu_computes_is_tried_as_sdpa(causal, scalar, monkeypatch):
    from transformers import AttentionInterface, PreTrainedModel

    def refuse(*args, **options):
        raise RuntimeError("only on a GPU")

    def switch(model, kernel):  # transformers' own looks for a package of such a name
        model.config._attn_implementation = kernel

    AttentionInterface.register("flash_test", refuse)
    monkeypatch.setattr(PreTrainedModel, "set_attn_implementation", switch)
    policy, reward_model = causal("qwen2"), scalar("qwen2")
    for model in (policy, reward_model):
        model.set_attn_implementation("flash_test")
    assert reading_problem(policy, 0) is None and ours.head_problem(reward_model) is None
    assert head_is_linear(policy)
    assert {model.config._attn_implementation for model in (policy, reward_model)} == {"flash_test"}


@pytest.mark.parametrize("family, linear", [("recurrent_gemma", False), ("gemma3_text", True), ("granite", False)])
def test_a_head_that_caps_its_logits_is_detected(family, linear, tmp_path):
    """Small logits hide a cap; those of a trained model do not."""
    model = load_policy(families.build(family, tmp_path / "source"))
    assert head_is_linear(model) is linear
    assert head_is_linear(model) is linear and not model.base_model._forward_hooks


# ── Routers ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("given", [True, False])
def test_no_forward_asks_for_routers_and_the_flag_is_published_as_it_was_given(given, tmp_path):
    source = families.build("mixtral", tmp_path / "source")
    file = source / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"output_router_logits": given}))
    model, tokenizer = load_pretrained(str(source), attn_implementation="sdpa", trust_remote_code=False)
    assert model.config.output_router_logits is False
    for folder in ("base", "sft"):
        save_model(model, tokenizer, tmp_path / folder, card="")
        assert model.config.output_router_logits is False
        assert json.loads((tmp_path / folder / "config.json").read_text())["output_router_logits"] is given
        model = load_policy(tmp_path / folder)
    rows = make_rows([[20, 30, 40], [50]], [[60, 70], [80]], tokenizer.pad_token_id)
    assert response_logprobs(model, rows).isfinite().all()
    sample_with_logprobs(model, [[20, 30], [40]], [0, 1], Decoding(4, eos_id=-1, pad_id=0))


# ── Caches ───────────────────────────────────────────────────────────────────────────────────────


def test_rows_leave_the_cache_of_a_hybrid_model(tmp_path, monkeypatch):
    """A row's numbers are the same whether the others continue or not."""
    folder = families.build("qwen3_5_text", tmp_path / "source")
    model, prompts = load_policy(folder), families.draw_rows()[0]
    decoding = Decoding(12, eos_id=30, pad_id=0)
    kept = []
    keep = lanes.PaddedLane.keep
    monkeypatch.setattr(lanes.PaddedLane, "keep", lambda *a: (kept.append(keep(*a)), kept[-1])[1])
    monkeypatch.setattr("stages.rollouts.transformers.KEEP_ALL_ABOVE", 1.0)
    monkeypatch.setattr("stages.rollouts.transformers.pick", pick_or_end)
    left = sample_with_logprobs(model, prompts, range(4), decoding)
    assert kept and all(kept) and len(set(map(len, left.responses))) > 2
    monkeypatch.setattr(lanes, "select_rows", lambda *_: None)
    kept.clear()
    stayed = sample_with_logprobs(model, prompts, range(4), decoding)
    assert kept and not any(kept)
    assert left.responses == stayed.responses
    torch.testing.assert_close(left.logprobs, stayed.logprobs, rtol=1e-4, atol=1e-5)


def pick_or_end(weights, uniform):
    """Pick the likeliest of some tokens, or 30, the end, with a probability of a fifth."""
    return torch.where(uniform < 0.2, 30, weights[:, 40:200].argmax(-1) + 40)


class Whole(lanes.DynamicLayer):
    """A layer with a state beside its keys, which it does not select by row."""

    def update(self, keys, values, *args, **kwargs):
        self.states = {0: keys[:, 0, -1].clone()}
        return super().update(keys, values, *args, **kwargs)


class Pair(Whole):
    """A layer that cannot select rows at all."""

    reorder_cache = property(lambda self: self.missing)


def test_a_layer_that_keeps_a_tensor_whole_drops_no_row():
    keys = torch.randn(3, 2, 4, 8)
    for kind, can in ((lanes.DynamicLayer, True), (Whole, False), (Pair, False)):
        layer = kind()
        layer.update(keys, keys)
        chosen = lanes.select_rows(layer, torch.tensor([0, 2]), 3)
        assert (chosen is not None) == can
        assert layer.keys.shape[0] == 3
        if can:
            torch.testing.assert_close(chosen.keys, keys[[0, 2]])


def test_the_cache_goes_by_the_name_that_the_forward_has():
    """transformers 5.24 has `cache` for what was `past_key_values`."""

    class Old(torch.nn.Module):
        def forward(self, input_ids=None, past_key_values=None):
            return input_ids

    class New(torch.nn.Module):
        def forward(self, input_ids=None, cache=None):
            return input_ids

    assert [ours.cache_name(x) for x in (Old(), New(), torch.nn.Linear(1, 1))] == ["past_key_values", "cache", None]


# ── Scalar heads ─────────────────────────────────────────────────────────────────────────────────


def test_no_file_of_a_folder_is_run_for_a_head_of_ours(tmp_path):
    """Our loader builds the class itself, without --trust-remote-code, whatever the file contains;
    a file of somebody else is code, and is not run.
    """
    _, folder, _ = published(tmp_path, "granite")
    file, rows = folder / ours.HEAD_FILE, make_rows([[20, 30]], [[40]], 0)
    with torch.no_grad():
        expected = response_scores(load_scalar_model(folder), rows)
        text = file.read_text()
        for changed in (f"{text}\nraise SystemExit('it ran')\n", None):
            file.write_text(changed) if changed else file.unlink()
            for trust in (False, True):
                assert torch.equal(response_scores(load_scalar_model(folder, trust_remote_code=trust), rows), expected)
    file.write_text("raise SystemExit('it ran')\n")
    with pytest.raises(UserError, match=r"brings its own code.*--trust-remote-code"):
        load_scalar_model(folder)


def test_a_model_with_a_head_of_ours_can_be_described_to_another_process(tmp_path):
    """`sharding.make_on_rank_zero` pickles it; it can be copied too."""
    model = new_reward_model(families.build("granite", tmp_path / "source"), seed=0)
    rows = make_rows([[20, 30]], [[40]], 0)
    with torch.no_grad():
        for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
            assert type(other) is type(model) and other.score.weight is not model.score.weight
            assert torch.equal(response_scores(other, rows), response_scores(model, rows))


def test_a_logit_that_is_more_than_a_head_is_not_read_as_one(tmp_path):
    """ModernBERT-decoder's class has a layer before the head: a trained reward model of it is
    refused, a new one gets our head.
    """
    from transformers import AutoModelForSequenceClassification

    source = families.build("modernbert-decoder", tmp_path / "source")
    theirs = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1)
    theirs.config.reward_bias = 0.0
    save_model(theirs, load_tokenizer(source), tmp_path / "rm", card="")
    with pytest.raises(UserError, match=r"its logit is not its score as read here.*computes more"):
        load_scalar_model(tmp_path / "rm")
    assert ours.is_own_head(new_reward_model(source, seed=0))


def test_a_head_over_foreign_code_asks_for_no_cache(tmp_path, tokenizer):
    """The trunk's argument may be `cache` or `past_key_values`."""
    change = {"modeling_toy": ("class ToyModel", "# its cache has another name here\nclass ToyModel")}
    source = build_remote(tmp_path / "source", tokenizer, "alone", change)
    file = source / "modeling_toy.py"
    trunk, causal = file.read_text().split("class ToyForCausalLM")
    before = "position_ids=None, past_key_values=None, inputs_embeds"
    assert before in trunk
    trunk = trunk.replace(before, "position_ids=None, memory=None, inputs_embeds").replace(
        "before = past_key_values", "past_key_values = memory\n        before = past_key_values"
    )
    file.write_text(trunk + "class ToyForCausalLM" + causal)
    options = {"attn_implementation": "eager", "trust_remote_code": True}
    model, own = load_pretrained(str(source), **options)
    save_model(model, own, tmp_path / "model", card="")
    write_scalar_head(model, tmp_path / "model")
    assert scalar_problem(model, tmp_path / "model") is None
    scalar = new_reward_model(tmp_path / "model", seed=0, **options)
    ids = torch.tensor([[5, 9, 2, 14]])
    with torch.no_grad():
        expected = scalar.score(scalar.model(ids).last_hidden_state)[:, -1]
        torch.testing.assert_close(scalar(input_ids=ids).logits, expected)


def test_a_published_head_reads_padding_on_either_side(tmp_path):
    """As transformers' own classes: by the mask, or by the id of padding."""
    _, folder, _ = published(tmp_path, "granite")
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).eval()
    pad, row = model.config.pad_token_id, [20, 30, 40]
    left, right = torch.tensor([[pad, pad, *row], [9] * 5]), torch.tensor([[*row, pad, pad], [9] * 5])
    with torch.no_grad():
        alone = model(torch.tensor([row])).logits[0]
        torch.testing.assert_close(model(right).logits[0], alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(right, attention_mask=right != pad).logits[0], alone, rtol=1e-4, atol=1e-5)
        mask = left != pad
        places = (mask.long().cumsum(-1) - 1).clamp(min=0)
        padded = model(left, attention_mask=mask, position_ids=places).logits[0]
        torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)
        found = model(right, labels=torch.tensor([1.0, 0.0]))
        torch.testing.assert_close(found.loss, (found.logits[:, 0] - torch.tensor([1.0, 0.0])).square().mean())


# ── Tokenizers ───────────────────────────────────────────────────────────────────────────────────


class TestTokenizersThatMakeTheSameIds:
    def pair(self, tmp_path, shape):
        """Return the policy's tokenizer, as base has it, and the original one."""
        folder = families.build("llama", tmp_path / "source", shape)
        _, policys = load_pretrained(str(folder), attn_implementation="sdpa", trust_remote_code=False)
        return policys, load_tokenizer(folder)

    @pytest.mark.parametrize("shape", families.TOKENIZERS)
    def test_what_base_adds_and_changes_is_no_difference(self, shape, tmp_path):
        policys, as_it_came = self.pair(tmp_path, shape)
        check_same_tokenizer(policys, as_it_came, "rm")
        if shape == "bos":
            assert len(policys) > len(as_it_came) and policys.eos_token != as_it_came.eos_token
        if shape == "turns":
            assert policys.eos_token != as_it_came.eos_token

    def test_a_clock_that_base_has_stopped_is_no_difference(self):
        """On any later day; a template that writes the day in another way is still named."""
        policys, as_it_came = make("dated"), make("dated")
        policys.chat_template = at_moment(policys.chat_template, datetime(2026, 1, 2))
        given = as_it_came.chat_template
        check_same_tokenizer(policys, as_it_came, "rm")
        assert as_it_came.chat_template == given
        as_it_came.chat_template = given.replace("%d %b %Y", "%Y, %d %b")
        with pytest.raises(UserError, match="of a question, its chat template writes"):
            check_same_tokenizer(policys, as_it_came, "rm")

    @pytest.mark.parametrize("shape", ["bos", "metaspace"])
    def test_another_template_is_named(self, shape, tmp_path):
        policys, other = self.pair(tmp_path, shape)
        other.chat_template = other.chat_template.replace("bos_token", "eos_token", 1)
        with pytest.raises(UserError, match=r"folder/of/rm: its tokenizer is not.*chat template writes"):
            check_same_tokenizer(policys, other, "folder/of/rm")
        other.chat_template = None
        with pytest.raises(UserError, match="no chat template"):
            check_same_tokenizer(policys, other, "rm")

    @pytest.mark.parametrize(
        "change, told",
        [
            (lambda file: file["model"]["vocab"].update(swapped(file["model"]["vocab"])), "the token .* has id"),
            (lambda file: file.update(normalizer={"type": "Lowercase"}), "the text .* becomes"),
            (lambda file: file["model"]["merges"].pop(0), "the text .* becomes"),
            (lambda file: file["pre_tokenizer"].update(add_prefix_space=True), "the text .* becomes"),
            (lambda file: file["added_tokens"].append(ADDED), "the text .* becomes .*<think>"),
        ],
    )
    def test_what_makes_other_ids_is_named(self, change, told, tmp_path):
        policys, _ = self.pair(tmp_path, "bos")
        file = tmp_path / "source" / "tokenizer.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
        with pytest.raises(UserError, match=told):
            check_same_tokenizer(policys, load_tokenizer(tmp_path / "source"), "rm")

    def test_a_reward_model_gets_rows_for_what_it_may_be_shown(self, tmp_path):
        """base added padding; the scores do not change."""
        folder = families.build("llama", tmp_path / "source")
        model = new_reward_model(folder, seed=0)
        rows, have = make_rows([[20, 30]], [[40, 50]], 0), model.config.vocab_size
        with torch.no_grad():
            before = response_scores(model, rows)
            fit_rows(model, have + 2)
            torch.testing.assert_close(response_scores(model, rows), before, rtol=0, atol=0)
            assert response_scores(model, make_rows([[have, have + 1]], [[3]], 0)).isfinite().all()

    def test_one_that_has_all_rows_need_not_name_its_embedding(self, tmp_path):
        folder = families.build("trocr", tmp_path / "source")
        model = new_reward_model(folder, seed=0, attn_implementation="eager")
        with pytest.raises(NotImplementedError):
            model.get_input_embeddings()
        assert fit_rows(model, model.config.vocab_size) is model


ADDED = {"id": 999, "content": "<think>", "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": False}  # fmt: skip


def swapped(vocabulary: dict[str, int]) -> dict[str, int]:
    """Two tokens with each other's ids."""
    (a, i), (b, j) = sorted(vocabulary.items(), key=lambda item: item[1])[100:102]
    return {a: j, b: i}
