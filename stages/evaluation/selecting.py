"""Choose the best of n samples by a scorer of the settings (`evaluate.best_of_by`)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.errors import UserError
from stages.evaluation.forms import Answer
from stages.evaluation.prompts import EvaluationPrompts
from stages.scorers.scorer import Scorer, ScoreRequest, ScorerSpec
from stages.scorers.scorers import make_scorer
from stages.settings.scorers.common import ScorerSection
from stages.settings.scorers.scorer import names_of


@dataclass(frozen=True)
class Selector:
    """Score samples, to choose the best of each prompt."""

    name: str
    """The scorer's name."""
    scorer: Scorer
    """What scores."""
    rows: Mapping[tuple[int, ...], Mapping[str, Any]]
    """Ids of a prompt through the chat template → its row of data."""
    tokenizer: Any
    """The tokenizer of these ids."""
    poll: Callable[[], None]
    """Is called while the scorer waits; raises if the run is to stop."""

    def scores(self, chat_ids: Sequence[Sequence[int]], answers: Sequence[Answer]) -> Tensor:
        """Return the scores (B,) of answers, on the CPU.

        Args:
            chat_ids: The ids of each answer's prompt through the chat template.
            answers: B answers.

        Raises:
            ScorerLost: If the scorer does not answer for now.
            UserError: If a score is not finite.
        """
        request = ScoreRequest(
            chat_ids,
            [answer.response for answer in answers],
            self.tokenizer,
            data_rows=[self.rows[tuple(ids)] for ids in chat_ids],
            poll=self.poll,
        )
        scores = self.scorer.score(request).total.float().cpu()
        if not scores.isfinite().all():
            raise UserError(f"evaluate.best_of_by: {self.name} gives a response no finite score; choose by another")
        return scores


def make_selector(
    settings: ScorerSection,
    prompts: EvaluationPrompts,
    tokenizer: Any,
    *,
    accelerator: Any,
    batch_size: int,
    records: Path,
    poll: Callable[[], None],
    trust_remote_code: bool,
) -> Selector:
    """Return what chooses by a scorer.

    Args:
        settings: Of the scorer.
        prompts: The evaluation prompts.
        tokenizer: The policies' tokenizer.
        accelerator: accelerate's Accelerator: device and precision of models.
        batch_size: The most rows in a forward pass.
        records: Folder for answers that a resumed run must get again.
        poll: Is called while the scorer waits.
        trust_remote_code: Whether code that a model brings may run.
    """
    (name,) = names_of([settings])
    spec = ScorerSpec(
        reward_model=None,
        pad_id=tokenizer.pad_token_id,
        accelerator=accelerator,
        batch_size=batch_size,
        settings=settings,
        name=name,
        records=records / "best_of_by",
        trust_remote_code=trust_remote_code,
    )
    rows = {tuple(ids): row for ids, row in zip(prompts.chat_ids, prompts.rows, strict=True)}
    return Selector(name, make_scorer(spec), rows, tokenizer, poll)
