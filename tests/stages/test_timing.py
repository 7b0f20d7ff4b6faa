"""Test timing.jsonl: one row for each step, with the tokens that the step processed."""

import pytest

from data.encode import encode_prompt, encode_response
from tests.stages.micro_chain import spy
from tests.stages.shared.test_disk import SMALL, STEPS


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo", "ppo"])
def test_each_step_has_its_seconds_and_tokens(chain, tmp_path, stage):
    done = chain.run(stage, tmp_path / stage, *SMALL, STEPS[stage], "checkpoints.every=0")
    rows, metrics = done.rows("timing.jsonl"), done.rows("metrics.jsonl")
    assert [row["step"] for row in rows] == [row["step"] for row in metrics] == list(range(1, 10))
    for row in rows:
        assert set(row) == {"step", "seconds", "tokens", "tokens_per_second", "memory_gb"}
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"], rel=0.05)
        assert 0.05 < row["memory_gb"] < 20
    assert not {"seconds", "tokens", "memory_gb"} & set(metrics[0]), "these are not among the bytes that must repeat"


def test_padding_is_not_counted(chain, tmp_path):
    """A batch of one row has the tokens of a demonstration, one of two rows those of two."""
    tokens = {}
    for size in (1, 2):
        settings = ("sft.max_steps=4", f"sft.per_device_train_batch_size={size}", "sft.gradient_accumulation_steps=1")
        more = ("sft.max_length=64", "sft.sample_tokens=0", "checkpoints.every=0")
        done = chain.run("sft", tmp_path / str(size), *settings, *more)
        tokens[size] = {row["tokens"] for row in done.rows("timing.jsonl")}
    rows = [(encode_prompt(chain.tokenizer, r["prompt"]), r["completion"]) for r in chain.rows("demonstrations.jsonl")]
    lengths = {len(ids) + len(encode_response(chain.tokenizer, text)) for ids, text in rows}
    assert tokens[1] <= lengths and tokens[2] <= {a + b for a in lengths for b in lengths}


def test_ppo_counts_its_episodes_with_their_prompts(chain, tmp_path, monkeypatch):
    from stages.ppo import run as ppo

    rollouts = spy(monkeypatch, ppo, "sample")
    done = chain.run("ppo", tmp_path / "ppo", *SMALL, "ppo.total_episodes=8", "checkpoints.every=0")
    trained = [call.result for call in rollouts]
    assert len(trained) == 2
    expected = [sum(map(len, rollout.prompts)) + sum(map(len, rollout.responses)) for rollout in trained]
    assert [row["tokens"] for row in done.rows("timing.jsonl")] == expected
