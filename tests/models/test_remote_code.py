"""Test models with their own code: it runs only if allowed, gives the same numbers, and is
published.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from remote_model import build, give_tokenizer_code

from data.groups import make_rows
from pipeline.cli import main
from pipeline.errors import UserError
from stages.models.forward import head_is_linear, response_logprobs, response_scores, response_values
from stages.models.loading import load_policy, load_pretrained, load_scalar_model, load_tokenizer, new_reward_model
from stages.models.packing import can_pack
from stages.models.publish import save_model
from stages.models.remote_code import scalar_problem, write_scalar_head
from stages.rollouts.trial import reading_problem

KINDS = {"spread": "sdpa", "alone": "eager"}  # and the attention that each can be loaded with
CODE = {
    "spread": ["configuration_toy", "modeling_toy", "reward_toy", "scale_toy"],
    "alone": ["configuration_toy", "modeling_toy", "scalar_head"],
}


@pytest.fixture
def kind():
    return "spread"


def published(tmp_path, tokenizer, kind):
    """Return the model as base has it and base's folder of it; the source is gone."""
    source = build(tmp_path / "source", tokenizer, kind)
    model, own = load_pretrained(str(source), attn_implementation=KINDS[kind], trust_remote_code=True)
    folder = tmp_path / "base" / "model"
    save_model(model, own, folder, card="")
    if scalar_problem(model, folder):
        write_scalar_head(model, folder)
    shutil.rmtree(source)
    return model, folder


def published_reward_model(tmp_path, folder, kind, *, bias) -> Path:
    """Return the folder of a reward model on the policy in `folder`, as rm writes it."""
    scalar = new_reward_model(folder, seed=1, attn_implementation=KINDS[kind], trust_remote_code=True)
    scalar.config.reward_bias = bias
    save_model(scalar, load_tokenizer(folder), tmp_path / "rm", card="")
    return tmp_path / "rm"


def config_of(tmp_path, source, **model) -> Path:
    """Return the model's config."""
    lines = {"name": "toy", "model": {"name_or_path": str(source), **model}, "base": {"max_length": 32}}
    (tmp_path / "toy.yaml").write_text(json.dumps(lines), encoding="utf-8")
    return tmp_path / "toy.yaml"


def run_base(tmp_path, source, *flags, **model) -> int:
    config = config_of(tmp_path, source, **model)
    return main(["run", "base", "-c", str(config), "--artifacts", str(tmp_path / "artifacts"), *flags])


@pytest.mark.parametrize("kind", KINDS)
def test_a_configuration_of_its_own_stays_as_it_writes_itself(kind, tmp_path, tokenizer):
    """transformers 4's names of positions belong to its own classes only."""
    _, folder = published(tmp_path, tokenizer, kind)
    written = json.loads((folder / "config.json").read_text())
    model = load_policy(folder, attn_implementation=KINDS[kind], trust_remote_code=True)
    model.config.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "rope_scaling" not in written and written.get("rope_parameters") == again.get("rope_parameters")


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_of_reading_gives_the_models_own_numbers(kind, tmp_path, tokenizer, ragged):
    """Compare policy and reward model, on padded and packed rows, with a forward pass row by
    row.
    """
    _, folder = published(tmp_path, tokenizer, kind)
    options = {"attn_implementation": KINDS[kind], "trust_remote_code": True}
    prompts, responses = ragged
    policy, scalar = load_policy(folder, **options), new_reward_model(folder, seed=1, **options)
    scalar.config.reward_bias = 0.25
    logprobs, values, scores = [], [], []
    with torch.no_grad():
        for prompt, response in zip(prompts, responses, strict=True):
            ids, behind = torch.tensor([prompt + response]), slice(len(prompt) - 1, -1)
            logp = policy(input_ids=ids).logits.log_softmax(-1)[0, behind]
            logprobs.append(logp.gather(-1, torch.tensor(response)[:, None])[:, 0])
            states = scalar.score(scalar.model(input_ids=ids).last_hidden_state)[0, :, 0] - 0.25
            values.append(states[behind])
            scores.append(scalar(input_ids=ids).logits.item() - 0.25)
            assert scores[-1] == pytest.approx(states[-1].item(), abs=1e-5)
    assert torch.cat(logprobs).std() > 0.3, "nothing to see in these numbers"
    packs = [can_pack(model, 64) for model in (policy, scalar)]
    assert packs == [kind == "spread"] * 2 and head_is_linear(policy)
    for packed in {False, packs[0]}:
        rows = make_rows(prompts, responses, tokenizer.pad_token_id, packed=packed)
        mask = rows.response_mask
        for found, expected in ((response_logprobs(policy, rows), logprobs), (response_values(scalar, rows), values)):
            torch.testing.assert_close(found[mask], torch.cat(expected), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(response_scores(scalar, rows), torch.tensor(scores), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_published_folders_stand_alone(kind, tmp_path, tokenizer, ragged):
    """transformers in a fresh process, without the source, gives the same numbers."""
    policy, folder = published(tmp_path, tokenizer, kind)
    reward = published_reward_model(tmp_path, folder, kind, bias=0.25)
    for place in (folder, reward):
        assert sorted(path.stem for path in place.glob("*.py")) == sorted(CODE[kind])
    assert (folder / "generation_config.json").exists()
    script = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
trust = {"trust_remote_code": True}
policy, reward, out = sys.argv[1:]
policy = AutoModelForCausalLM.from_pretrained(policy, **trust)
reward, info = AutoModelForSequenceClassification.from_pretrained(reward, output_loading_info=True, **trust)
assert not info["missing_keys"] and not info["unexpected_keys"] and reward.config.reward_bias == 0.25
ids = torch.tensor([[5, 9, 2, 14, 1], [7, 3, 1, 0, 0]])
with torch.no_grad():
    found = policy(input_ids=ids).logits, reward(input_ids=ids, attention_mask=(ids > 0).long()).logits[:, 0]
torch.save(found, out)
"""
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    argv = [sys.executable, "-c", script, str(folder), str(reward), str(tmp_path / "out")]
    done = subprocess.run(argv, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    logits, scores = torch.load(tmp_path / "out")
    with torch.no_grad():
        ids = torch.tensor([[5, 9, 2, 14, 1], [7, 3, 1, 0, 0]])
        torch.testing.assert_close(logits[0], policy(input_ids=ids).logits[0])
        ours = load_scalar_model(reward, attn_implementation=KINDS[kind], trust_remote_code=True)
        rows = make_rows([[5, 9, 2], [7, 3]], [[14, 1], [1]], 0)
        torch.testing.assert_close(scores - 0.25, response_scores(ours, rows), rtol=1e-4, atol=1e-5)


def test_a_second_load_in_a_process_is_as_the_first(tmp_path, tokenizer):
    """transformers adds `generate` to older code in the first load only; what is saved depends on
    it.
    """
    _, folder = published(tmp_path, tokenizer, "alone")
    for _ in range(2):
        assert load_policy(folder, attn_implementation="eager", trust_remote_code=True).can_generate()


class TestWithoutTheFlag:
    def test_nothing_runs_and_one_line_says_what_to_pass(self, tmp_path, tokenizer, capsys, monkeypatch):
        monkeypatch.setenv("TOY_RAN", str(tmp_path / "ran"))
        changes = {"modeling_toy": ("class ToyModel", "# as in no other test: a module is run once\nclass ToyModel")}
        source = build(tmp_path / "source", tokenizer, changes=changes)
        capsys.readouterr()
        assert run_base(tmp_path, source) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: model.name_or_path: {source} brings its own code (configuration_toy.py, ")
        assert "--trust-remote-code" in line
        assert not (tmp_path / "ran").exists()
        assert run_base(tmp_path, source, "--trust-remote-code") == 0
        assert "modeling_toy" in (tmp_path / "ran").read_text()

    @pytest.mark.parametrize("kind", KINDS)
    def test_nor_an_artifacts(self, kind, tmp_path, tokenizer):
        _, folder = published(tmp_path, tokenizer, kind)
        reward = published_reward_model(tmp_path, folder, kind, bias=0.0)
        for load in (lambda: load_policy(folder), lambda: new_reward_model(folder, seed=0),
                     lambda: load_scalar_model(reward)):  # fmt: skip
            with pytest.raises(UserError, match=r"brings its own code.*--trust-remote-code"):
                load()

    def test_nor_a_tokenizers(self, tmp_path, tokenizer, capsys, monkeypatch):
        monkeypatch.setenv("TOY_RAN", str(tmp_path / "ran"))
        tokenizer.save_pretrained(tmp_path / "source")
        give_tokenizer_code(tmp_path / "source")
        with pytest.raises(UserError, match=r"tokenization_toy.py.*--trust-remote-code"):
            load_tokenizer(tmp_path / "source")
        config = config_of(tmp_path, tmp_path / "source")
        (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
        monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
        assert main(["data", "check", str(tmp_path / "rows.jsonl"), "-c", str(config)]) == 0
        assert "cannot be loaded" in capsys.readouterr().out
        assert not (tmp_path / "ran").exists()


def test_a_tokenizer_with_code_is_published_with_it(tmp_path, tokenizer):
    source = build(tmp_path / "source", tokenizer)
    give_tokenizer_code(source)
    assert run_base(tmp_path, source, "--trust-remote-code") == 0
    shutil.rmtree(source)
    folder = tmp_path / "artifacts" / "toy" / "base" / "model"
    own = load_tokenizer(folder, trust_remote_code=True)
    assert own("THE Fox")["input_ids"] == tokenizer("the fox")["input_ids"]
    assert type(own).__name__ == "ToyTokenizer" and (folder / "tokenization_toy.py").exists()


def test_a_family_that_transformers_knows_names_no_code_that_is_not_there(tmp_path, tokenizer, causal):
    """Some repositories bring code for a model that transformers has too: without the flag it is
    dropped.
    """
    save_model(causal("llama", vocab_size=len(tokenizer)), tokenizer, tmp_path / "source", card="")
    file = tmp_path / "source" / "config.json"
    config = json.loads(file.read_text()) | {"auto_map": {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}}
    file.write_text(json.dumps(config))
    assert run_base(tmp_path, tmp_path / "source") == 0
    folder = tmp_path / "artifacts" / "toy" / "base" / "model"
    assert "auto_map" not in json.loads((folder / "config.json").read_text())
    assert load_policy(folder, trust_remote_code=True).config.model_type == "llama"


class TestWhatCannotBeUsedIsRefusedByBase:
    def refusal(self, tmp_path, tokenizer, capsys, kind, changes, **model):
        source = build(tmp_path / "source", tokenizer, kind, changes)
        capsys.readouterr()
        assert run_base(tmp_path, source, "--trust-remote-code", **model) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: model.name_or_path: ") and str(source) in line
        return line

    def test_code_that_knows_no_sdpa(self, tmp_path, tokenizer, capsys):
        assert "model.attn_implementation: eager" in self.refusal(tmp_path, tokenizer, capsys, "alone", {})

    @pytest.mark.parametrize(
        "old, new, told",
        [
            ("self.lm_head = nn.Linear", "self.lm_head = nn.Gone", "AttributeError"),
            ("import torch\n", "import torch, (\n", "SyntaxError"),
            ("import torch\n", "import torch\nimport not_here\n", "pip install not_here"),
            ("from transformers import PreTrainedModel", "from transformers import PreTrainedModel, Gone", "Gone"),
        ],
    )
    def test_code_that_fails(self, old, new, told, tmp_path, tokenizer, capsys):
        changes = {"modeling_toy": (old, new)}
        assert told in self.refusal(tmp_path, tokenizer, capsys, "alone", changes, attn_implementation="eager")

    @pytest.mark.parametrize(
        "old, new, told",
        [
            ("last_hidden_state=self.norm(x)", "last_hidden_state=self.norm(x).transpose(0, 1)", "hidden states"),
            ('base_model_prefix = "model"', 'base_model_prefix = "body"', "base_model_prefix"),
            ("if attention_mask is not None:", "if False:", "log-probs token by token"),
            ("position_ids=None, past_key_values=None, inputs_embeds=None,\n                use_cache",
             "past_key_values=None, inputs_embeds=None,\n                use_cache", "position_ids"),
        ],
    )  # fmt: skip
    def test_code_that_is_read_otherwise(self, old, new, told, tmp_path, tokenizer, capsys):
        changes = {"modeling_toy": (old, new)}
        assert told in self.refusal(tmp_path, tokenizer, capsys, "alone", changes, attn_implementation="eager")


@pytest.mark.parametrize(
    "old, new",
    [
        ("self.score = ", "self.classifier_head = "),
        ("LlamaPreTrainedModel.__init__(self, config)", "super().__init__(config)"),
    ],
)
def test_a_classifier_that_does_not_serve_is_replaced(old, new, tmp_path, tokenizer, monkeypatch):
    """One has a head of another name, as ChatGLM; one lets transformers choose its trunk, which
    would ask at the terminal.
    """
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    source = build(tmp_path / "source", tokenizer, changes={"reward_toy": (old, new)})
    assert run_base(tmp_path, source, "--trust-remote-code") == 0
    shutil.rmtree(source)
    folder = tmp_path / "artifacts" / "toy" / "base" / "model"
    model = new_reward_model(folder, seed=0, trust_remote_code=True)
    assert type(model).__module__.endswith(".scalar_head") and can_pack(model, 64)
    trunk = load_policy(folder, trust_remote_code=True).model.state_dict()
    torch.testing.assert_close(dict(model.model.state_dict()), dict(trunk), rtol=0, atol=0)


def test_reading_problem_finds_nothing_in_a_plain_model(causal):
    assert reading_problem(causal("qwen2"), 0) is None


@pytest.mark.slow
def test_code_of_another_repository_is_published_with_the_model(tmp_path, tokenizer):
    """The auto_map of a Hub id names classes of a second one; the artifact needs neither of
    them.
    """
    source, cache = build(tmp_path / "source", tokenizer), tmp_path / "hub"
    file = source / "config.json"
    config = json.loads(file.read_text())
    config["auto_map"] = {role: f"org/code--{name}" for role, name in config["auto_map"].items()}
    for repository in ("toy", "code"):
        there = cache / f"models--org--{repository}"
        (there / "refs").mkdir(parents=True)
        (there / "refs" / "main").write_text("a" * 40)
        shutil.copytree(source, there / "snapshots" / ("a" * 40))
    (cache / "models--org--toy" / "snapshots" / ("a" * 40) / "config.json").write_text(json.dumps(config))
    for code in (cache / "models--org--toy").rglob("*.py"):
        code.unlink()
    argv = ["run", "base", "-c", str(config_of(tmp_path, "org/toy")), "--artifacts", str(tmp_path / "artifacts")]
    away = {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-m", "pipeline.cli", *argv]
    done = subprocess.run(command, env=os.environ | away, capture_output=True, text=True)
    assert done.returncode == 2 and "org/toy brings its own code, which was not run" in done.stderr
    done = subprocess.run([*command, "--trust-remote-code"], env=os.environ | away, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "artifacts" / "toy" / "base" / "model"
    assert "--" not in json.dumps(json.loads((folder / "config.json").read_text())["auto_map"])
    assert sorted(path.stem for path in folder.glob("*.py")) == CODE["spread"]
    new_reward_model(folder, seed=0, trust_remote_code=True)  # here, where no cache has either
