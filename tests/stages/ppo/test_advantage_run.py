"""Test PPO without a value model: what it trains and publishes, how it resumes, what it refuses."""

import pytest

from pipeline.errors import UserError
from tests.stages.ppo.test_ppo_run import SMALL

OPTIONS = [f"ppo.{key}={value}" for key, value in (SMALL | {"total_episodes": 24}).items()]
OF_VALUES = {"loss/value_avg", "val/clipfrac_avg", "val/explained_variance", "grad_norm/value"}


@pytest.mark.parametrize("method", ["rloo", "grpo"])
def test_no_value_model_is_trained_or_published(chain, tmp_path, method):
    done = chain.run("ppo", tmp_path / "ppo", *OPTIONS, f"ppo.advantage={method}", "ppo.publish_ema=true")
    assert (done.folder / "model" / "model.safetensors").is_file()
    assert (done.folder / "model_ema").is_dir() and not (done.folder / "value_model").exists()
    for row in done.rows("metrics.jsonl"):
        assert not OF_VALUES & row.keys()
        assert row["val/ratio"] == pytest.approx(1.0, abs=1e-3)
        assert ("loss/kl" in row) == (method == "grpo")


def test_what_is_not_used_is_said(chain, tmp_path):
    settings = [*OPTIONS, "ppo.advantage=rloo", "ppo.lam=0.9", "ppo.total_episodes=8"]
    said = chain.run("ppo", tmp_path / "ppo", *settings).said
    assert "not used with ppo.advantage rloo: lam" in " ".join(said.split())


def test_gae_is_the_default(chain, tmp_path):
    one = chain.run("ppo", tmp_path / "one", *OPTIONS)
    other = chain.run("ppo", tmp_path / "other", *OPTIONS, "ppo.advantage=gae")
    for model in ("model", "value_model"):
        weights = [(done.folder / model / "model.safetensors").read_bytes() for done in (one, other)]
        assert weights[0] == weights[1]
    assert one.rows("metrics.jsonl")[0].keys() >= OF_VALUES


@pytest.mark.parametrize("method", ["rloo", "grpo"])
def test_the_micro_batch_does_not_change_what_is_learnt(chain, tmp_path, method):
    settings = [*OPTIONS, f"ppo.advantage={method}", "ppo.total_episodes=8"]
    rows = [
        chain.run("ppo", tmp_path / str(size), *settings, f"ppo.per_device_train_batch_size={size}").rows(
            "metrics.jsonl"
        )[0]
        for size in (2, 8)
    ]
    for key in ("loss/policy_avg", "grad_norm/ppo", "objective/kl", "objective/scores"):
        assert rows[0][key] == pytest.approx(rows[1][key], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    "settings, line",
    [
        (["ppo.advantage=rloo", "ppo.samples_per_prompt=1"], "ppo.samples_per_prompt: 1; rloo compares the samples"),
        (["ppo.advantage=grpo", "ppo.samples_per_prompt=2", "ppo.kl_target=3.0"], "ppo.kl_target: has no effect"),
        (["ppo.grpo_scale=false"], "ppo.grpo_scale: has no effect with ppo.advantage: gae"),
        (["ppo.advantage=reinforce"], "ppo.advantage"),
    ],
)
def test_settings_without_an_effect_are_refused(chain, settings, line):
    with pytest.raises(UserError) as error:
        chain.experiment(*settings)
    assert any(line in text for text in error.value.lines), error.value.lines
