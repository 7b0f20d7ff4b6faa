"""Check that a model card's Python computes what the project computes, and its text."""

import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from data.encode import encode_prompt, encode_response
from data.groups import make_rows
from pipeline.config.sections import ModelSettings
from pipeline.store import files, integrity
from stages.models.forward import response_scores
from stages.models.loading import load_scalar_model, load_tokenizer, new_reward_model
from stages.models.publish import save_model
from stages.settings import ppo as ppo_settings
from stages.settings import sft as sft_settings
from stages.shared.cards import ANSWER, SCORE, card_text, shown
from stages.shared.cards import ModelCard as Card
from stages.shared.provenance import Provenance
from tests.builders import tiny_causal, tiny_tokenizer

TOTAL = {"rows": 60, "skip": 0, "limit": None, "subset": None, "split": "train"}


def provenance(stage="rm", config=None, model=None, data=None, manifests=None, inputs=None, seed=3):
    return Provenance(
        experiment="fake",
        stage=stage,
        section=config or sft_settings.SFTSettings(),
        model=model or ModelSettings(),
        seed=seed,
        inputs=inputs or {},
        manifests=manifests or {},
        data=data or {},
        model_revision=None,
        publish=Path(),
    )


def card(of, *what, **fields) -> str:
    """Return the text of a card."""
    return card_text(of, Card(*what, **fields))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Change to a folder with model/, a policy with its card."""
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer()
    model = tiny_causal("llama", 0, tokenizer, max_position_embeddings=128)
    text = card(provenance(), "a policy trained by PPO-ptx", ANSWER)
    save_model(model, tokenizer, tmp_path / "model", card=text, temperature=1.0)
    return tmp_path / "model"


def typed(folder) -> dict:
    """Run the card's Python and return its variables."""
    (code,) = re.findall("```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    exec(code, names)
    return names


def test_a_reward_models_card_gives_the_score_that_ppo_gets(folder):
    model, tokenizer = new_reward_model(folder, seed=1), load_tokenizer(folder)
    model.config.reward_bias = 0.75
    save_model(model, tokenizer, folder, card=card(provenance(), "a reward model", SCORE))
    ids = encode_prompt(tokenizer, "Hello!"), encode_response(tokenizer, "Hi there.")
    rows = make_rows(*([part] for part in ids), tokenizer.pad_token_id)
    with torch.no_grad():
        expected = response_scores(load_scalar_model(folder), rows).item()
    found = typed(folder)
    assert found["prompt"] + found["response"] == ids[0] + ids[1]
    assert found["score"].item() == pytest.approx(expected, abs=1e-6) and abs(expected) > 1e-3


def test_a_policys_card_samples_an_answer_with_no_settings_of_its_own(folder, capsys):
    found = typed(folder)
    assert found["prompt"]["input_ids"][0].tolist() == encode_prompt(found["tokenizer"], "Hello!")
    assert 0 < len(found["answer"]) <= 64 and capsys.readouterr().out.strip()
    (call,) = re.findall(r"generate\((.*?)\)", (folder / "README.md").read_text())
    assert call == "**prompt, max_new_tokens=64" and found["model"].generation_config.top_k == 0


def rows_of(text: str, title: str) -> list[list[str]]:
    """Return the rows of a card's table below a heading."""
    lines = text.partition(f"## {title}\n\n")[2].partition("\n\n")[0].splitlines()
    return [[cell.strip(" `") for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def test_a_card_names_model_data_settings_and_figures_and_no_path(tmp_path):
    model = ModelSettings(name_or_path=str(tmp_path / "models" / "given"), peft={"method": "dora", "r": 4})
    config = ppo_settings.PPOSettings(kl_coef=0.07, reward_model=str(tmp_path / "judges" / "judge"))
    hub = {"path": "org/prompts", "revision": "abcdef0123", **TOTAL, "rows": None, "limit": 20, "skip": 10}
    data = {"prompts": hub, "documents": {"path": str(tmp_path / "texts" / "docs.jsonl"), **TOTAL}}
    manifests = {"sft": {"config": {"data": {"demonstrations": {"path": "world"}, "validation_fraction": 0.05}}}}
    manifests["world"] = {"metrics": {"demonstrations": 1500}}
    of = provenance("ppo", config, model, data, manifests, {name: tmp_path / name for name in manifests})
    text = card(of, "a policy", ANSWER, figures={"score": 0.5, "reliability": [1], "best_step": 3, "kept": True})
    assert rows_of(text, "Data") == [
        ["demonstrations", "the embedded world", "1500", "sft"],
        ["documents", "docs.jsonl", "60", "ppo"],
        ["prompts", "org/prompts` train abcdef0, after the first 10, 20 of them", "–", "ppo"],
    ]
    settings = dict(rows_of(text, "Settings that are not the defaults"))
    assert settings["ppo.kl_coef"] == "0.07" and settings["ppo.reward_model"] == "judge" and settings["seed"] == "3"
    assert {key: value for key, value in settings.items() if "peft" in key} == {
        "model.peft.method": "dora",
        "model.peft.r": "4",
    }
    assert "ppo.cliprange" not in settings
    assert rows_of(text, "Figures") == [["score", "0.5"], ["best_step", "3"]]
    assert "the folder `given`" in text and str(tmp_path) not in text
    assert ModelCard(text).data.datasets == ["org/prompts"] and ModelCard(text).data.base_model is None


def test_a_mixture_is_named_with_its_parts_and_how_they_were_read(tmp_path):
    parts = {
        "1": {"path": str(tmp_path / "own.jsonl"), **TOTAL, "where": {"lang": "en"}, "weight": 2.0},
        "2": {"path": "org/set", "revision": "abcdef0123", **TOTAL, "by": "helpfulness", "on_bad_row": "drop"},
    }
    data = {"demonstrations": {"path": "own.jsonl + org/set", "parts": parts}}
    text = card(provenance("sft", data=data), "a policy", ANSWER)
    ((_, where, rows, _),) = rows_of(text, "Data")
    assert where.replace("`", "") == (
        "own.jsonl (where lang: en; weight 2) + org/set train abcdef0 (judged by helpfulness; bad rows dropped)"
    )
    assert rows == "120" and ModelCard(text).data.datasets == ["org/set"] and str(tmp_path) not in text
    parts["2"]["rows"] = None  # not counted before it is read
    assert rows_of(card(provenance("sft", data=data), "a policy", ANSWER), "Data")[0][2] == "–"


def test_a_section_of_defaults_that_is_null_by_default_is_listed_as_one(tmp_path):
    of = provenance(
        "sft", sft_settings.SFTSettings(ppo_init={}), ModelSettings(name_or_path=str(tmp_path), peft={}), seed=0
    )
    settings = dict(rows_of(card(of, "a policy", ANSWER), "Settings that are not the defaults"))
    assert settings == {
        "sft.ppo_init": "{}",
        "model.name_or_path": tmp_path.name,
        "model.peft": "{}",
        "model.publish_dtype": "as_given",
    }


def test_metadata_go_from_card_to_card(tmp_path, monkeypatch):
    """They are the given model's licence, a Hub id as base_model, and the chain's data sets."""
    given = tmp_path / "given"
    given.mkdir()
    (given / "README.md").write_text(
        "---\nlicense: other\nlicense_name: llama3.1\nbase_model: someone/else\ndatasets: [theirs/data]\n---\n# It\n"
    )
    model, shelf = ModelSettings(name_or_path=str(given)), tmp_path / "base" / "model"
    text = card(provenance("base", model=model), "a pretrained language model")
    found = ModelCard(text).data
    assert (found.license, found.license_name, found.base_model, found.datasets) == ("other", "llama3.1", None, None)
    assert "the licence other" in text

    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(given / "README.md"))
    model = ModelSettings(name_or_path="org/name")
    shelf.mkdir(parents=True)
    (shelf / "README.md").write_text(card(provenance("base", model=model), "a pretrained language model"))
    manifest = {"config": {"model": {"revision": "0123456789"}}}
    data = {"demonstrations": {"path": "org/demonstrations", **TOTAL}}
    of = provenance("sft", model=model, data=data, manifests={"base": manifest}, inputs={"base": shelf.parent})
    text = card(of, "a policy", ANSWER, source=shelf)
    found = ModelCard(text).data
    assert (found.base_model, found.license, found.license_name) == ("org/name", "other", "llama3.1")
    assert found.datasets == ["org/demonstrations"] and found.pipeline_tag == "text-generation"
    assert "`org/name` at the commit `0123456789`" in text


def test_a_card_omits_what_is_unknown(tmp_path, monkeypatch):
    def nothing(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", nothing)
    text = card(provenance("base", model=ModelSettings(name_or_path="org/name")), "a pretrained language model")
    assert ModelCard(text).data.license is None and "licence is not known" in text
    (tmp_path / "README.md").write_text("---\nlicense: [un\n---\nno metadata")
    text = card(provenance(model=ModelSettings(name_or_path="org/name")), "a policy", source=tmp_path)
    assert ModelCard(text).data.license is None
    assert "trained from scratch" in card(provenance(), "a policy")


def test_data_of_stages_further_up_are_named_where_they_are_what_it_was_made_of(tmp_path):
    def manifest(stage, data, inputs):
        facts = {kind: {"path": f"{kind}.jsonl", **TOTAL} for kind in data}
        sealed = integrity.seal({"config": {"data": facts}, "inputs": inputs})
        (tmp_path / stage).mkdir()
        files.write_json(tmp_path / stage / "manifest.json", sealed)
        return sealed

    rankings = manifest("rankings", ["rankings"], {})
    manifest("base", ["documents"], {})
    rm = manifest("rm", ["demonstrations"], {"rankings": rankings["digest"], "base": "of another one", "data:x": "0"})
    of = provenance("ppo", manifests={"rm": rm}, inputs={"rm": tmp_path / "rm"})
    found = rows_of(card(of, "a policy"), "Data")
    assert [(row[0], row[3]) for row in found] == [("demonstrations", "rm"), ("rankings", "rankings")]


@pytest.mark.parametrize(
    "base, words",
    [
        (("../../../base/model", None), ["`../../../base/model`", 'change into `adapter/` and load `"."`']),
        (("org/name", "0123"), ["`org/name` at the commit `0123`"]),
        (("art/x/base/model", None), ["`art/x/base/model`: a path from the folder where `rlhf` ran"]),
        (("", None), ["on a base model outside the experiment"]),
    ],
)
def test_an_adapters_base_is_named(base, words):
    text = card(provenance(), "a policy", ANSWER, adapter=base)
    assert all(word in text for word in words)
    assert ("AutoPeftModelForCausalLM" in text) == bool(base[0])


@pytest.mark.parametrize(
    "method, words", [("prefix_tuning", "PeftModel.from_pretrained"), ("houlsby", "peft does not")]
)
@pytest.mark.parametrize("use, loader", [(ANSWER, "load_policy"), (SCORE, "load_scalar_model")])
def test_a_model_with_an_adapter_in_it_is_not_said_to_load_as_others_do(method, words, use, loader):
    text = card(provenance(), "a model", use, in_place=method)
    assert words in text and f"`stages.models.loading.{loader}(folder)`" in text and "```python" not in text


def test_tokens_that_an_earlier_stage_trained_are_named_too():
    """Programs other than transformers have to be told of them, whatever this stage trained."""
    text = card(provenance(), "a policy", ANSWER, soft_prompt=4, control_tokens=("<|bad|>", "<|good|>"))
    assert "begins with 4 tokens" in text and "trained by an earlier stage. They are read" in text
    assert "ends with `<|good|>`" in text and "`<|bad|>` before an answer" in text
    own = card(provenance(model=ModelSettings(peft={"method": "p_tuning"})), "a policy", ANSWER, soft_prompt=20)
    assert "begins with 20 tokens" in own and "weights of the language model are the base model's." in own
    assert "never answered" not in card(provenance(), "a policy", ANSWER)


def test_a_path_inside_of_a_setting_is_its_last_part():
    rewards = [{"python": "/home/me/code/judge.py:score", "weight": 1.0}, {"url": "http://127.0.0.1:80/x"}]
    assert shown(rewards) == ('[{"python": "judge.py:score", "weight": 1.0}, {"url": "http://127.0.0.1:80/x"}]')
    assert shown({"file": "~/secret.py"}) == '{"file": "secret.py"}'
