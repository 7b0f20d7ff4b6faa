"""Test `rlhf export --to gguf`: transformers reads the same logits and tokens from the file."""

import json
import os

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from data.tokenizer import train_tokenizer
from pipeline.cli import main
from pipeline.errors import UserError

gguf = pytest.importorskip("gguf", reason="an optional package")

TEXTS = ["The fox is red, and 4567 foxes are 'old'.", " a space before", "naïve über 東京 😀\n\nend"]
SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.4,
}  # fmt: skip


def save(folder, family, tokenizer, **settings):
    """Write a random model of a family, and a tokenizer; return the model."""
    size = len(tokenizer) + 3
    config = AutoConfig.for_model(family, **SHAPE | {"vocab_size": size, "bos_token_id": None} | settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):  # otherwise zeros and ones
                value.copy_(torch.rand_like(value) + 0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def read_back(path):
    """Load a GGUF file with transformers."""
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model):
    """Return the logits of a fixed row of ids."""
    ids = torch.arange(20, 20 + 24).reshape(2, 12)
    return model(ids).logits


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS * 5, 320)


ROPE = {"rope_type": "default", "rope_theta": 5e5}
FAMILIES = [
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"tie_word_embeddings": False, "head_dim": 16, "rope_parameters": ROPE}),
    ("qwen2", {"use_sliding_window": False}),
    ("qwen3", {"head_dim": 128, "use_sliding_window": False}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "settings"), FAMILIES)
def test_the_logits_are_the_models(family, settings, tokenizer, tmp_path):
    from stages.tools import gguf_file

    model = save(tmp_path / "model", family, tokenizer, **settings)
    gguf_file.write(tmp_path / "model", tmp_path / "x.gguf", "small", "f32")
    expected, found = logits(model), logits(read_back(tmp_path / "x.gguf"))
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "error"), [("f16", 1e-2), ("bf16", 8e-2), ("q8_0", 8e-2)])
def test_smaller_dtypes_are_near_and_smaller(dtype, error, tokenizer, tmp_path):
    from stages.tools import gguf_file

    model = save(tmp_path / "model", "llama", tokenizer)
    for name in ("f32", dtype):
        gguf_file.write(tmp_path / "model", tmp_path / f"{name}.gguf", "small", name)
    expected, found = logits(model), logits(read_back(tmp_path / f"{dtype}.gguf"))
    distance = (found - expected).norm() / expected.norm()
    assert 0 < distance < error
    assert (tmp_path / f"{dtype}.gguf").stat().st_size < 0.85 * (tmp_path / "f32.gguf").stat().st_size


def test_the_template_puts_the_space_that_the_tokenizer_adds(tokenizer, tmp_path):
    """With the file's template and no space of its own, the tokenizer gives the same ids."""
    from stages.tools import gguf_file

    save(tmp_path / "model", "llama", tokenizer)
    notes = gguf_file.write(tmp_path / "model", tmp_path / "x.gguf", "small", "f32")
    assert notes == [gguf_file.SPACE_NOTE]
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
    content = json.loads((tmp_path / "model/tokenizer.json").read_text())
    content["pre_tokenizer"]["add_prefix_space"] = False
    (tmp_path / "model/tokenizer.json").write_text(json.dumps(content))
    plain = AutoTokenizer.from_pretrained(tmp_path / "model")
    plain.chat_template = fields["tokenizer.chat_template"].contents()
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": ""}]
    messages += [{"role": ("assistant", "user")[index % 2], "content": text} for index, text in enumerate(TEXTS)]
    encode = {"add_generation_prompt": True, "return_dict": False}
    assert plain.apply_chat_template(messages, **encode) == tokenizer.apply_chat_template(messages, **encode)
    assert plain(TEXTS[0])["input_ids"] != tokenizer(TEXTS[0])["input_ids"]


def test_the_tokens_and_their_kinds(tokenizer, tmp_path):
    from stages.tools import gguf_file

    save(tmp_path / "model", "llama", tokenizer)
    gguf_file.write(tmp_path / "model", tmp_path / "x.gguf", "small", "f32")
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
    tokens, kinds = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    for piece, index in tokenizer.get_vocab().items():
        assert tokens[index] == piece
        assert (kinds[index] == gguf.TokenType.CONTROL) == (piece in tokenizer.all_special_tokens or "<|" in piece)
    assert kinds[-3:] == [gguf.TokenType.UNUSED] * 3
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert not fields["tokenizer.ggml.add_bos_token"].contents()


@pytest.mark.parametrize(
    ("family", "settings", "what"),
    [
        ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 1}, "GPT2LMHeadModel"),
        ("llama", {"attention_bias": True}, "biases"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8}, "a sliding window"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type linear"),
    ],
)
def test_what_is_not_written_is_refused(family, settings, what, tokenizer, tmp_path):
    from stages.tools import gguf_file

    save(tmp_path / "model", family, tokenizer, **settings)
    with pytest.raises(UserError, match=r"convert_hf_to_gguf\.py") as caught:
        gguf_file.write(tmp_path / "model", tmp_path / "x.gguf", "small", "f32")
    assert what in str(caught.value)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "splits texts in a way"),
        ({"normalizer": {"type": "Lowercase"}}, "splits texts in a way"),
        ({}, "puts a space before texts"),
    ],
)
def test_tokenizers_that_llama_cpp_would_read_otherwise_are_refused(change, what, tokenizer, tmp_path):
    from stages.tools import gguf_file

    save(tmp_path / "model", "llama", tokenizer)
    path = tmp_path / "model/tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (tmp_path / "model/chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    with pytest.raises(UserError, match=what):
        gguf_file.write(tmp_path / "model", tmp_path / "x.gguf", "small", "f32")


# -- the command ---------------------------------------------------------------------------------


@pytest.fixture
def export(finished_base, capsys):
    """Return a function that runs `rlhf export base --to gguf` and returns what it said."""

    def run(output, *words, stage="base"):
        place = ["-c", str(finished_base.config), "--artifacts", str(finished_base.artifacts)]
        code = main(["export", stage, "--to", "gguf", "-o", str(output), *place, *words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_the_command_writes_the_published_policy(export, finished_base, tmp_path):
    path = tmp_path / "base.gguf"
    code, out, errors = export(path)
    assert code == 0, errors
    assert f"{path}: " in out and "matrices in f32" in out
    model = AutoModelForCausalLM.from_pretrained(finished_base.artifacts / "small/base/model", dtype=torch.float32)
    torch.testing.assert_close(logits(read_back(path)), logits(model.eval()), rtol=1e-5, atol=1e-5)
    before = path.read_bytes()
    code, _, errors = export(path)
    assert code == 2 and "exists; replace it with --overwrite" in errors and path.read_bytes() == before
    assert export(path, "--overwrite", "--dtype", "f16")[0] == 0
    assert path.stat().st_size < len(before) and os.listdir(tmp_path) == ["base.gguf"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--ema"], "base: has published no model_ema; it has model"),
        (["base.max_steps=3"], "base: is stale because base.max_steps"),
    ],
)
def test_refusals_of_the_command(export, tmp_path, words, line):
    code, _, errors = export(tmp_path / "x.gguf", *words)
    assert code == 2 and errors.startswith(f"error: {line}")
    assert not list(tmp_path.iterdir())


def test_without_the_package_there_is_one_line(export, tmp_path, monkeypatch):
    from stages.tools import export as command

    monkeypatch.setattr(command, "find_spec", lambda name: None)
    code, _, errors = export(tmp_path / "x.gguf")
    assert code == 2 and errors.splitlines() == [f"error: {command.NEEDED}"]
