"""Score responses by a reward model, or by an ensemble of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from stages.models.forward import response_scores, score_all
from stages.scorers.scorer import ScoreRequest, ScorerSpec, Scores

BETWEEN_POLLS = 8
"""Forward passes over texts between two looks at whether a signal has come."""


class RewardModelScorer:
    """Score a response by the reward model's head at its last token, minus `reward_bias`.

    A reward model with another tokenizer than the policy's reads the texts of a request, not ids.
    """

    def __init__(self, spec: ScorerSpec) -> None:
        self.spec = spec
        self.reads_rows = spec.text_reader is None
        self.pad_id = spec.pad_id if spec.text_reader is None else spec.text_reader.tokenizer.pad_token_id

    @torch.no_grad()
    def score(self, request: ScoreRequest) -> Scores:
        """Return the scores: where the rows are if the request has rows, otherwise on the CPU.

        Args:
            request: Prompts and responses. Without rows, the responses are laid out here, those of
                similar length together. A reward model that reads texts needs `data_rows`.
        """
        spec = self.spec
        if request.rows is not None and self.reads_rows:
            with spec.accelerator.autocast():
                return Scores(response_scores(spec.reward_model, request.rows))
        if spec.text_reader is None:
            return Scores(self.score_ids(request.prompts, request.responses))
        answers = list(zip(request.response_texts(), request.finished(), strict=True))
        prompts, responses = spec.text_reader.encode(request.conversations(), answers, request.places)
        scores = []
        for start in range(0, len(prompts), BETWEEN_POLLS * spec.batch_size):
            request.poll()
            part = slice(start, start + BETWEEN_POLLS * spec.batch_size)
            scores.append(self.score_ids(prompts[part], responses[part]))
        return Scores(torch.cat(scores))

    def score_ids(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Tensor:
        """Return the scores (B,) of responses, on the CPU.

        Args:
            prompts: B prompts, as ids that the reward model reads.
            responses: B responses.
        """
        spec = self.spec
        return score_all(
            spec.reward_model,
            prompts,
            responses,
            pad_id=self.pad_id,
            batch_size=spec.batch_size,
            accelerator=spec.accelerator,
            packed=spec.packed,
        )

    def close(self) -> None:
        """Do nothing: the model is the caller's."""
