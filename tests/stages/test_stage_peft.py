"""Test the settings of adapters: which methods have which, and what a stage changes for itself."""

import pytest

from pipeline.config.validation import load_experiment
from pipeline.errors import UserError
from pipeline.fingerprints import fingerprinted_settings
from stages.settings.experiment import STAGES, Experiment
from stages.settings.peft import TRAINING, model_of, peft_of

CHECKS = [stage.check for stage in STAGES.values()]


@pytest.fixture
def load(tmp_path):
    def experiment(*overrides):
        path = tmp_path / "a.yaml"
        path.write_text("name: a\n")
        return load_experiment(path, overrides, Experiment, CHECKS)

    return experiment


def refusals(load, *overrides):
    with pytest.raises(UserError) as error:
        load(*overrides)
    return error.value.lines


def test_a_stage_changes_only_the_keys_that_it_names(load):
    experiment = load("model.peft={r: 64, lora_alpha: 16, modules_to_save: [norm]}", "ppo.peft.r=8", "rm.peft=full")
    assert peft_of(experiment, "sft") == peft_of(experiment, "dpo") == experiment.model.peft
    assert peft_of(experiment, "ppo") == experiment.model.peft.model_copy(update={"r": 8})
    assert peft_of(experiment, "rm") is None and model_of(experiment, "rm").peft is None
    assert peft_of(experiment, "base") == experiment.model.peft


def test_a_stage_may_be_the_only_one_with_an_adapter(load):
    experiment = load("dpo.peft={method: dora, use_rslora: true}")
    assert [peft_of(experiment, stage) is None for stage in TRAINING] == [True, True, True, False]
    assert (peft_of(experiment, "dpo").method, peft_of(experiment, "dpo").r) == ("dora", 16)
    assert peft_of(load("dpo.peft={}"), "dpo").method == "lora"


def test_with_another_method_what_it_does_not_have_is_left_out(load):
    experiment = load("model.peft={method: adalora, r: 4, init_r: 9}", "ppo.peft.method=lora", "dpo.peft.method=ia3")
    assert (peft_of(experiment, "ppo").r, peft_of(experiment, "ppo").init_r) == (4, None)
    lora = load("model.peft={init_lora_weights: pissa, target_modules: [q_proj], r: 4}", "sft.peft.method=dora")
    assert (peft_of(lora, "sft").init_lora_weights, peft_of(lora, "sft").target_modules) == (None, ["q_proj"])
    assert peft_of(load("model.peft={r: 4, lora_dropout: 0.1}", "rm.peft.method=ia3"), "rm").r == 16


@pytest.mark.parametrize(
    "overrides, line",
    [
        (["model.peft={method: dora, init_lora_weights: pissa}"],
         "model.peft.init_lora_weights: pissa has no effect with method dora; use lora or qlora, or leave it out"),
        (["model.peft={method: ia3, target_modules: [q_proj]}"], "model.peft.target_modules: ['q_proj'] has no effect"),
        (["model.peft={method: bitfit, modules_to_save: [norm]}"], "model.peft.modules_to_save: ['norm'] has no"),
        (["ppo.peft={method: adalora, use_rslora: true}"], "ppo.peft.use_rslora: True has no effect with"),
        (["rm.peft={bits: 8}"], "rm.peft.bits: 8 has no effect with method lora; use qlora, or leave it out"),
        (["sft.peft.init_r=2", "sft.peft.method=adalora"], "sft.peft.init_r: 2 is lower than r 16"),
        (["model.peft.target_modules='(q'"], "model.peft.target_modules: '(q' is no regular expression"),
        (["model.peft.exclude_modules=[]"], "model.peft.exclude_modules: names nothing"),
        (["model.peft={layers_to_transform: [0], target_modules: .*q_proj}"], "model.peft.layers_to_transform: has no"),
        (["model.peft={method: houlsby, r: 8}"], "model.peft.r: 8 has no effect with method houlsby; use lora"),
        (["model.peft={method: ia3, lora_dropout: 0.1}"], "model.peft.lora_dropout: 0.1 has no effect with method"),
        (["sft.peft={method: bitfit, lora_alpha: 8}"], "sft.peft.lora_alpha: 8 has no effect with method bitfit"),
        (["rm.peft={lora_dropout: 0.1}"], "rm.peft.lora_dropout: 0.1 has no effect; only sft trains with dropout"),
        (["model.peft.method=prompt_tuning", "dpo.peft.prompt_tuning_init=random"],
         "dpo.peft.prompt_tuning_init: random has no effect in dpo, since `base` adds the soft prompt; set model.peft"),
        (["ppo.peft={method: p_tuning}"], "ppo.peft.method: p_tuning trains a soft prompt that `base` adds, and model"),
        (["ppo.peft={method: prefix_tuning}", "model.max_position_embeddings=999"],
         "ppo.peft.method: prefix_tuning begins away from sft's model, which ppo"),
        (["dpo.peft={rr: 3}"], "dpo.peft.rr: unknown key; did you mean dpo.peft.r?"),
        (["dpo.peft=none"], 'dpo.peft: the string "none"; should be a mapping, or should be \'full\''),
    ],
)  # fmt: skip
def test_what_cannot_work_is_one_line(load, overrides, line):
    (found,) = refusals(load, *overrides)
    assert line in found


def test_vllm_takes_an_adapter_alone_by_ppos_own_settings(load):
    alone = ["launch.vllm.adapter_alone=true", "ppo.rollout.engine=vllm"]
    load(*alone, "ppo.peft={method: lora, use_rslora: true}")
    (line,) = refusals(load, *alone, "model.peft.method=lora", "ppo.peft.method=dora")
    assert "model.peft.method is dora" in line
    (line,) = refusals(load, *alone, "model.peft.method=lora", "ppo.peft=full")
    assert "is null" in line


def test_null_settings_are_in_no_fingerprint(load):
    experiment = load("model.peft={r: 8}").model_dump(mode="json")
    settings = fingerprinted_settings("dpo", {key: experiment[key] for key in ("dpo", "model", "seed")})
    assert "peft" not in settings["dpo"] and "adapter" not in settings["model"]
    assert settings["model"]["peft"] == {
        "method": "lora", "r": 8, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"
    }  # fmt: skip


def test_an_adapter_needs_its_base_and_a_folder(load, tmp_path):
    lines = refusals(load, "model.adapter=/no/such")
    assert any("model.adapter: no such folder: /no/such; should be one that peft saved" in line for line in lines)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("{}")
    (line,) = refusals(load, f"model.adapter={tmp_path}")
    assert "model.adapter: a model from scratch has no adapter" in line
    (line,) = refusals(load, f"model.name_or_path={tmp_path}")
    assert "holds an adapter; name the model that it was trained on here" in line
