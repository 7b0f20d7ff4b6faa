"""Build what scores the responses of a run: the scorers that it climbs, and the held-out one."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from stages.models.roles import Roles
from stages.ppo.inputs import TextRewardModel
from stages.scorers.scorer import ScorerSpec
from stages.scorers.scorers import make_scorer
from stages.scorers.weighted import Drops, WeightedScorer, WeightedSum
from stages.settings.scorers.common import ScorerSection
from stages.settings.scorers.scorer import names_of


def scorer_spec(roles: Roles, reward_model: nn.Module | None, batch_size: int) -> ScorerSpec:
    """Return what a scorer may be built from in a run of PPO.

    Args:
        roles: The models.
        reward_model: The one that it scores by; None if it scores otherwise.
        batch_size: The most responses in a forward pass, where they do not come as rows.
    """
    return ScorerSpec(
        reward_model=reward_model,
        pad_id=roles.tokenizer.pad_token_id,
        accelerator=roles.accelerator,
        batch_size=batch_size,
        packed=roles.packed,
    )


def make_scorers(
    roles: Roles,
    rewards: Sequence[ScorerSection],
    batch_size: int,
    *,
    shows_parts: bool,
    text_models: Mapping[str, TextRewardModel] | None = None,
    **more: Any,
) -> WeightedSum:
    """Return the weighted sum of the scorers that a run climbs.

    Args:
        roles: The models, reward models by the name of their scorer.
        rewards: The settings of the scorers.
        batch_size: The most responses in a forward pass, where they do not come as rows.
        shows_parts: Whether the score of each is shown.
        text_models: Reward models of this experiment that read texts, by the name of their scorer.
        more: Further fields of their `ScorerSpec`.
    """
    scorers = []
    for name, settings in zip(names_of(rewards), rewards, strict=True):
        spec = scorer_spec(roles, roles.reward_models.get(name), batch_size)
        if (own := (text_models or {}).get(name)) is not None:
            spec = replace(spec, reward_model=own.model, text_reader=own.reader, packed=own.packed)
        scorer = make_scorer(replace(spec, settings=settings, name=name, **more))
        scorers.append(WeightedScorer(name, settings.weight, scorer))
    may_drop = any(settings.may_drop() for settings in rewards)
    return WeightedSum(tuple(scorers), shows_parts, Drops(more.get("say", print)) if may_drop else None)
