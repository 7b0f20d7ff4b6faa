"""Test the default settings: a short YAML is work of minutes to hours, with reasonable rates."""

from pathlib import Path

import pytest

from pipeline import api
from stages.settings.training import total_steps
from tests.shipped import settings_for
from tests.stages.shared.test_disk import LORA, SMALL

ROOT = Path(__file__).resolve().parents[2]
STAGES = api.stages()
DECISIVE = {  # settings whose defaults changed, so that shipped configs set them
    "sft": ("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps"),
    "rm": ("learning_rate", "gradient_accumulation_steps"),
    "dpo": ("learning_rate", "gradient_accumulation_steps"),
    "ppo": ("total_episodes", "batch_size", "mini_batch_size", "learning_rate", "value_learning_rate", "warmup_steps",
            "kl_coef", "ptx_ratio", "eval_steps"),
    "evaluate": ("best_of", "num_prompts"),
}  # fmt: skip
UNUSED = {  # config → decisive settings of what it does not have: rankings, a value model, pretraining text
    "rule-reward": ("rm.learning_rate", "rm.gradient_accumulation_steps", "dpo.learning_rate",
                    "dpo.gradient_accumulation_steps", "ppo.value_learning_rate", "ppo.ptx_ratio",
                    "evaluate.best_of")
}  # fmt: skip


def test_a_short_yaml_is_not_work_of_days(tmp_path):
    """PPO samples at most half a million tokens: an hour for a 135M model on two CPU cores."""
    kinds = ("documents", "demonstrations", "prompts", "evaluation_prompts", "rankings")
    data = ", ".join(f"{kind}: org/data" for kind in kinds)
    (tmp_path / "short.yaml").write_text(f"name: short\nmodel: {{name_or_path: org/model}}\ndata: {{{data}}}\n")
    experiment = api.load_experiment(tmp_path / "short.yaml")
    ppo, evaluate = experiment.ppo, experiment.evaluate
    assert ppo.total_episodes * ppo.response_length <= 500_000
    updates = ppo.total_episodes / ppo.batch_size
    assert 20 <= updates <= 100 and ppo.warmup_steps <= updates / 5 and ppo.eval_steps <= updates / 3
    assert ppo.ptx_ratio * ppo.ptx_length <= ppo.response_length, "no more text than episodes"
    answers = evaluate.num_prompts * (evaluate.best_of + 4 * evaluate.samples_per_prompt)
    assert answers * evaluate.response_length <= 200_000
    # sixty demonstrations and sixty rankings give a few steps
    assert total_steps(experiment.sft, 57) >= 3 and total_steps(experiment.rm, 54) >= 3
    assert total_steps(experiment.dpo, 54) >= 3


@pytest.mark.parametrize("stage, key", [("ppo", "total_episodes"), ("ppo", "batch_size"), ("sft", "learning_rate"),
                                        ("rm", "gradient_accumulation_steps"), ("ppo", "kl_coef")])  # fmt: skip
def test_the_papers_scale_is_named_where_the_default_is_smaller(stage, key):
    assert "the paper" in STAGES[stage].settings.model_fields[key].description


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_do_not_depend_on_decisive_defaults(path, tmp_path, monkeypatch):
    """They set everything that decides their length and their steps."""
    monkeypatch.chdir(ROOT)
    experiment = api.load_experiment(path, *settings_for(path, tmp_path))
    left_out = {
        f"{stage}.{key}"
        for stage, keys in DECISIVE.items()
        for key in keys
        if key not in getattr(experiment, stage).model_fields_set
    }
    assert left_out - set(UNUSED.get(path.stem, ())) == set()


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo", "ppo"])
def test_a_default_rate_is_pointed_out_where_adapters_train(chain, tmp_path, stage):
    few = {"sft": "sft.max_steps=1", "rm": "rm.max_steps=1", "dpo": "dpo.max_steps=1", "ppo": "ppo.total_episodes=4"}
    rate = getattr(chain.experiment(), stage).learning_rate
    said = chain.run(stage, tmp_path / "default", *SMALL, few[stage], LORA).said
    line = f"{stage}: learning_rate is the default {rate:g}, which suits the training of every weight; for adapters"
    assert said.count(line) == 1 and f"{stage}.learning_rate={10 * rate:g}" in said
    own = [f"{stage}.learning_rate=1e-4"]
    if stage == "ppo":
        own.append("ppo.value_learning_rate=1e-4")
    assert "is the default" not in chain.run(stage, tmp_path / "own", *SMALL, few[stage], LORA, *own).said
    assert "is the default" not in chain.run(stage, tmp_path / "whole", *SMALL, few[stage]).said


def test_evaluate_reports_how_many_prompts_it_takes(chain, tmp_path):
    lengths = {"response_length": 4, "max_length": 64, "perplexity_length": 32, "best_of": 1}
    short = [f"evaluate.{key}={value}" for key, value in lengths.items()]
    said = chain.run("evaluate", tmp_path / "some", *short, "evaluate.num_prompts=3").said
    assert "evaluate: the first 3 of 10 evaluation prompts; evaluate.num_prompts takes more" in said
    assert "evaluate: the first" not in chain.run("evaluate", tmp_path / "all", *short).said
