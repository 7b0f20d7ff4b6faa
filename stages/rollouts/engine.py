"""Define a rollout engine: the interface of whatever samples responses.

To add one, write a file with a class that has the four methods of `RolloutEngine`, and name its
factory in `engines.ENGINES`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.errors import TrainingStopped


class EngineLost(TrainingStopped):
    """Say that an engine is gone, failed, or samples from another distribution (exit code 3)."""


@dataclass(frozen=True)
class EngineRules:
    """The limit beyond which a rollout engine counts as lost, and the reaction to it."""

    max_engine_kl: float
    """The largest KL(sampler ‖ policy) in nats a token."""
    stop_if_lost: bool
    """Whether the run ends with a checkpoint; otherwise the policy itself samples from then on."""


@dataclass(frozen=True)
class SampleRequest:
    """The responses that an engine is asked for: one for each of B prompts."""

    prompts: list[list[int]]
    """B prompts as token ids; the samples of a prompt stand next to each other."""
    seeds: list[int]
    """B seeds. A response depends only on its prompt, its seed and the weights."""
    samples_per_prompt: int
    """How many consecutive entries of `prompts` are the same prompt."""
    response_length: int
    """The longest response in tokens, EOS included."""
    temperature: float
    """Divides the logits; 0: the likeliest token at each position."""
    eos_id: int
    """The token that ends a response, and the only one that does."""
    top_k: int | None = None
    """Draw only from so many of the likeliest tokens; None: from all."""
    top_p: float | None = None
    """Draw only from the smallest set of the likeliest tokens that has this probability, within
    those of `top_k`; None: from all."""


@dataclass(frozen=True)
class Sampled:
    """B sampled responses and what the sampler computed with them."""

    responses: list[list[int]]
    """Token ids, up to and including EOS where the response has one."""
    logprobs: Tensor
    """(B, R) log-probabilities of the tokens in the distribution that they were drawn from, after
    temperature, `top_k` and `top_p`; 0 after the end of a response."""
    entropy: Tensor
    """(B, R) entropies in nats before each token; 0 after the end, and where an engine has none."""


@dataclass(frozen=True)
class EngineSpec:
    """What a factory may build its engine from."""

    model: Path
    """Folder of the model that the policy was loaded from."""
    scratch: Path
    """Folder for the engine's temporary files. It does not exist yet; `close` removes it."""
    log: Path
    """File for the engine's own output. It outlives `close`."""
    device: torch.device
    """Device of the policy."""
    dtype: str
    """"float32", "bfloat16" or "float16": what the policy computes in."""
    autocast: Callable[[], Any]
    """Returns a context manager in which the policy computes in `dtype`."""
    pad_id: int
    """Token id that pads rows."""
    max_length: int
    """The longest prompt and response together, in tokens."""
    batch_size: int
    """How many responses to sample at a time."""
    timeout: float
    """Seconds without an answer after which an engine in another process counts as lost."""
    trust_remote_code: bool = False
    """Whether code that the model brings may run."""
    other_models: bool = False
    """Whether weights of other models than the first one will follow (evaluate)."""
    launch: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the section launch.ENGINE; empty where there is none."""


class RolloutEngine(Protocol):
    """Sample responses with the policy's weights. All ranks call each method together."""

    is_policy: bool
    """Whether it samples with the policy's own forward pass.

    Otherwise PPO computes the log-probabilities of the samples again and watches the KL between
    both."""

    def start(self, model: torch.nn.Module, poll: Callable[[], None]) -> None:
        """Get ready to sample with the weights of `model`.

        Args:
            model: The policy.
            poll: Is called while waiting; what it raises ends the wait (a signal has come).

        Raises:
            EngineLost: If the engine does not start.
        """

    def update_weights(self, model: torch.nn.Module) -> None:
        """Take over the weights of `model`, which have changed.

        Raises:
            EngineLost: If the engine cannot take them.
        """

    def sample(self, request: SampleRequest, poll: Callable[[], None]) -> Sampled:
        """Return one response to each prompt of the request, the same on all ranks.

        Args:
            request: Prompts, seeds and limits.
            poll: Is called between tokens or while waiting; what it raises ends the sampling.

        Raises:
            EngineLost: If there is no answer, or none that fits the request.
        """

    def close(self) -> None:
        """Free what the engine holds, and remove its temporary files. May be called twice."""
