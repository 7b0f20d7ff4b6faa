"""Make PPO's sampler without a run of the stage."""

from collections.abc import Callable
from pathlib import Path

from stages.models.roles import Roles
from stages.ppo.options import sampling_options
from stages.ppo.sampling import Sampler, no_poll, scorer_of
from stages.rollouts.engine import EngineSpec, RolloutEngine
from stages.rollouts.engines import engine_rules
from stages.rollouts.transformers import TransformersEngine
from stages.scorers.scorer import Scorer
from stages.settings.ppo import PPOSettings

SEED = 3


def spec_of(roles: Roles, c: PPOSettings) -> EngineSpec:
    """Return what an engine is built from, without folders."""
    return EngineSpec(
        model=Path(),
        scratch=Path(),
        log=Path("no.log"),
        device=roles.accelerator.device,
        dtype="float32",
        autocast=roles.accelerator.autocast,
        pad_id=roles.tokenizer.pad_token_id,
        max_length=c.max_length,
        batch_size=c.local_rollout_forward_batch_size,
        timeout=60.0,
    )


def sampler_of(
    roles: Roles,
    c: PPOSettings,
    engine: RolloutEngine | None = None,
    seed: int = SEED,
    say: Callable[[str], None] = lambda line: None,
    scorer: Scorer | None = None,
) -> Sampler:
    """Return a started sampler of these models.

    Args:
        roles: The models.
        c: The settings of the stage.
        engine: The engine that samples; None for the policy itself.

        seed: The experiment's seed.
        say: Gets the lines that are printed.
        scorer: Scores in place of the reward model.
    """
    scorer = scorer or scorer_of(roles, roles.reward_model, c.per_device_train_batch_size)
    sampling, rules = sampling_options(c), engine_rules(c.rollout)
    own = TransformersEngine(spec_of(roles, c))
    name = "transformers" if engine is None else "vllm"
    sampler = Sampler(roles, scorer, sampling, rules, seed, name, engine or own, own, Path("no.log"), say)
    sampler.start(no_poll)
    return sampler
