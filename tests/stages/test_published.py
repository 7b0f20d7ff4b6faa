"""Test published folders: dtypes, an adapter's base model, the policy's generation settings."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from data.answer_lengths import quantiles
from pipeline.config.sections import ModelSettings
from stages.shared.publishing import adapter_base, artifact_of

SFT = ("sft.max_steps=1", "sft.max_length=64", "sft.sample_tokens=0", "sft.per_device_train_batch_size=2")
RM = ("rm.max_steps=1", "rm.max_length=64", "rm.per_device_train_batch_size=2", "rm.bias_demonstrations=2")
PPO = (
    *("ppo.batch_size=4", "ppo.mini_batch_size=2", "ppo.total_episodes=4", "ppo.eval_prompts=2"),
    *("ppo.max_length=48", "ppo.response_length=8", "ppo.ptx_length=8", "ppo.ptx_ratio=1"),
)
DPO = ("dpo.max_steps=1", "dpo.max_length=64", "dpo.sample_tokens=0", "dpo.per_device_train_batch_size=2")


def dtypes(folder) -> set[str]:
    """Return the dtypes of a folder's weights."""
    return {str(x.dtype).removeprefix("torch.") for x in load_file(folder / "model.safetensors").values()}


def read(path) -> dict:
    """Return the contents of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def test_as_given_goes_from_stage_to_stage(chain, tmp_path):
    """By default base, sft and dpo keep a base model's bfloat16."""
    from stages.models.loading import load_policy
    from stages.models.publish import save_model

    original = tmp_path / "original"
    original.mkdir()
    save_model(load_policy(chain.root / "base" / "model"), chain.tokenizer, original, card="", dtype="bfloat16")
    settings = (f"model.name_or_path={original}",)
    base = chain.run("base", tmp_path / "base", *settings)
    sft = chain.run("sft", tmp_path / "sft", *settings, *SFT, inputs={"base": tmp_path / "base"})
    dpo = chain.run("dpo", tmp_path / "dpo", *settings, *DPO, inputs={"sft": tmp_path / "sft"})
    for done in (base, sft, dpo):
        assert dtypes(done.folder / "model") == {"bfloat16"}, done.folder
        assert read(done.folder / "model" / "config.json")["dtype"] == "bfloat16"
    whole = chain.run("base", tmp_path / "whole", *settings, "model.publish_dtype=float32")
    assert dtypes(whole.folder / "model") == {"float32"}
    assert base.figures["same_rows_as_given"] is True


@pytest.mark.parametrize(
    "setting, published", [("bfloat16", {"bfloat16"}), ("float32", {"float32"}), ("null", {"float32"})]
)
def test_a_dtype_that_is_named(chain, tmp_path, setting, published):
    done = chain.run("sft", tmp_path / "sft", f"model.publish_dtype={setting}", *SFT)
    assert dtypes(done.folder / "model") == published


def test_float32_is_the_default_from_scratch_and_as_given_that_of_a_given_model():
    """What is recorded from scratch is what earlier versions recorded, so nothing becomes stale."""
    assert ModelSettings(publish_dtype="float32") == ModelSettings() and ModelSettings().publish_dtype is None
    given = ModelSettings(name_or_path="org/name")
    assert given.publish_dtype == "as_given" and ModelSettings(**given.model_dump()) == given
    for float32 in ("float32", None):
        assert ModelSettings(name_or_path="org/name", publish_dtype=float32).publish_dtype is None
    assert ModelSettings(name_or_path="org/name", publish_dtype="float16").publish_dtype == "float16"


@pytest.mark.parametrize("model, expected", [({}, "as_given"), ({"publish_dtype": None}, None)])
def test_a_reward_models_own_given_base_is_published_as_given(model, expected):
    from stages.settings.experiment import Experiment
    from stages.settings.reward_base import with_own_base

    experiment = Experiment(name="a", model=model, rm={"base": {"name_or_path": "org/name"}})
    assert with_own_base(experiment).model.publish_dtype == expected and experiment.model.publish_dtype is None


def test_later_stages_start_from_what_a_16_bit_sft_published(chain, tmp_path):
    """Policy and reference start from its rounded weights, so KL is 0 at the start."""
    from stages.models.loading import load_policy

    half = "model.publish_dtype=bfloat16"
    sft = chain.run("sft", tmp_path / "sft", half, *SFT).folder
    rm = chain.run("rm", tmp_path / "rm", half, *RM, inputs={"sft": sft}).folder
    ppo = chain.run("ppo", tmp_path / "ppo", half, *PPO, inputs={"sft": sft, "rm": rm})
    published = load_file(sft / "model" / "model.safetensors")
    for name, weight in load_policy(sft / "model").state_dict().items():
        if name in published:
            assert weight.dtype == torch.float32 and torch.equal(weight, published[name].float()), name
    first = json.loads((ppo.folder / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(first["objective/kl"]) < 1e-6  # nats a response; sums in another order
    for folder in (rm / "model", ppo.folder / "value_model"):
        weights = load_file(folder / "model.safetensors")
        assert weights.pop("score.weight").dtype == torch.float32
        assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_a_policys_generation_settings_have_the_training_temperature(chain, tmp_path):
    small = ("ppo.batch_size=4", "ppo.mini_batch_size=2", "ppo.total_episodes=4", "ppo.eval_prompts=2")
    lengths = ("ppo.max_length=48", "ppo.response_length=8", "ppo.ptx_length=8", "ppo.ptx_ratio=1", "ppo.ema_decay=0.5")
    manifests = {"sft": {"digest": "sft", "metrics": {"answer_tokens": quantiles([6] * 8 + [12] * 12)}}}
    done = chain.run(
        "ppo", tmp_path / "ppo", *small, *lengths, "ppo.temperature=0.7", "ppo.publish_ema=true", manifests=manifests
    )
    for folder in ("model", "model_ema"):
        options = read(done.folder / folder / "generation_config.json")
        assert (options["temperature"], options["top_k"], options["top_p"]) == (0.7, 0, 1.0)
        assert options["do_sample"] is True
    assert not (done.folder / "value_model" / "generation_config.json").exists()
    tags = {place: (done.folder / place / "README.md").read_text() for place in ("model", "value_model")}
    assert "pipeline_tag: text-generation" in tags["model"] and "text-classification" in tags["value_model"]
    line = "ppo: the demonstrations' answers have 12 tokens in the median, 95 % up to 12; "
    assert line in done.said and "are over 8, ppo.response_length: such answers are cut" in done.said


def test_sft_records_the_lengths_of_responses(chain, tmp_path):
    done = chain.run("sft", tmp_path / "sft", *SFT)
    lengths = [1 + len(chain.tokenizer(r["completion"])["input_ids"]) for r in chain.rows("demonstrations.jsonl")]
    assert done.figures["answer_tokens"] == quantiles(lengths)


# ── the base model of an adapter ──


def provenance(tmp_path, name="org/name", method="lora", **metrics):
    """Return what `adapter_base` reads of a run of sft.

    Args:
        tmp_path: The artifacts' parent folder.
        name: The setting model.name_or_path.
        method: The adapter's method; None for no adapter.
        metrics: Metrics of base's manifest.
    """
    record = {"metrics": metrics, "config": {"model": {"revision": "0123"}}}
    return SimpleNamespace(
        stage="sft",
        model=ModelSettings(name_or_path=name, peft=method and {"method": method}),
        inputs={"base": tmp_path / "art" / "base"},
        manifests={"base": record},
        publish=tmp_path / "art" / "sft" / ".tmp-publish",
    )


def base_of(provenance):
    """Return the base model, and its revision, that the adapter's files name."""
    return adapter_base(provenance, provenance.publish / "model", provenance.inputs["base"] / "model")


def test_an_adapter_on_a_model_of_the_hub_names_it(tmp_path):
    assert base_of(provenance(tmp_path, same_rows_as_given=True)) == ("org/name", "0123")


ELSEWHERE = {"same_rows_as_given": True, "name": "/some/where"}


@pytest.mark.parametrize("given", [{"same_rows_as_given": False}, {}, ELSEWHERE])
def test_an_adapter_on_any_other_model_names_a_relative_path(tmp_path, given):
    """That is so if base added rows, if its manifest is older, and for a local model."""

    assert base_of(provenance(tmp_path, **given)) == ("../../../base/model", None)


def test_an_adapter_on_another_experiments_base_names_the_base_there(tmp_path):
    taken = provenance(tmp_path, same_rows_as_given=False)
    taken.inputs = {"base": tmp_path / "other" / "base"}
    assert base_of(taken) == ("../../../../other/base/model", None)
    assert artifact_of(taken, taken.publish / "model") == tmp_path / "art" / "sft" / "model"


@pytest.mark.parametrize("method", [None, "bitfit"])
def test_without_an_adapter_there_is_no_base_model_to_name(tmp_path, method):
    assert base_of(provenance(tmp_path, method=method, same_rows_as_given=True)) is None
