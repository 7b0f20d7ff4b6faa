"""Sample from policies that do not change, one after the other, by the engine that settings name.

The stages rankings and evaluate sample this way: the policy itself by default, each rank its share
of the prompts, or vLLM, which then gets the weights of each policy in turn.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from data.groups import make_rows
from data.streams import derive_seed
from pipeline.errors import UserError
from pipeline.launch import devices, parallel
from stages.models.forward import response_logprobs
from stages.models.packing import reads_packed_rows
from stages.models.precision import require_finite
from stages.models.sharding import is_sharded
from stages.objectives.rewards import kl_per_token
from stages.rollouts.engine import EngineLost, EngineRules, EngineSpec, RolloutEngine, Sampled, SampleRequest
from stages.rollouts.engines import ENGINES
from stages.rollouts.transformers import TransformersEngine
from stages.settings.rollout import INSTALL

CHECKED_PROMPTS = 16
"""Prompts on which another engine's distribution is compared with the policy's."""
CHECKED_TOKENS = 64
"""Tokens of each of those responses."""
CHECKED_AT_A_TIME = 4
"""Of those responses, how many are in a forward pass."""


@dataclass
class FrozenSampler:
    """An engine, and which policy's weights it holds. All ranks call its methods together."""

    stage: str
    """Name of the stage; its section `rollout` names the engine."""
    name: str
    """Name of the engine, as in `ENGINES`."""
    spec: EngineSpec
    """What engines are built from."""
    rules: EngineRules
    """When the engine counts as lost, and what happens then."""
    say: Callable[[str], None]
    """Prints a line."""
    engine: RolloutEngine = field(init=False)
    """The engine; it starts when it is first needed."""
    holds: str | None = None
    """Name of the policy whose weights another engine holds; None before its start."""
    is_lost: bool = False
    """Whether another engine has failed; the policy itself samples from then on."""

    def __post_init__(self) -> None:
        """Build the engine without starting it."""
        self.engine = ENGINES[self.name](self.spec)

    def sample(
        self, policy: str, model: nn.Module, request: SampleRequest, batch_size: int, poll: Callable[[], None]
    ) -> list[list[int]]:
        """Return a response to each prompt of a request, as token ids, the same on all ranks.

        Args:
            policy: Name of the policy.
            model: The policy, whole or sharded.
            request: Prompts, seeds and limits.
            batch_size: The most responses that a process samples at a time, where the policy
                itself samples.
            poll: Is called between tokens or while waiting; what it raises ends the sampling.

        Raises:
            EngineLost: The engine fails, and the settings do not let the policy take over.
            UserError: It does not start, or the policy's own log-probabilities are not finite.
        """
        if not self.engine.is_policy and not self.is_lost:
            try:
                self._hold(policy, model, request, poll)
                return self.engine.sample(request, poll).responses
            except EngineLost as lost:
                self._give_up(lost)
        own = TransformersEngine(replace(self.spec, batch_size=batch_size))
        own.start(model, poll)
        sampled = own.sample(request, poll)
        require_finite(sampled.logprobs, f"{self.stage}: log-probabilities of what {policy} samples")
        return sampled.responses

    def close(self) -> None:
        """Free what the engine holds, and remove its log, which only a failed run needs."""
        self.engine.close()
        self.spec.log.unlink(missing_ok=True)

    def _hold(self, policy: str, model: nn.Module, request: SampleRequest, poll: Callable[[], None]) -> None:
        """Let another engine take over a policy's weights, unless it holds them already.

        Raises:
            EngineLost: It fails, or samples from another distribution.
            UserError: It does not start, and the settings do not let the policy take over.
        """
        if self.holds == policy:
            return
        if self.holds is None:
            self.say(f"starting {self.name}")
            try:
                self.engine.start(model, poll)
            except EngineLost as lost:
                if not self.rules.stop_if_lost:
                    raise
                self.engine.close()
                remedy = f"see launch.{self.name} and its log"
                if "No module named 'vllm'" in str(lost):
                    remedy = INSTALL
                raise UserError(f"{self.stage}.rollout.engine: {lost}; {remedy}") from lost
        else:
            self.engine.update_weights(model)
        self.holds = policy
        self._check_distribution(policy, model, request, poll)

    def _give_up(self, lost: EngineLost) -> None:
        """Close an engine that failed.

        Raises:
            EngineLost: The settings do not let the policy take over.
        """
        self.engine.close()
        self.is_lost = True
        if self.rules.stop_if_lost:
            remedy = f"run again to resume, if need be with {self.stage}.rollout.engine=transformers --override-config"
            raise EngineLost(f"{self.stage}: {lost}; {remedy}") from lost
        self.say(f"{lost}; the policy samples by itself from now on")

    def _check_distribution(
        self, policy: str, model: nn.Module, request: SampleRequest, poll: Callable[[], None]
    ) -> None:
        """Raise EngineLost if the engine does not sample from the policy's distribution.

        It samples a few prompts of the request, at temperature 1 and from the whole vocabulary.
        """
        first = range(0, len(request.prompts), request.samples_per_prompt)[:CHECKED_PROMPTS]
        few = SampleRequest(
            prompts=[request.prompts[i] for i in first],
            seeds=[derive_seed("engine check", i) for i in first],
            samples_per_prompt=1,
            response_length=min(request.response_length, CHECKED_TOKENS),
            temperature=1.0,
            eos_id=request.eos_id,
        )
        kl, limit = engine_kl(model, self.engine.sample(few, poll), few.prompts, self.spec), self.rules.max_engine_kl
        if not kl <= limit:  # also true of NaN
            raise EngineLost(
                f"the engine {self.name} does not sample from {policy}'s distribution: KL to it is {kl:.2g} nats a "
                f"token, and {self.stage}.rollout.max_engine_kl is {limit:g}"
            )


@torch.no_grad()
def engine_kl(model: nn.Module, sampled: Sampled, prompts: list[list[int]], spec: EngineSpec) -> float:
    """Return KL(sampler ‖ policy) in nats a token, estimated from samples (k3), on all ranks alike.

    Args:
        model: The policy.
        sampled: Responses at temperature 1 with the sampler's log-probabilities.
        prompts: Their prompts as token ids.
        spec: Device, autocast and padding.
    """
    rank, size = parallel.data_rank_and_size()
    mine = list(range(rank, len(prompts), size))
    parts = [mine[i : i + CHECKED_AT_A_TIME] for i in range(0, len(mine), CHECKED_AT_A_TIME)]
    sums = {"kl": 0.0, "tokens": 0.0}
    for part, is_own in parallel.padded_micro_batches(parts, [0] if is_sharded(model) else None):
        responses = [sampled.responses[i] for i in part]
        rows = make_rows([prompts[i] for i in part], responses, spec.pad_id, packed=reads_packed_rows(model))
        rows = rows.to(spec.device)
        with spec.autocast():
            logprobs = response_logprobs(model, rows).float()
        theirs = sampled.logprobs[part, : logprobs.shape[1]].to(logprobs)
        kl = torch.where(rows.response_mask, kl_per_token(theirs, logprobs, "k3"), 0.0)
        if is_own:
            sums["kl"] += devices.in_float64(kl).sum().item()
            sums["tokens"] += int(rows.response_mask.sum())
    sums = parallel.all_reduce_figures(sums)
    return sums["kl"] / sums["tokens"]
