"""Sample rollouts with the engine that the settings name, or with the policy if that is lost."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pipeline.errors import UserError
from pipeline.launch import parallel
from stages.models.forward import response_logprobs
from stages.models.roles import Roles
from stages.objectives.masked import masked_mean, masked_sum
from stages.rollouts.collect import Sampling, collect
from stages.rollouts.engine import EngineLost, EngineRules, EngineSpec, RolloutEngine
from stages.rollouts.engines import ENGINES
from stages.rollouts.rollout import DrawnPrompt, Rollout
from stages.rollouts.transformers import TransformersEngine
from stages.scorers.scorer import no_poll
from stages.scorers.weighted import WeightedSum
from stages.settings.rollout import INSTALL
from stages.shared.runtime import bound_of_short_rows
from stages.training.batching import in_micro_batches


@dataclass
class Sampler:
    """The engine that samples a run's rollouts, and the settings that all of them share."""

    roles: Roles
    """The models."""
    scorer: WeightedSum
    """Scores the responses."""
    sampling: Sampling
    """How rollouts are sampled and scored."""
    rules: EngineRules
    """When the engine counts as lost, and what happens then."""
    seed: int
    """The experiment's seed."""
    name: str
    """The engine's name in the settings."""
    engine: RolloutEngine
    """The engine that the settings name."""
    policy_engine: RolloutEngine
    """Samples with the policy itself; the same as `engine` if the settings name that."""
    log: Path
    """File of the engine's own output."""
    say: Callable[[str], None]
    """Prints a line."""
    is_lost: bool = False
    """Whether `engine` has failed; `policy_engine` samples from then on."""
    weights_changed: bool = False
    """Whether the policy has changed since the engine took its weights over."""

    @property
    def is_external(self) -> bool:
        """Whether the settings name another engine than the policy itself."""
        return not self.engine.is_policy

    def start(self, poll: Callable[[], None]) -> None:
        """Start the engine.

        Args:
            poll: Is called while waiting; what it raises ends the wait.

        Raises:
            UserError: If the engine does not start and the settings do not let the policy take
                over.
        """
        self.policy_engine.start(self.roles.policy, poll)
        if not self.is_external:
            return
        self.say(f"starting {self.name}")
        try:
            self.engine.start(self.roles.policy, poll)
        except EngineLost as lost:
            self._give_up()
            if self.rules.stop_if_lost:
                remedy = f"see launch.{self.name} and its log"
                if "No module named 'vllm'" in str(lost):
                    remedy = INSTALL
                raise UserError(f"ppo.rollout.engine: {lost}; {remedy}") from lost
            self.say(f"{lost}; the policy samples by itself from now on")

    def rollout(
        self,
        prompts: Sequence[DrawnPrompt],
        step: int,
        *,
        recompute: bool,
        stream: str = "rollout",
        samples_per_prompt: int | None = None,
        poll: Callable[[], None] = no_poll,
    ) -> Rollout:
        """Sample responses to prompts, and run every model over them.

        Args:
            prompts: The prompts.
            step: Index of the update.
            recompute: Compute log-probabilities again even if the policy itself samples.
            stream: Name of a stream of random numbers. A response is drawn by run, stream, update,
                prompt and index of the sample.
            samples_per_prompt: By default as the settings say.
            poll: Is called between tokens and micro-batches; what it raises ends the rollout.

        Raises:
            EngineLost: If the engine fails and the settings do not let the policy take over.
        """
        sampling = self.sampling
        if samples_per_prompt is not None:
            sampling = replace(sampling, samples_per_prompt=samples_per_prompt)

        def collect_with(engine: RolloutEngine, recompute: bool) -> Rollout:
            seed = (self.seed, stream, step)
            return collect(
                self.roles, self.scorer, engine, sampling, prompts, seed=seed, recompute=recompute, poll=poll
            )

        if self.is_lost or not self.is_external:
            return collect_with(self.policy_engine, recompute)
        try:
            if self.weights_changed:
                self.engine.update_weights(self.roles.policy)
                self.weights_changed = False
            rollout = collect_with(self.engine, recompute=True)
            self._check_distribution(rollout)
            return rollout
        except EngineLost as lost:
            self._give_up()
            if self.rules.stop_if_lost:
                where = f"update {step}" if stream == "rollout" else f"{stream} samples"
                raise EngineLost(
                    f"{where}: {lost}; run again to resume, if need be with ppo.rollout.engine=transformers "
                    f"--override-config"
                ) from lost
            self.say(f"{lost}; the policy samples by itself from now on")
            return collect_with(self.policy_engine, recompute=True)

    def close(self) -> None:
        """Free what engine and scorers hold, and remove its log, which only a failed run needs."""
        self.engine.close()
        self.scorer.close()
        self.log.unlink(missing_ok=True)

    def _give_up(self) -> None:
        self.engine.close()
        self.is_lost = True

    def _check_distribution(self, rollout: Rollout) -> None:
        """Raise EngineLost if the engine has not sampled from the policy's distribution."""
        limit = self.rules.max_engine_kl
        # rank 0 decides for all; others could differ in the last bit
        kl = parallel.from_rank_zero(lambda: rollout.engine_kl)
        # a policy whose log-probabilities are not finite is not the engine's fault
        policy_is_finite = bool(masked_sum(rollout.logprobs, rollout.mask).isfinite())
        if not kl <= limit and policy_is_finite:  # `not <=` is also true of NaN
            raise EngineLost(
                f"the engine {self.name} does not sample from the policy's distribution: KL to the policy is {kl:.2g} "
                f"nats a token, and ppo.rollout.max_engine_kl is {limit:g}"
            )


def make_sampler(
    roles: Roles,
    scorer: WeightedSum,
    sampling: Sampling,
    rules: EngineRules,
    seed: int,
    name: str,
    spec: EngineSpec,
    say: Callable[[str], None],
) -> Sampler:
    """Return the sampler of a run, not started yet.

    Args:
        roles: The models.
        scorer: Scores the responses.
        sampling: How rollouts are sampled and scored.
        rules: When the engine counts as lost.
        seed: The experiment's seed.
        name: Name of the engine, as in `ENGINES`.
        spec: What the engine is built from.
        say: Prints a line.
    """
    engine = ENGINES[name](spec)
    policy_engine = engine if engine.is_policy else TransformersEngine(spec)
    return Sampler(roles, scorer, sampling, rules, seed, name, engine, policy_engine, spec.log, say)


def preflight(
    sampler: Sampler,
    prompts: Sequence[DrawnPrompt],
    *,
    dtype: str,
    max_length: int,
    step: int = 0,
    poll: Callable[[], None] = no_poll,
    from_reference: bool = True,
) -> bool:
    """Check that the update repeats the rollout's numbers (ratio 1), and that KL starts at 0.

    Args:
        sampler: The run's sampler, started.
        prompts: A few training prompts.
        dtype: what the models compute in (float32, bfloat16, float16), which sets the tolerance.
        max_length: The longest prompt and response together, in tokens.
        step: Index of the update that the run is at; KL to the reference is only checked at 0.
        poll: Is called between tokens and micro-batches.
        from_reference: Whether the policy starts as the reference; not with ppo.start_from.

    Returns:
        Whether log-probabilities must be computed again after sampling, because the sampler's
        differ.

    Raises:
        UserError: If the sampler draws from another distribution, the forward pass is not
            repeatable, or policy and reference differ before the first update.
    """
    roles, say = sampler.roles, sampler.say
    # float16 rounds an eighth of what bfloat16 does: what holds for that, holds for it
    limit = 1e-4 if dtype == "float32" else 2e-2
    eager = "use model.attn_implementation: eager"
    sampler_remedy, update_remedy = eager, f"{eager} or model.dtype: float32"
    bound = bound_of_short_rows(roles.policy.config.to_dict())
    if bound is not None and max_length > bound:
        sampler_remedy = f"set ppo.max_length: {bound}; in longer rows the positions of this model change throughout"
        update_remedy = sampler_remedy
    # the sampler's own log-probabilities first, which cost nothing; an external engine's are never
    # used
    for recompute in (True,) if sampler.is_external else (False, True):
        rollout = sampler.rollout(prompts, step, stream="preflight", recompute=recompute, poll=poll)
        difference = ratio_error(roles, rollout, sampler.sampling)
        if difference <= limit:
            break
        if not recompute and not difference <= 10 * limit:
            raise UserError(
                f"ppo preflight: the sampler's probabilities differ from the model's by {difference:.2g} a token "
                f"(limit {10 * limit:g}), so it draws from another distribution; {sampler_remedy}"
            )
    else:
        raise UserError(
            f"ppo preflight: the ratio at the first minibatch would differ from 1 by {difference:.2g} a token (limit "
            f"{limit:g}), because the forward pass is not repeatable; {update_remedy}"
        )
    kl = masked_mean((rollout.logprobs - rollout.ref_logprobs).abs(), rollout.mask).item()
    if step == 0 and from_reference and not kl <= limit:
        raise UserError(
            f"ppo preflight: KL to the reference is {kl:.2g} nats a token before the first update and must be 0, so "
            f"policy and reference are different models; redo sft (--force) and run again"
        )
    if recompute and not sampler.is_external:
        say("the sampler's log-probabilities differ from the update's; they are computed again after sampling")
    return recompute


def ratio_error(roles: Roles, rollout: Rollout, sampling: Sampling) -> float:
    """Return the mean |ratio − 1| a token between a rollout and the forward pass of an update.

    Args:
        roles: The models.
        rollout: B episodes with the log-probabilities that the update would divide by.
        sampling: Temperature and micro-batches.
    """
    # as in the update: with gradients, and with other rows together than in the rollout
    order = range(len(rollout.responses))[::-1]
    micro_batches = in_micro_batches(
        rollout.lengths(), order, sampling.samples_per_prompt, sampling.micro_batch_size, roles.most_tokens()
    )
    logprobs = torch.zeros_like(rollout.logprobs)
    with roles.accelerator.autocast():
        for index in micro_batches:
            rows = rollout.rows(index, roles.tokenizer.pad_token_id, roles.packed)
            update_logprobs = response_logprobs(roles.policy, rows, sampling.temperature).detach()
            logprobs[torch.tensor(index, device=logprobs.device), : update_logprobs.shape[1]] = update_logprobs
    error = masked_mean(((logprobs - rollout.logprobs).exp() - 1).abs(), rollout.mask).item()
    # rank 0 decides for all; others could differ in the last bit
    return parallel.from_rank_zero(lambda: error)
