"""Test how base settles a tokenizer: template, ends of turns and documents, padding, rows."""

import copy
import json
from datetime import datetime, timedelta

import families
import pytest
import torch
from chat_tokenizers import CHATML, KINDS, QWEN3, QWEN35, ZEPHYR, make
from transformers import AutoTokenizer

from data.agreement import probe
from data.documents import document_end
from data.encode import encode_prompt
from data.tokenizer import train_tokenizer
from pipeline.errors import UserError
from stages.models.loading import load_pretrained
from stages.models.publish import save_model
from stages.models.tokens import settle_tokens
from tests.builders import tiny_causal

NOW = datetime(2026, 11, 29, 4, 5)
ASKED = [{"role": "user", "content": "hello"}]


def model_for(tokenizer, rows=None, **options):
    """Return a random Llama with a row for each token, or with `rows` rows."""
    return tiny_causal("llama", 0, tokenizer, **{"vocab_size": rows or len(tokenizer), "pad_token_id": None, **options})


def settled(tokenizer, model=None, **options):
    return settle_tokens(model or model_for(tokenizer), tokenizer, "mine", moment=NOW, **options)


def reloaded(tokenizer, folder):
    """Return the tokenizer as a later stage, or a user of the published folder, loads it."""
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


ENDS = {  # of turns, and of documents
    "chatml": ("<|im_end|>", "<|endoftext|>"),
    "llama2": ("</s>", "</s>"),
    "mistral": ("</s>", "</s>"),
    "llama3": ("<|eot_id|>", "<|end_of_text|>"),
    "dated": ("<|eot_id|>", "<|end_of_text|>"),
    "gemma": ("<end_of_turn>", "<eos>"),
    "phi": ("<|end|>", "<|endoftext|>"),
    "zephyr": ("</s>", "</s>"),
    "qwen3": ("<|im_end|>", "<|endoftext|>"),
    "qwen3.5": ("<|im_end|>", "<|endoftext|>"),
    "r1": ("</s>", "</s>"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_turns_and_documents_end_as_the_model_ends_them(kind, tmp_path):
    """Changes are reported, and hold for the published tokenizer; padding is not an end."""
    tokenizer = make(kind)
    given = tokenizer.eos_token
    lines = settled(tokenizer).lines
    turn, document = ENDS[kind]
    own = reloaded(tokenizer, tmp_path)
    assert own.eos_token == turn and own.pad_token not in (None, turn)
    assert own.convert_ids_to_tokens(document_end(own)) == document
    said = "\n".join(lines)
    assert (f"its chat template ends turns with {turn}, not with its tokenizer's {given}" in said) == (given != turn)
    assert (f"documents end with {document}, as in pretraining; turns with {turn}" in said) == (document != turn)


def test_an_end_of_documents_of_an_unusual_name_is_recorded(tmp_path):
    """It is found in the original EOS if the template ends turns otherwise, or in the model's
    configurations.
    """
    for from_config in (False, True):
        tokenizer = make("chatml")
        tokenizer.add_special_tokens({"additional_special_tokens": ["<stop>"]})
        tokenizer.chat_template = CHATML
        model = model_for(tokenizer)
        if from_config:
            model.config.eos_token_id = [tokenizer.convert_tokens_to_ids("<|im_end|>")]
            model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<stop>"])
            unnamed = tokenizer.backend_tokenizer.to_str().replace("<|endoftext|>", "<|other|>")
            backend = type(tokenizer.backend_tokenizer).from_str(unnamed)
            tokenizer = type(tokenizer)(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|other|>")
            tokenizer.chat_template = CHATML
        else:
            tokenizer.eos_token = "<stop>"
        settled(tokenizer, model)
        own = reloaded(tokenizer, tmp_path / str(from_config))
        assert own.eos_token == "<|im_end|>" and own.convert_ids_to_tokens(document_end(own)) == "<stop>"


def test_a_token_without_a_row_ended_no_document(tmp_path):
    """transformers adds <|endoftext|> to a Qwen2's tokenizer, whatever its model was trained on."""
    tokenizer = train_tokenizer(["a quick test of a short text"], 300)
    rows, eos = len(tokenizer), tokenizer.eos_token
    tokenizer.add_special_tokens({"pad_token": "<|endoftext|>"})
    settled(tokenizer, model_for(tokenizer, rows=rows))
    own = reloaded(tokenizer, tmp_path)
    assert own.convert_ids_to_tokens(document_end(own)) == own.eos_token == eos


def test_a_tokenizer_without_an_end_is_refused():
    tokenizer = make("llama2")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    model = model_for(tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"model.name_or_path: the tokenizer of 'mine' names no end token, and its "):
        settled(tokenizer, model)
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "</s>")
    (line, *_) = settled(tokenizer, model).lines
    assert line.startswith("its chat template ends turns with </s>, and its tokenizer names no end token")


@pytest.mark.parametrize("kind, lines", [("chatml", 1), ("mistral", 1), ("phi", 2)])
def test_rows_that_follow_the_template_are_not_reported(kind, lines):
    """The only line is about ends or padding."""
    assert not any("rows" in line for line in settled(make(kind)).lines) and len(settled(make(kind)).lines) == lines


def test_rows_off_the_template_are_reported_with_both_texts_and_a_remedy():
    (line,) = [line for line in settled(make("qwen3.5")).lines if "rows" in line]
    assert line.startswith("rows are not what its chat template writes (one turn, several turns, ")
    assert (
        r"the row has '…tart|>assistant\n<think>\nA fox.<|im_end|>', the template has '…tart|>assistant\n<thi" in line
    )
    assert "its generation prompt opens <think>, and an answer that does not close it is taught as a thought" in line
    assert "; set model.chat_template_kwargs: {enable_thinking: false}, which fixes that, or " in line
    (line,) = [line for line in settled(make("zephyr")).lines if "rows" in line]
    assert r"\n<|assistant|>A fox.</s>', the template has '" in line and r"\n<|assistant|>\nA fox.</s>\n';" in line
    assert line.endswith("; give a template that fits the rows as model.chat_template: FILE")
    (line,) = [line for line in settled(make("llama3")).lines if "rows" in line]
    assert line.startswith("rows with blanks around the answer are not what its chat template writes: the row has ")


def test_variables_are_published_with_the_template(tmp_path):
    """Who renders messages later need not set them."""
    tokenizer, given = make("qwen3.5"), make("qwen3.5")
    lines = settled(tokenizer, variables={"enable_thinking": False}).lines
    assert "its chat template is published with enable_thinking set" in lines
    own = reloaded(tokenizer, tmp_path)
    options = {"add_generation_prompt": True, "tokenize": False}
    expected = given.apply_chat_template(ASKED, enable_thinking=False, **options)
    assert own.apply_chat_template(ASKED, **options) == expected != given.apply_chat_template(ASKED, **options)
    assert list(probe(own)) == ["a thought in the answer"]


def test_a_template_of_the_users_takes_the_place_of_the_models(tmp_path):
    """Also if the model has none; with its variables, and with errors that name it."""
    for kind in ("zephyr", "chatml"):
        tokenizer = make(kind)
        model = model_for(tokenizer)
        tokenizer.chat_template = None if kind == "chatml" else ZEPHYR
        settled(tokenizer, model, template=QWEN35, variables={"enable_thinking": False})
        own = reloaded(tokenizer, tmp_path / kind)
        text = own.apply_chat_template(ASKED, add_generation_prompt=True, tokenize=False)
        assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    with pytest.raises(UserError, match=r"^model.chat_template: its chat template fails on one question and answer"):
        settled(make("chatml"), template="{% for %}")
    with pytest.raises(UserError, match=r"^model.chat_template: its chat template fails on one question and answer"):
        settled(make("chatml"), template="{{ raise_exception('never') }}")


def test_a_template_that_leaves_messages_out_is_refused():
    """Templates that want messages in parts do so."""
    parts = CHATML.replace("m['content']", "m['content'][0]['text']")
    with pytest.raises(
        UserError, match=r"model.name_or_path: its chat template fails on .* \(it leaves out the question, "
    ):
        tokenizer = make("chatml")
        tokenizer.chat_template = parts
        settled(tokenizer)
    mute = CHATML.replace("{{ m['content'] }}", "{{ m['content'] if m['role'] == 'user' }}")
    with pytest.raises(
        UserError, match=r"model.chat_template: its chat template fails .* \(it leaves out the answer, "
    ):
        settled(make("chatml"), template=mute)


def test_a_model_without_a_template_is_refused_with_what_to_do():
    tokenizer = make("chatml")
    model = model_for(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(
        UserError, match=r"'mine' has no chat template; .* give a template as model.chat_template: FILE"
    ):
        settled(tokenizer, model)
    tokenizer.chat_template = {"tool_use": CHATML, "rag": CHATML}
    with pytest.raises(UserError, match="has several chat templates and none named default"):
        settled(tokenizer, model)
    reads = CHATML + "{{ a }}"
    tokenizer.chat_template = {"tool_use": "{{ 1 }}", "default": reads}
    settled(tokenizer, model, variables={"a": 1})
    assert tokenizer.chat_template == "{%- set a = 1 %}\n" + reads


def test_a_variable_that_the_template_does_not_read_is_reported():
    """A misspelled one would be published and change nothing."""
    tokenizer = make("qwen3")
    lines = settled(tokenizer, variables={"enable_thinkin": False}).lines
    said = "its chat template reads no enable_thinkin (it asks for enable_thinking), which model.chat_template_kwargs "
    assert lines[0] == said + "sets: no effect" and tokenizer.chat_template == QWEN3
    assert not any("published with" in line for line in lines)
    lines = settled(make("qwen3"), variables={"a": 1, "enable_thinking": False}).lines
    assert lines[0].startswith("its chat template reads no a (it") and "with enable_thinking set" in lines[1]
    (line, *_) = settled(make("chatml"), variables={"a": 1, "b": 1}).lines
    assert line.startswith("its chat template reads no a or b, which ")


class TestClock:
    @pytest.fixture
    def day(self, monkeypatch):
        """Return day(n), which moves transformers' clock n days ahead."""
        from transformers.utils import chat_template_utils

        def on(days):
            class Clock(datetime):
                @classmethod
                def now(cls, tz=None):
                    return NOW + timedelta(days=days)

            monkeypatch.setattr(chat_template_utils, "datetime", Clock)

        return on

    def test_the_day_of_base_stays(self, tmp_path, day):
        """Text of a later day is that of the first day; the line names that day."""
        tokenizer, given = make("dated"), make("dated")
        lines = settled(tokenizer).lines
        assert settled(make("dated")).stopped == NOW and settled(make("llama3")).stopped is None
        stays = "in this experiment that stays 29 Nov 2026, 04:05"
        assert lines[0] == f"its chat template writes today's date or time; {stays}"
        own = reloaded(tokenizer, tmp_path)
        day(0)
        first = given.apply_chat_template(ASKED, tokenize=False)
        assert own.apply_chat_template(ASKED, tokenize=False) == first and "29 Nov 2026" in first
        day(1)
        assert given.apply_chat_template(ASKED, tokenize=False) != first
        assert own.apply_chat_template(ASKED, tokenize=False) == first
        assert own.decode(encode_prompt(own, "hello")).startswith(first.rpartition("<|eot_id|>")[0])

    def test_one_that_does_not_write_it_is_left_alone(self):
        """A day that the user set, or a name in a comment, is not today's date."""
        tokenizer = make("dated")
        lines = settled(tokenizer, variables={"date_string": "26 Jul 2024"}).lines
        assert "macro" not in tokenizer.chat_template and not any("today" in line for line in lines)
        tokenizer = make("chatml")
        tokenizer.chat_template = "{# strftime_now #}" + CHATML
        settled(tokenizer)
        assert tokenizer.chat_template == "{# strftime_now #}" + CHATML

    @pytest.mark.parametrize("kind", KINDS)
    def test_templates_without_a_clock_are_published_as_they_came(self, kind):
        tokenizer = make(kind)
        settled(tokenizer)
        assert (tokenizer.chat_template == KINDS[kind][0]) == (kind != "dated")

    def test_one_that_greets_by_the_hour_is_stopped_too(self):
        """It reads the clock in a condition, and only before a system message."""
        tokenizer = make("chatml")
        hour = "{% if messages[0].role == 'system' and strftime_now('%H')|int < 12 %}morning{% endif %}"
        tokenizer.chat_template = hour + CHATML
        settled(tokenizer)
        system = [{"role": "system", "content": "b"}, *ASKED]
        assert tokenizer.apply_chat_template(system, tokenize=False).startswith("morning")


class TestRows:
    def test_new_tokens_get_rows_and_are_named(self):
        """Some chat variants are published so. Padding is among them; its row is not trained."""
        tokenizer = make("chatml")
        before = len(tokenizer)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<a>", "<b>"], "pad_token": "<none>"})
        tokenizer.chat_template = CHATML.replace("<|im_end|>", "<b>")
        model = model_for(tokenizer, rows=before, eos_token_id=2)
        kept = model.get_input_embeddings().weight.detach().clone()
        found = settled(tokenizer, model)
        (line,) = [line for line in found.lines if "no row" in line]
        named = line.removeprefix("the model had no row for ").removesuffix(": 3 rows added, with random weights")
        assert set(named.split(", ")) == {"<a>", "<b>", "<none>"}
        assert found.new_tokens == sorted(tokenizer.convert_tokens_to_ids(["<a>", "<b>"]))
        assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) == model.lm_head.weight.shape[0]
        assert torch.equal(model.get_input_embeddings().weight[:before], kept) and not model.training

    def test_an_added_pad_token_is_reported_and_not_trained(self):
        tokenizer = make("mistral")
        (line,) = settled(tokenizer).lines
        assert line == "its tokenizer has no pad token apart from its end token; <unk> serves as one"
        tokenizer = make("llama3")
        found = settled(tokenizer)
        assert any(line.endswith("; <|pad|> is added") for line in found.lines) and found.new_tokens == []
        assert any(line.startswith("the model had no row for <|pad|>: 1 row added") for line in found.lines)

    def test_a_model_that_can_be_given_no_rows_is_refused(self, tmp_path):
        """DeepSeek V4 also has a table of experts by token, which is not resized."""
        folder = families.build("deepseek_v4", tmp_path, "bos")
        model, tokenizer = load_pretrained(str(folder), attn_implementation="eager", trust_remote_code=False)
        what = (
            "the model has no row for <.pad.>, and a DeepseekV4ForCausalLM cannot be given one .*tid2eid also has a row"
        )
        with pytest.raises(UserError, match=f"^model.name_or_path: {what}"):
            settled(tokenizer, model)
        model, tokenizer = load_pretrained(str(folder), attn_implementation="eager", trust_remote_code=False)
        tokenizer.pad_token = "<|end_of_text|>"
        assert settled(tokenizer, model).new_tokens == []

    def test_a_model_with_rows_to_spare_keeps_them(self):
        tokenizer = make("chatml")
        model = model_for(tokenizer, rows=len(tokenizer) + 9)
        assert settled(tokenizer, model).new_tokens == [] and model.config.vocab_size == len(tokenizer) + 9


INVALID = [
    {"temperature": 0.6, "top_p": 0.9},
    {"max_new_tokens": -3},
    {"early_stopping": "maybe"},
    {"num_return_sequences": 4},
    {"watermarking_config": {"x": 1}},
    {"cache_implementation": "foo"},
    [1],
    "{",
]


@pytest.mark.parametrize("settings", INVALID, ids=str)
def test_an_invalid_generation_configuration_is_no_hindrance(settings, tmp_path):
    """Its ids stay, and the model can be saved."""
    tokenizer = make("chatml")
    save_model(model_for(tokenizer), copy.deepcopy(tokenizer), tmp_path / "given", card="")
    file = tmp_path / "given" / "generation_config.json"
    before = json.loads(file.read_text())
    text = json.dumps(before | settings) if isinstance(settings, dict) else json.dumps(settings)
    file.write_text(settings if isinstance(settings, str) else text)
    model, _ = load_pretrained(str(tmp_path / "given"), attn_implementation="sdpa", trust_remote_code=False)
    model.generation_config.validate(strict=True)
    if isinstance(settings, dict):
        assert model.generation_config.eos_token_id == before["eos_token_id"]
    model.save_pretrained(tmp_path / "published")


def test_a_model_that_cannot_be_loaded_is_still_reported(tmp_path):
    tokenizer = make("chatml")
    save_model(model_for(tokenizer), tokenizer, tmp_path, card="")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"^model.name_or_path: cannot load"):
        load_pretrained(str(tmp_path), attn_implementation="sdpa", trust_remote_code=False)
