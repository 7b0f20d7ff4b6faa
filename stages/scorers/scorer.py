"""Define a scorer: the interface of whatever gives a response its score.

To add one, write a file with a class that has the method of `Scorer`, and name its factory in
`scorers.SCORERS`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from data.encode import decode_response
from data.groups import Rows


@dataclass(frozen=True)
class ScoreRequest:
    """B responses that are to be scored, as ids and as text."""

    prompts: Sequence[Sequence[int]]
    """The prompt of each response, as token ids through the chat template."""
    responses: Sequence[Sequence[int]]
    """Token ids, up to and including EOS where the response has one."""
    tokenizer: Any
    """The tokenizer of these ids, which is the policy's."""
    rows: Rows | None = None
    """The same responses laid out for a forward pass, on the models' device.

    None unless the caller has them: PPO lays a micro-batch out once for all of its models."""

    def prompt_texts(self) -> list[str]:
        """Return the B prompts as text, with what the chat template puts around them."""
        return [self.tokenizer.decode(ids) for ids in self.prompts]

    def response_texts(self) -> list[str]:
        """Return the B responses as text, without special tokens."""
        return [decode_response(self.tokenizer, ids) for ids in self.responses]


@dataclass(frozen=True)
class ScorerSpec:
    """What a factory may build its scorer from."""

    reward_model: nn.Module | None
    """The reward model or Ensemble that the caller has loaded, frozen; None if there is none."""
    pad_id: int
    """Token id that pads rows."""
    accelerator: Any
    """accelerate's Accelerator: the models' device, and in which dtype to compute."""
    batch_size: int
    """The most responses in a forward pass, where a request comes without rows."""
    packed: bool = False
    """Whether the models read packed rows."""


class Scorer(Protocol):
    """Score responses. Scores are comparable between prompts, and higher is better."""

    def score(self, request: ScoreRequest) -> Tensor:
        """Return the score of each response of a request, (B,) in float32.

        A score depends only on its own prompt and response, not on the others of the request. It
        has no gradient, and is finite: PPO skips an update with any other. Each rank asks for its
        own share of the responses. With sharded models all ranks ask equally often, and may then
        ask for responses whose scores they drop.

        Args:
            request: Prompts and responses.
        """
