"""What stages publish: dtypes, the base of an adapter, what `generate` does with a policy. By the micro chain."""

import json
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from data.answer_lengths import quantiles
from pipeline.config.sections import ModelSettings
from stages.shared.publishing import adapter_base

SFT = ("sft.max_steps=1", "sft.max_length=64", "sft.sample_tokens=0", "sft.per_device_train_batch_size=2")
DPO = ("dpo.max_steps=1", "dpo.max_length=64", "dpo.sample_tokens=0", "dpo.per_device_train_batch_size=2")


def dtypes(folder) -> set[str]:
    return {str(x.dtype).removeprefix("torch.") for x in load_file(folder / "model.safetensors").values()}


def read(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_as_given_goes_from_stage_to_stage(chain, tmp_path):
    """A model in bfloat16 stays in half the bytes, through base and what follows; by default it is float32."""
    (tmp_path / "given").mkdir()
    from stages.models.loading import load_policy, save_model

    given = tmp_path / "given"
    save_model(load_policy(chain.root / "base" / "model"), chain.tokenizer, given, card="", dtype="bfloat16")
    asked = (f"model.name_or_path={given}", "model.publish_dtype=as_given")
    base = chain.run("base", tmp_path / "base", *asked)
    sft = chain.run("sft", tmp_path / "sft", *asked, *SFT, inputs={"base": tmp_path / "base"})
    dpo = chain.run("dpo", tmp_path / "dpo", *asked, *DPO, inputs={"sft": tmp_path / "sft"})
    for done in (base, sft, dpo):
        assert dtypes(done.folder / "model") == {"bfloat16"}, done.folder
        assert read(done.folder / "model" / "config.json")["dtype"] == "bfloat16"
    assert dtypes(chain.run("base", tmp_path / "plain", asked[0]).folder / "model") == {"float32"}
    assert base.figures["same_rows_as_given"] is True


@pytest.mark.parametrize("asked, found", [("bfloat16", {"bfloat16"}), ("float32", {"float32"}), ("null", {"float32"})])
def test_a_dtype_that_is_named(chain, tmp_path, asked, found):
    done = chain.run("sft", tmp_path / "sft", f"model.publish_dtype={asked}", *SFT)
    assert dtypes(done.folder / "model") == found


def test_float32_by_name_is_the_default_and_makes_nothing_stale():
    assert ModelSettings(publish_dtype="float32") == ModelSettings() and ModelSettings().publish_dtype is None


def test_a_policy_says_at_which_temperature_it_was_trained(chain, tmp_path):
    small = ("ppo.batch_size=4", "ppo.mini_batch_size=2", "ppo.total_episodes=4", "ppo.eval_prompts=2")
    lengths = ("ppo.max_length=48", "ppo.response_length=8", "ppo.ptx_length=8", "ppo.ptx_ratio=1", "ppo.ema_decay=0.5")
    told = {"sft": {"digest": "sft", "metrics": {"answer_tokens": quantiles([6] * 8 + [12] * 12)}}}
    done = chain.run(
        "ppo", tmp_path / "ppo", *small, *lengths, "ppo.temperature=0.7", "ppo.publish_ema=true", manifests=told
    )
    for folder in ("model", "model_ema"):
        found = read(done.folder / folder / "generation_config.json")
        assert (found["temperature"], found["top_k"], found["top_p"], found["do_sample"]) == (0.7, 0, 1.0, True)
    assert not (done.folder / "value_model" / "generation_config.json").exists()
    tags = {place: (done.folder / place / "README.md").read_text() for place in ("model", "value_model")}
    assert "pipeline_tag: text-generation" in tags["model"] and "text-classification" in tags["value_model"]
    line = "ppo: the demonstrations' answers have 12 tokens in the median, 95 % up to 12; "
    assert line in done.said and "are over 8, ppo.response_length: such answers are cut" in done.said


def test_sft_says_how_long_answers_are(chain, tmp_path):
    done = chain.run("sft", tmp_path / "sft", *SFT)
    lengths = [1 + len(chain.tokenizer(r["completion"])["input_ids"]) for r in chain.rows("demonstrations.jsonl")]
    assert done.figures["answer_tokens"] == quantiles(lengths)


# -- the base of an adapter ------------------------------------------------------------------------------


def provenance(tmp_path, name="org/name", method="lora", **metrics):
    record = {"metrics": metrics, "config": {"model": {"revision": "0123"}}}
    return SimpleNamespace(
        stage="sft",
        model=ModelSettings(name_or_path=name, peft=method and {"method": method}),
        inputs={"base": tmp_path / "art" / "base"},
        manifests={"base": record},
        publish=tmp_path / "art" / "sft" / ".tmp-publish",
    )


def base_of(provenance):
    return adapter_base(provenance, provenance.publish / "model", provenance.inputs["base"] / "model")


def test_an_adapter_on_a_model_of_the_hub_goes_by_its_name(tmp_path):
    assert base_of(provenance(tmp_path, same_rows_as_given=True)) == ("org/name", "0123")


ELSEWHERE = {"same_rows_as_given": True, "name": "/some/where"}


@pytest.mark.parametrize("given", [{"same_rows_as_given": False}, {}, ELSEWHERE])
def test_an_adapter_on_any_other_model_goes_by_the_way_there(tmp_path, given):
    """Of a base that got rows, the Hub's has not the same; an older manifest does not say."""
    assert base_of(provenance(tmp_path, **given)) == ("../../../base/model", None)


@pytest.mark.parametrize("method", [None, "bitfit"])
def test_without_an_adapter_there_is_no_base_of_it(tmp_path, method):
    assert base_of(provenance(tmp_path, method=method, same_rows_as_given=True)) is None
