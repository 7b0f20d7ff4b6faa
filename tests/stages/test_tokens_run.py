"""Test stages on models whose tokens, templates or positions need care."""

import json

import pytest
import torch
from chat_tokenizers import CHATML, QWEN35, make
from micro_chain import CONTEXT, SHAPE, WORDS, write_rows
from safetensors.torch import load_file
from transformers import AutoTokenizer

from data.encode import encode_prompt, encode_response
from pipeline import cli
from pipeline.errors import UserError
from stages.models.loading import load_policy
from stages.shared.runtime import bound_of_short_rows
from tests.builders import tiny_causal, tiny_config

LORA = "model.peft={method: lora, r: 2, lora_alpha: 4}"


def saved(folder, tokenizer, rows=None, **options):
    """Save a random Llama with its tokenizer, and return the folder.

    Args:
        folder: For the model.
        tokenizer: The tokenizer.
        rows: Number of embedding rows; None for one for each token.
        options: Changes of the model's configuration.
    """
    model = tiny_causal("llama", 0, tokenizer, **{"vocab_size": rows or len(tokenizer), **options})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class TestBase:
    @pytest.fixture
    def run(self, tmp_path, capsys):
        """Return run(model=settings, …), which returns exit code and output of `rlhf run base`."""

        def base(*words, **model):
            config = tmp_path / "mine.yaml"
            settings = {"name": "mine", "model": model, "launch": {"device": "cpu"}}
            config.write_text(json.dumps(settings), encoding="utf-8")
            place = ("-c", str(config), "--artifacts", str(tmp_path / "artifacts"))
            code = cli.main(["run", "base", *place, *words])
            said = capsys.readouterr()
            return code, said.out + said.err

        return base

    @property
    def published(self):
        return "artifacts/mine/base/model"

    def test_a_template_file_is_an_input_of_base(self, run, tmp_path):
        """The published tokenizer renders by it, and base is stale when it changes."""
        model = str(saved(tmp_path / "model", make("zephyr")))
        file = tmp_path / "mine.jinja"
        file.write_text(QWEN35)
        options = {"name_or_path": model, "chat_template": str(file)}
        options |= {"chat_template_kwargs": {"enable_thinking": False}}
        assert run(**options)[0] == 0 and "base: up to date" in run(**options)[1]
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / self.published)
        assert "<think>\n\n</think>" in tokenizer.decode(encode_prompt(tokenizer, "hello"))
        file.write_text(CHATML)
        code, said = run(**options)
        assert code == 0 and "the contents of model.chat_template changed" in said
        assert "think" not in json.dumps(AutoTokenizer.from_pretrained(tmp_path / self.published).chat_template[50:])
        code, said = run(**options | {"chat_template_kwargs": None})
        assert code == 0 and "model.chat_template_kwargs" in said

    @pytest.mark.parametrize(
        "model, line",
        [
            ({"name_or_path": "org/name", "chat_template": "x.j2"}, "model.chat_template: no such file: x.j2; should "),
            ({"chat_template_kwargs": {"a": 1}}, "model.chat_template_kwargs: has no effect on a model from scratch"),
            ({"name_or_path": "org/name", "chat_template_kwargs": {"messages": 1}}, "'messages' is what the "),
            (
                {"name_or_path": "org/name", "chat_template_kwargs": {"a-b": 1}},
                "'a-b' cannot be the name of a variable",
            ),
            ({"name_or_path": "org/name", "chat_template_kwargs": {"a": [{"b": None}]}}, "a is or contains null"),
            ({"name_or_path": "org/name", "chat_template_kwargs": {"a": None}}, "model.chat_template_kwargs"),
        ],
    )
    def test_invalid_settings_are_refused(self, run, model, line):
        code, said = run(**model)
        assert code == 2 and line in said and len(said.splitlines()) == 1

    def test_an_empty_file_is_no_template(self, run, tmp_path):
        model, file = str(saved(tmp_path / "model", make("zephyr"))), tmp_path / "mine.jinja"
        for content, problem in ((b" \n", "is empty"), (b"\xff\xfe", "cannot be read"), (b"{% for %}", "fails on one")):
            file.write_bytes(content)
            code, said = run(name_or_path=model, chat_template=str(file))
            (line,) = [line for line in said.splitlines() if line.startswith("error")]
            assert code == 2 and line.startswith("error: model.chat_template: ") and problem in line

    def test_no_end_token_is_refused(self, run, tmp_path):
        tokenizer = make("zephyr")
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
        saved(tmp_path / "model", tokenizer)
        file = tmp_path / "model" / "tokenizer_config.json"
        settings = json.loads(file.read_text())
        file.write_text(json.dumps({key: value for key, value in settings.items() if key != "eos_token"}))
        code, said = run(name_or_path=str(tmp_path / "model"))
        assert code == 2 and "names no end token" in said and "Traceback" not in said

    def test_new_tokens_are_recorded_and_refused_where_they_would_stay_random(self, run, tmp_path):
        tokenizer = make("chatml")
        rows = len(tokenizer)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<a>", "<b>"]})
        tokenizer.chat_template = CHATML.replace("<|im_end|>", "<b>")
        model = str(saved(tmp_path / "model", tokenizer, rows))
        code, said = run(name_or_path=model, peft={"method": "ia3"})
        assert code == 2 and "error: model.peft.method: ia3 cannot train the new rows of <a>, <b>" in said
        code, said = run(name_or_path=model, peft={"method": "lora"})
        assert code == 0 and "base: the model had no row for <a>, <b>: 2 rows added, with random weights" in said
        manifest = json.loads((tmp_path / "artifacts/mine/base/manifest.json").read_text())
        assert manifest["metrics"]["new_tokens"] == tokenizer.convert_tokens_to_ids(["<a>", "<b>"])


class TestSft:
    @pytest.mark.parametrize("small", [8192, 0])
    def test_rows_of_new_tokens_train_beside_an_adapter(self, chain, tmp_path, small, monkeypatch):
        """In embedding and head only these rows change, and the adapter gives the published logits.

        This holds for small and large vocabularies, for which trl's loss uses the head differently.
        """
        monkeypatch.setattr("stages.training.text.SMALL_VOCABULARY", small)
        new = chain.tokenizer.convert_tokens_to_ids(["<|end|>", "<|assistant|>"])
        figures = {"base": {"digest": "base", "metrics": {"new_tokens": new}}}
        settings = (LORA, "sft.max_steps=6", "sft.learning_rate=1e-2", "sft.per_device_train_batch_size=4")
        settings += ("sft.max_length=64",)
        done = chain.run("sft", tmp_path / "sft", *settings, manifests=figures)
        before, after = (load_file(f / "model.safetensors") for f in (chain.root / "base/model", done.folder / "model"))
        end, assistant = new
        rows = {
            name: set((before[name] != after[name]).any(-1).nonzero().flatten().tolist())
            for name in ("model.embed_tokens.weight", "lm_head.weight")
        }
        assert rows["model.embed_tokens.weight"] == {assistant}, "no token follows an end token"
        assert {end} <= rows["lm_head.weight"] <= {end, assistant}
        plain = chain.run("sft", tmp_path / "plain", *settings)
        without = load_file(plain.folder / "model/model.safetensors")
        assert torch.equal(without["lm_head.weight"], before["lm_head.weight"])

        from peft import PeftModel

        ids = torch.tensor([encode_prompt(chain.tokenizer, "the fox") + encode_response(chain.tokenizer, "is red")])
        with torch.no_grad():
            expected = load_policy(done.folder / "model")(ids).logits
            apart = PeftModel.from_pretrained(load_policy(chain.root / "base/model"), done.folder / "model/adapter")
            torch.testing.assert_close(apart(ids).logits, expected, rtol=1e-4, atol=1e-4)

    def test_rows_off_the_template_are_counted_once(self, chain, tmp_path):
        tokenizer = make("qwen3.5")
        saved(tmp_path / "base/model", tokenizer, max_position_embeddings=CONTEXT)
        settings = ("sft.max_steps=1", "sft.sample_tokens=0", "sft.max_length=96")
        said = chain.run("sft", tmp_path / "sft", *settings, inputs={"base": tmp_path / "base"}).said
        (line,) = [line for line in said.splitlines() if "chat template" in line]
        assert line.startswith("sft: 10 of 10 demonstrations are not what the chat template writes; the first, ")
        assert "in all of them the generation prompt opens <think>" in line and "enable_thinking" in line
        assert "template" not in chain.run("sft", tmp_path / "other", *settings).said


class TestPairs:
    def test_pairs_that_truncation_makes_equal_are_reported(self, chain, tmp_path):
        """Both rm and dpo report them and train on the remaining pairs of the rankings."""
        long = " ".join(WORDS[:3] * 20)
        ranked = {"responses": [f"{long} yes", f"{long} no", "red"], "ranks": [1, 2, 3]}
        rows = [{"id": str(i), "prompt": f"{WORDS[i]} ?", **ranked} for i in range(4)]
        for split, part in (("train", rows[:2]), ("validation", rows[2:])):
            write_rows(tmp_path / "rankings" / f"{split}.jsonl", part)
        for stage in ("rm", "dpo"):
            limits = (f"{stage}.max_length=40", f"{stage}.on_too_long=truncate", f"{stage}.max_steps=1")
            said = chain.run(stage, tmp_path / stage, *limits, inputs={"rankings": tmp_path / "rankings"}).said
            where = tmp_path / "rankings" / "train.jsonl"
            assert f"; 4 pairs left out, equal within max_length (the first: {where}:1 (0))" in said
            with pytest.raises(ValueError, match=r"no usable pair .*equal within max_length"):
                equal_pairs = [{**row, "ranks": [1, 2, None]} for row in rows[:2]]
                write_rows(tmp_path / stage / "no" / "train.jsonl", equal_pairs)
                write_rows(tmp_path / stage / "no" / "validation.jsonl", equal_pairs)
                chain.run(stage, tmp_path / stage / "none", *limits, inputs={"rankings": tmp_path / stage / "no"})
        assert "pairs left out" not in chain.run("rm", tmp_path / "whole", "rm.max_steps=1", "rm.max_length=96").said


LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 40}
BOUNDS = [
    ({"rope_parameters": LONGROPE}, 40),
    ({"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 40}, 40),
    ({"rope_scaling": {"type": "su"}, "original_max_position_embeddings": 40}, 40),
    ({"text_config": {"rope_parameters": LONGROPE}, "rope_parameters": None}, 40),
    ({"rope_parameters": {"full_attention": LONGROPE, "sliding_attention": {"rope_type": "default"}}}, 40),
    ({"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 40}}, None),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "text_config": None}, None),
    ({}, None),
]


@pytest.mark.parametrize("config, bound", BOUNDS)
def test_the_longest_row_that_does_not_change_shorter_ones(config, bound):
    assert bound_of_short_rows(config) == bound


@pytest.fixture(scope="module")
def stretched(chain, tmp_path_factory):
    """Return folders of a policy and a reward model whose positions change beyond 16 tokens."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Phi3Config

    root, llama = tmp_path_factory.mktemp("longrope"), tiny_config("llama", chain.tokenizer, **SHAPE)
    half = llama.hidden_size // llama.num_attention_heads // 2
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16}
    rope |= {"short_factor": [1.0] * half, "long_factor": [8.0] * half}
    config = Phi3Config(
        **{name: getattr(llama, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers",
           "num_attention_heads", "intermediate_size", "max_position_embeddings", "initializer_range",
           "pad_token_id", "eos_token_id", "bos_token_id")},
        original_max_position_embeddings=16, rope_parameters=rope, num_labels=1, reward_bias=0.0,
    )  # fmt: skip
    for name, auto in (("sft", AutoModelForCausalLM), ("rm", AutoModelForSequenceClassification)):
        torch.manual_seed(0)
        auto.from_config(config).save_pretrained(root / name / "model")
        chain.tokenizer.save_pretrained(root / name / "model")
    return {"sft": root / "sft", "rm": root / "rm", "base": root / "sft"}


class TestLongRope:
    @pytest.mark.parametrize("stage", ["sft", "rm", "dpo"])
    def test_training_reports_it(self, chain, stretched, stage, tmp_path):
        """The message names a length that avoids the change."""
        inputs = {name: folder for name, folder in stretched.items() if name == ("base" if stage == "sft" else "sft")}
        short = [f"{stage}.max_steps=1"]
        if stage != "rm":
            short.append(f"{stage}.sample_tokens=0")
        for length, times in ((17, 1), (16, 0)):
            settings = (f"{stage}.max_length={length}", f"{stage}.on_too_long=drop", *short)
            said = chain.run(stage, tmp_path / str(length), *settings, inputs=inputs).said
            assert said.count(f"{stage}: a row of more than 16 tokens changes the results of shorter rows ") == times
            assert said.count(f"and {stage}.max_length is 17; set {stage}.max_length: 16") == times

    def test_ppo_names_a_length_that_works(self, chain, stretched, tmp_path):
        settings = ("ppo.total_episodes=4", "ppo.batch_size=4", "ppo.mini_batch_size=4", "ppo.ptx_coef=0")
        settings += ("ppo.on_too_long=drop",)
        inputs = {"sft": stretched["sft"], "rm": stretched["rm"]}
        with pytest.raises(UserError, match=r"ppo preflight: .*; set ppo.max_length: 16; in longer rows the pos"):
            lengths = ("ppo.max_length=40", "ppo.response_length=30")
            chain.run("ppo", tmp_path / "long", *settings, *lengths, inputs=inputs)
        lengths = ("ppo.max_length=16", "ppo.response_length=8")
        assert "longrope" not in chain.run("ppo", tmp_path / "short", *settings, *lengths, inputs=inputs).said
