"""Define a scorer: the interface of whatever gives a response its score.

To add a kind, declare its settings in `stages/settings/scorers/`, write a file here with a class
that has what `Scorer` has, and name its factory in `scorers.FACTORIES`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from data.encode import decode_response
from data.groups import Rows
from data.records import as_messages
from pipeline.errors import TrainingStopped
from stages.scorers.text_reader import TextReader
from stages.settings.scorers.common import ScorerSection


class ScorerLost(TrainingStopped):
    """Say that a scorer is gone or has failed: the run saves and ends (exit code 3)."""


class ScorerDropped(Exception):
    """Say that a scorer has failed and that the settings go on without it (`on_failure: drop`).

    What it scores for all ranks in this rollout is then left out of the sum."""


def no_poll() -> None:
    """Do nothing while a scorer waits."""


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
    data_rows: Sequence[Mapping[str, Any]] | None = None
    """The row of data of each response's prompt: `prompt`, a text or messages, and all other keys
    that the row has (`answer`, `constraints`, …). None where only ids are known."""
    places: Sequence[str] | None = None
    """The location of each of these rows (file and line), for error lines; None: not known."""
    poll: Callable[[], None] = no_poll
    """Call it now and then while waiting; what it raises ends the scoring (a signal has come)."""

    def prompt_texts(self) -> list[str]:
        """Return the B prompts as text, with what the chat template puts around them."""
        return [self.tokenizer.decode(ids) for ids in self.prompts]

    def conversations(self) -> list[list[dict[str, str]]]:
        """Return the B prompts as messages {role, content}.

        Raises:
            ValueError: If the rows of data are not known.
        """
        if self.data_rows is None:
            raise ValueError("the rows of data of these prompts are not known")
        return [as_messages(row["prompt"]) for row in self.data_rows]

    def response_texts(self) -> list[str]:
        """Return the B responses as text, without special tokens."""
        return [decode_response(self.tokenizer, ids) for ids in self.responses]

    def finished(self) -> list[bool]:
        """Return whether each of the B responses ends with EOS."""
        eos = self.tokenizer.eos_token_id
        return [bool(ids) and ids[-1] == eos for ids in self.responses]


@dataclass(frozen=True)
class Scores:
    """The scores of B responses."""

    total: Tensor
    """(B,) in float32: what counts. It has no gradient. NaN where a scorer of texts does not apply
    to a response: it then adds nothing to a weighted sum."""
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    """Name → (B,): what the total was made of, as far as the scorer says; for metrics and samples
    only."""


def part_columns(parts: Sequence[Mapping[str, float]]) -> dict[str, Tensor]:
    """Return named parts of B responses as name → (B,); NaN where a response has no such part.

    Args:
        parts: The parts of each response, by name.
    """
    names = dict.fromkeys(name for one in parts for name in one)
    return {name: torch.tensor([one.get(name, torch.nan) for one in parts]) for name in names}


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
    settings: ScorerSection | None = None
    """The scorer's settings; None for a reward model that no list of scorers names."""
    name: str = "rm"
    """The scorer's name, for error lines."""
    records: Path | None = None
    """Folder for answers that a resumed run must get again; it stays and goes with the checkpoints
    of the run, among which it is. None: nothing is recorded."""
    say: Callable[[str], None] = print
    """Prints a line."""
    trust_remote_code: bool = False
    """Whether code that a model brings may run."""
    text_reader: TextReader | None = None
    """How the reward model reads texts, where its tokenizer is not the policy's."""


class Scorer(Protocol):
    """Score responses. Scores are comparable between prompts, and higher is better."""

    reads_rows: bool
    """Whether it runs a model over rows of ids.

    Then PPO asks for a micro-batch at a time, beside its other models; with sharded models all
    ranks ask equally often, and may ask for responses whose scores they drop. Otherwise PPO asks
    once a rollout for this rank's share of the responses, or not at all if that is empty, and the
    request has `data_rows`."""

    def score(self, request: ScoreRequest) -> Scores:
        """Return the scores of a request's responses.

        A score depends only on its own prompt and response, not on the others of the request. It is
        finite, or NaN where a scorer of texts does not apply.

        Args:
            request: Prompts and responses.

        Raises:
            ScorerLost: If it cannot score for now; a later run may go on.
            ScorerDropped: If it cannot score, and the sum shall do without it; only where
                `may_drop` is true.
            UserError: If the user has to change something, such as a function that fails.
        """

    def close(self) -> None:
        """Free what the scorer holds. May be called twice."""
