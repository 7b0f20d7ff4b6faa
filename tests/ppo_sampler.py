"""Make PPO's sampler without a run of the stage."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from stages.models.roles import Roles
from stages.ppo.options import sampling_options
from stages.ppo.sampling import Sampler
from stages.ppo.scoring import make_scorers
from stages.rollouts.engine import EngineSpec, RolloutEngine
from stages.rollouts.rollout import DrawnPrompt
from stages.rollouts.transformers import TransformersEngine
from stages.scorers.scorer import Scorer, no_poll
from stages.scorers.weighted import WeightedScorer, WeightedSum
from stages.settings.ppo import PPOSettings, named_rewards
from stages.shared.engines import engine_rules

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
    if scorer is None:
        rewards = [settings for _, _, settings in named_rewards(c)]
        total = make_scorers(roles, rewards, c.per_device_train_batch_size, shows_parts=c.rewards is not None)
    else:
        total = WeightedSum((WeightedScorer("scorer", 1.0, scorer),))
    sampling, rules = sampling_options(c), engine_rules(c.rollout)
    own = TransformersEngine(spec_of(roles, c))
    name = "transformers" if engine is None else "vllm"
    sampler = Sampler(roles, total, sampling, rules, seed, name, engine or own, own, Path("no.log"), say)
    sampler.start(no_poll)
    return sampler


def drawn(prompts: Sequence[Sequence[int]], indices: Iterable[int] | None = None) -> list[DrawnPrompt]:
    """Return prompts to sample responses to, without rows of data.

    Args:
        prompts: Token ids.
        indices: Their indices in the list that they were drawn from; None: 0, 1, ….
    """
    indices = range(len(prompts)) if indices is None else indices
    return [DrawnPrompt(ids, index) for ids, index in zip(prompts, indices, strict=True)]
