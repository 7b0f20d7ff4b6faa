"""Score responses by a reward model, or by an ensemble of them."""

import torch

from stages.models.forward import response_scores, score_all
from stages.scorers.scorer import ScoreRequest, ScorerSpec, Scores


class RewardModelScorer:
    """Score a response by the reward model's head at its last token, minus `reward_bias`."""

    reads_rows = True

    def __init__(self, spec: ScorerSpec) -> None:
        self.spec = spec

    @torch.no_grad()
    def score(self, request: ScoreRequest) -> Scores:
        """Return the scores: where the rows are if the request has rows, otherwise on the CPU.

        Args:
            request: Prompts and responses. Without rows, the responses are laid out here, those of
                similar length together.
        """
        spec = self.spec
        if request.rows is not None:
            with spec.accelerator.autocast():
                return Scores(response_scores(spec.reward_model, request.rows))
        scores = score_all(
            spec.reward_model,
            request.prompts,
            request.responses,
            pad_id=spec.pad_id,
            batch_size=spec.batch_size,
            accelerator=spec.accelerator,
            packed=spec.packed,
        )
        return Scores(scores)

    def close(self) -> None:
        """Do nothing: the model is the caller's."""
