"""Test published folders: names of transformers 4, generation settings, dtypes, adapters' bases."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import UserError
from stages.models.adapters import AdapterSettings, name_of_base, save_merged, with_adapter
from stages.models.loading import load_policy, load_scalar_model, load_tokenizer
from stages.models.publish import (
    dtype_of_folder,
    end_tokens,
    given_model,
    portable_tokenizer,
    save_model,
    with_old_positions,
)
from tests.builders import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


# ── Rotary positions under both names ────────────────────────────────────────────────────────────

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PLAIN = {"rope_type": "default"}
LONG = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0], "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    "kind, rope, old",
    [
        ("llama", PLAIN | {"rope_theta": 77.0}, {"rope_theta": 77.0, "rope_scaling": None}),
        ("llama", LLAMA3 | {"rope_theta": 77.0}, {"rope_theta": 77.0, "rope_scaling": LLAMA3}),
        (
            "stablelm",
            PLAIN | {"rope_theta": 77.0, "partial_rotary_factor": 0.5},
            {"rope_theta": 77.0, "partial_rotary_factor": 0.5, "rope_scaling": None},
        ),
        (
            "gpt_neox",
            PLAIN | {"rope_theta": 77.0, "partial_rotary_factor": 0.5},
            {"rotary_emb_base": 77.0, "rotary_pct": 0.5, "rope_scaling": None},
        ),
        (
            "phi3",  # whose class takes three keys and no more
            LONG | {"rope_theta": 77.0},
            {
                "rope_theta": 77.0,
                "original_max_position_embeddings": 32,
                "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
            },
        ),
        (
            "gemma3_text",
            {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 77.0},
                "sliding_attention": PLAIN | {"rope_theta": 5.0},
            },
            {"rope_theta": 77.0, "rope_local_base_freq": 5.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        ),
        (
            "modernbert-decoder",
            {"full_attention": PLAIN | {"rope_theta": 77.0}, "sliding_attention": PLAIN | {"rope_theta": 5.0}},
            {"global_rope_theta": 77.0, "local_rope_theta": 5.0},
        ),
        # what the old names cannot say stays unsaid
        (
            "gemma3_text",
            {"full_attention": PLAIN | {"rope_theta": 77.0}, "sliding_attention": LLAMA3 | {"rope_theta": 5.0}},
            {},
        ),
        (
            "olmo3",
            {"full_attention": PLAIN | {"rope_theta": 77.0}, "sliding_attention": PLAIN | {"rope_theta": 5.0}},
            {},
        ),
        ("gemma4_text", {"full_attention": PLAIN | {"rope_theta": 77.0}, "sliding_attention": PLAIN}, {}),
    ],
)
def test_positions_have_the_names_of_both_releases(kind, rope, old):
    given = {"model_type": kind, "rope_parameters": rope}
    assert with_old_positions(given) == given | old
    outer = {"model_type": "outer", "text_config": given}
    assert with_old_positions(outer) == outer | {"text_config": given | old}


def test_positions_read_back_are_the_models_own(causal, tokenizer, tmp_path):
    """A model with both names stays the same however often it is published."""
    rope = LLAMA3 | {"rope_theta": 77.0, "original_max_position_embeddings": 16}
    model = causal("llama", rope_parameters=dict(rope), vocab_size=len(tokenizer))
    for place in ("one", "two"):
        save_model(model, tokenizer, tmp_path / place, card="")
        model = load_policy(tmp_path / place)
        assert model.config.rope_parameters == rope
    one, two = (read_json(tmp_path / place / "config.json") for place in ("one", "two"))
    assert one == two and one["rope_theta"] == 77.0 and one["rope_scaling"]["factor"] == 8.0


# ── Tokenizers ───────────────────────────────────────────────────────────────────────────────────


def test_a_tokenizer_is_named_as_transformers_4_knows_it_and_names_no_machine(causal, tokenizer, tmp_path):
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|one|>"]})
    save_model(causal("llama", vocab_size=len(tokenizer)), tokenizer, tmp_path / "one", card="")
    again = load_tokenizer(tmp_path / "one")  # which notes that it was local
    save_model(causal("llama", vocab_size=len(tokenizer)), again, tmp_path / "two", card="")
    for place in ("one", "two"):
        found = read_json(tmp_path / place / "tokenizer_config.json")
        assert found["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert found["additional_special_tokens"] == ["<|one|>"] and "extra_special_tokens" not in found
        assert not {"is_local", "local_files_only", "name_or_path"} & {*found} and str(tmp_path) not in str(found)
    assert again.extra_special_tokens == tokenizer.extra_special_tokens
    assert again("the <|one|> fox")["input_ids"] == tokenizer("the <|one|> fox")["input_ids"]


def test_a_class_of_its_own_stays():
    kept = {"tokenizer_class": "Qwen2Tokenizer", "extra_special_tokens": {"image_token": "<image>"}}
    assert portable_tokenizer(dict(kept), {"type": "Sequence"}, {}) == kept


@pytest.mark.parametrize("prefix", [True, False])
def test_a_leading_space_is_declared_where_transformers_4_looks_for_it(prefix):
    found = portable_tokenizer({}, {"type": "ByteLevel", "add_prefix_space": prefix}, {})
    assert found == {"add_prefix_space": prefix}


@pytest.mark.parametrize("bos", [True, False])
def test_a_class_that_would_add_bos_is_configured(causal, tmp_path, bos):
    """Llama's class and others of transformers 4 use this flag and not tokenizer.json."""
    from transformers import AutoTokenizer, LlamaTokenizer

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "▁a": 5}
    tokenizer = LlamaTokenizer(vocab=vocab, merges=[("▁", "a")], add_bos_token=bos)
    tokenizer.pad_token = "<unk>"
    save_model(causal("llama", vocab_size=6), tokenizer, tmp_path, card="")
    found = read_json(tmp_path / "tokenizer_config.json")
    assert found["tokenizer_class"] == "LlamaTokenizer" and found["add_bos_token"] is bos
    assert found["add_eos_token"] is False
    for again in (LlamaTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert again("a a")["input_ids"] == tokenizer("a a")["input_ids"] == [1] * bos + [5, 5]


# ── Generation ───────────────────────────────────────────────────────────────────────────────────

GIVEN = {"do_sample": True, "temperature": 0.6, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.5}


def with_generation(model, **fields):
    for name, value in fields.items():
        setattr(model.generation_config, name, value)
    return model


def test_a_policy_generates_as_it_was_trained(causal, tokenizer, tmp_path):
    """It has none of the original model's processors and all of its end tokens, after a second
    publication too.
    """
    model = with_generation(causal("llama", vocab_size=len(tokenizer)), **GIVEN, eos_token_id=[7, 8], bos_token_id=3)
    for place in ("sft", "ppo"):
        save_model(model, tokenizer, tmp_path / place, card="", temperature=0.8)
        found = read_json(tmp_path / place / "generation_config.json")
        assert found.pop("transformers_version")
        assert found == {
            "bos_token_id": 3,
            "do_sample": True,
            "eos_token_id": [tokenizer.eos_token_id, 7, 8],
            "pad_token_id": tokenizer.pad_token_id,
            "temperature": 0.8,
            "top_k": 0,
            "top_p": 1.0,
        }
        model = load_policy(tmp_path / place)


def test_generate_with_no_settings_draws_from_the_policys_own_distribution(causal, tokenizer, tmp_path):
    """Compare the share of each first token, over many samples, with softmax(logits /
    temperature).
    """
    model = with_generation(causal("llama", vocab_size=len(tokenizer), initializer_range=1.0), **GIVEN)
    save_model(model, tokenizer, tmp_path, card="", temperature=0.8)
    model, prompt = load_policy(tmp_path), torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = (model(prompt).logits[0, -1] / 0.8).softmax(-1)
    torch.manual_seed(0)
    drawn = model.generate(prompt.expand(4000, -1), max_new_tokens=1)[:, -1]
    found = torch.bincount(drawn, minlength=len(expected)) / len(drawn)
    assert (found - expected).abs().sum() < 0.5 * (1 - expected.topk(5).values.sum()) + 0.2
    assert len(drawn.unique()) > 20  # top_k 5 would leave 5


@pytest.mark.parametrize("temperature", [None, 1.0])
def test_an_invalid_generation_config_of_a_given_model_is_no_crash(causal, tokenizer, tmp_path, temperature):
    model = with_generation(causal("llama", vocab_size=len(tokenizer)), do_sample=False, temperature=0.6, top_p=0.9)
    save_model(model, tokenizer, tmp_path, card="", temperature=temperature)
    found = read_json(tmp_path / "generation_config.json")
    assert found["eos_token_id"] == tokenizer.eos_token_id and found.get("temperature") in (None, 1.0)
    assert model.generation_config.temperature == 0.6  # the model in memory is as it was


def test_base_keeps_the_sampling_that_it_was_given_with(causal, tokenizer, tmp_path):
    save_model(with_generation(causal("llama", vocab_size=len(tokenizer)), **GIVEN), tokenizer, tmp_path, card="")
    assert GIVEN.items() <= read_json(tmp_path / "generation_config.json").items()


@pytest.mark.parametrize("given, ends", [(None, 2), (2, 2), ([2], 2), (7, [2, 7]), ([7, 2, 8], [2, 7, 8])])
def test_end_tokens(given, ends):
    assert end_tokens(2, given) == ends


# ── Dtypes ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("tied", [True, False])
def test_a_published_dtype_rounds_the_files_and_not_the_model(causal, tokenizer, tmp_path, tied):
    model = causal("llama", vocab_size=len(tokenizer), tie_word_embeddings=tied)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_model(model, tokenizer, tmp_path / "whole", card="")
    save_model(model, tokenizer, tmp_path / "half", card="", dtype="bfloat16")
    whole, half = (load_file(tmp_path / place / "model.safetensors") for place in ("whole", "half"))
    assert whole.keys() == half.keys() and {x.dtype for x in half.values()} == {torch.bfloat16}
    assert all(torch.equal(half[name], whole[name].bfloat16()) for name in whole)
    assert read_json(tmp_path / "half" / "config.json")["dtype"] == "bfloat16"
    assert dtype_of_folder(tmp_path / "half") == "bfloat16" and dtype_of_folder(tmp_path / "whole") is None
    read = load_policy(tmp_path / "half")
    assert {p.dtype for p in read.parameters()} == {torch.float32}
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.dtype == torch.float32


def test_float16_is_published_unless_a_weight_is_too_large_for_it(causal, tokenizer, tmp_path):
    model = causal("llama", vocab_size=len(tokenizer))
    save_model(model, tokenizer, tmp_path / "half", card="", dtype="float16")
    assert dtype_of_folder(tmp_path / "half") == "float16"
    assert {x.dtype for x in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.float16}
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 70000.0
    with pytest.raises(UserError, match=r"model.publish_dtype: float16 ends at 65504, and .* reaches 7e"):
        save_model(model, tokenizer, tmp_path / "large", card="", dtype="float16")


def test_a_reward_model_in_half_the_bytes_scores_as_its_head_on_rounded_weights_does(scalar, tokenizer, tmp_path):
    model = scalar("llama", vocab_size=len(tokenizer))
    save_model(model, tokenizer, tmp_path, card="", dtype="bfloat16")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name != "score.weight":
                p.copy_(p.bfloat16())
        torch.testing.assert_close(load_scalar_model(tmp_path)(ids).logits, model(ids).logits, atol=1e-6, rtol=0)


def test_the_dtype_of_a_given_model(causal, tokenizer, tmp_path):
    save_model(causal("llama", vocab_size=len(tokenizer)), tokenizer, tmp_path, card="", dtype="bfloat16")
    options = {"revision": None, "trust_remote_code": False}
    assert given_model(str(tmp_path), **options).dtype == "bfloat16"
    config = read_json(tmp_path / "config.json")
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = given_model(str(tmp_path), **options)  # by its files
    assert found.dtype == "bfloat16" and found.rows == len(tokenizer)


# ── Adapters ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["policy", "reward"])
def test_an_adapter_finds_its_base_from_its_own_folder_also_when_all_is_moved(
    causal, tokenizer, tmp_path, monkeypatch, kind
):
    """peft resolves the name of the base from the working directory."""
    from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification

    from stages.models.loading import new_reward_model

    base, folder = tmp_path / "made" / "base" / "model", tmp_path / "made" / "sft" / "model"
    save_model(causal("llama", vocab_size=len(tokenizer)), tokenizer, base, card="")
    model = load_policy(base) if kind == "policy" else new_reward_model(base, seed=0)
    model.config.reward_bias = 0.0
    model = with_adapter(model, AdapterSettings(method="lora", r=4, lora_alpha=8), scalar=kind == "reward")
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1)
    name = name_of_base(base, folder / "adapter")
    assert name == "../../../base/model"
    with monkeypatch.context() as below:
        below.chdir(tmp_path)
        assert name_of_base(base, folder / "adapter") == "made/base/model"
    save_merged(model, tokenizer, folder, card="", base=(name, None))
    shutil.move(tmp_path / "made", tmp_path / "moved")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        read = load_policy if kind == "policy" else load_scalar_model
        expected = read(tmp_path / "moved" / "sft" / "model")(ids).logits
        monkeypatch.chdir(tmp_path / "moved" / "sft" / "model" / "adapter")
        auto = AutoPeftModelForCausalLM if kind == "policy" else AutoPeftModelForSequenceClassification
        found = auto.from_pretrained(".", **({} if kind == "policy" else {"num_labels": 1}))
        torch.testing.assert_close(found.eval()(ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert str(tmp_path) not in (tmp_path / "moved" / "sft" / "model" / "adapter" / "adapter_config.json").read_text()
    assert os.listdir() and "revision" in read_json(tmp_path / "moved/sft/model/adapter/adapter_config.json")
