"""List every row in the order of the page, and the sizes in which they run."""

from dataclasses import dataclass

from claims_rows import (
    by_judge,
    climbed,
    demo,
    details,
    direct,
    early,
    in_rounds,
    killed,
    overoptimisation,
    preferences,
    proxies,
    reward_models,
    rule,
    sentiment,
    tax,
    tied,
    whole_rankings,
    without_rl,
)
from claims_rows.row import Measurement, Row

ROWS: tuple[Row, ...] = (
    *demo.ROWS, *tax.ROWS, *reward_models.ROWS, *tied.ROWS, *whole_rankings.ROWS,
    *overoptimisation.ROWS, *early.ROWS, *proxies.ROWS, *climbed.ROWS, *direct.ROWS,
    *without_rl.ROWS, *in_rounds.ROWS, *details.ROWS, *killed.ROWS,
    *rule.ROWS, *sentiment.ROWS, *preferences.ROWS, *by_judge.ROWS,
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """Describe how large everything is."""

    name: str
    """Name of the experiments."""
    config: str
    """The config, from the checkout's root."""
    seeds: tuple[int, ...]
    """The seeds."""
    settings: tuple[str, ...]
    """Settings on top of the config, as `key=value`."""


SIZES = {
    "whole": Size(
        "claims",
        "configs/tiny.yaml",
        (11, 12, 13, 14, 15),  # no setting was chosen on them, and no other benchmark has shown them
        ("evaluate.samples_per_prompt=4", "evaluate.greedy_prompts=0", "rankings.judge_fraction=0", "launch.threads=1"),
    ),
    "quick": Size(
        "claims-quick",
        "configs/tiny.yaml",
        (3, 4),
        (
            "model.hidden_size=96", "model.num_hidden_layers=3", "model.num_attention_heads=6",
            "model.intermediate_size=312", "world.demonstrations=1500", "world.prompts=700",
            "world.evaluation_prompts=100", "base.max_steps=300", "base.eval_steps=300", "sft.num_train_epochs=2",
            "rankings.judge_fraction=0", "ppo.total_episodes=640", "dpo.max_steps=24", "dpo.eval_steps=24",
            "evaluate.samples_per_prompt=2", "evaluate.greedy_prompts=0", "evaluate.perplexity_rows=128",
            "launch.threads=1",
        ),
    ),
    "micro": Size(
        "claims-micro",
        "tests/resume/micro.yaml",
        (3, 4),
        (
            "ppo.kl_target=null", "ppo.keep=last", "sft.ppo_init=null", "rm.ensemble=1", "rm.label_smoothing=0",
            "rankings.num_prompts=null", "world.prompts=80",
            "ppo.reward_ensemble=mean", "evaluate.reward_ensemble=mean",
            "evaluate.samples_per_prompt=2", "evaluate.greedy_prompts=0", "ppo.publish_ema=false",
        ),
    ),
}  # fmt: skip
"""Size → what it means: all that is claimed, less of it, or only to show that it runs."""


def measurements(rows: tuple[Row, ...] | list[Row]) -> list[Measurement]:
    """Return what must be measured for rows, each once, in their order."""
    by_key = {row.measurement.key: row.measurement for row in rows}
    return list(by_key.values())
