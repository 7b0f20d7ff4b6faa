"""Define the record of one PPO iteration's episodes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from data.groups import Rows, make_rows


@dataclass(frozen=True)
class DrawnPrompt:
    """A prompt that responses are sampled to."""

    ids: Sequence[int]
    """Token ids through the chat template."""
    index: int
    """Its index in the list that it was drawn from; with the seed it decides the responses."""
    data_row: Mapping[str, Any] | None = None
    """Its row of data with all keys, which scorers of texts read; None where only ids are known."""
    place: str = ""
    """The location of that row (file and line), for error lines."""


@dataclass(frozen=True)
class Rollout:
    """B episodes, frozen.

    Example: the prompt "what color is the fox ?" with the response "red . <end>" has R = 3."""

    prompts: list[list[int]]
    """B prompts as token ids."""
    responses: list[list[int]]
    """B responses as token ids, EOS included where the response has one."""
    prompt_ids: list[int]
    """B indices into the list of prompts that were sampled from."""
    mask: Tensor
    """(B, R) True for each response token: for "red", "." and "<end>"."""
    logprobs: Tensor
    """(B, R) log π_old(y_t | x, y_<t)."""
    ref_logprobs: Tensor
    """(B, R) the same under the reference policy."""
    values: Tensor
    """(B, R) V of the state before each token; 0 without a value model."""
    entropy: Tensor
    """(B, R) entropy of π_old before each token, in nats."""
    scores: Tensor
    """(B,) score at the last token, after `reward_bias`, clipping, missing EOS, length penalty."""
    finished: Tensor
    """(B,) True where the response ends with EOS."""
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    """Name of a scorer, or NAME/PART → (B,) its scores before weights and rules; empty where only
    the reward model scores."""
    dropped: tuple[str, ...] | None = None
    """Names of the scorers that failed and are left out of `scores`; None where none may be."""
    sampler_logprobs: Tensor | None = None
    """(B, R) log μ(y_t | x, y_<t) of the distribution that was sampled from, where `logprobs` were
    computed again; None where they are the sampler's own."""
    engine_kl: float = 0.0
    """KL(sampler ‖ π_old) in nats a token; 0 where `logprobs` are the sampler's own."""

    def rows(self, index: Sequence[int], pad_id: int, packed: bool) -> Rows:
        """Return the episodes of `index`, laid out for a forward pass on the rollout's device."""
        prompts = [self.prompts[i] for i in index]
        responses = [self.responses[i] for i in index]
        return make_rows(prompts, responses, pad_id, packed=packed).to(self.mask.device)

    def lengths(self) -> list[int]:
        """Return the tokens of each episode, prompt and response together."""
        return [len(p) + len(r) for p, r in zip(self.prompts, self.responses, strict=True)]
