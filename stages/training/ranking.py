"""Train and evaluate a reward model on ranked prompt groups: its batches, loss and scores."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from data.group_rows import has_pair
from data.groups import GroupBatch, Pair, PromptGroup, batch_groups
from pipeline.launch import parallel
from stages.evaluation.statistics import rights
from stages.models.forward import response_scores
from stages.models.sharding import is_sharded
from stages.objectives.losses import plackett_luce_loss, ranking_loss
from stages.scorers.reward_model import RewardModelScorer
from stages.scorers.scorer import ScorerSpec
from stages.settings.rm import RMSettings
from stages.shared.runtime import Runtime
from stages.training.batching import GroupBatches
from stages.training.loop import Task
from stages.training.readings import Figure, Share, read_sums
from stages.training.ties import TieModel


@dataclass(frozen=True)
class RankingModel:
    """A reward model in training, and how it computes."""

    model: nn.Module
    """The reward model."""
    pad_id: int
    """Id of the padding."""
    runtime: Runtime
    """How the stage computes."""
    ties: TieModel | None = None
    """The loss that counts ties; None where ties are left out."""

    def scores(self, groups: Sequence[PromptGroup]) -> tuple[GroupBatch, Tensor]:
        """Return the batch of some groups, and the scores (N,) of its responses."""
        batch = batch_groups(groups, self.pad_id, packed=self.runtime.packed).to(self.runtime.accelerator.device)
        with self.runtime.accelerator.autocast():
            return batch, response_scores(self.model, batch.rows)

    def loss(
        self, config: RMSettings, groups: Sequence[PromptGroup], batch: GroupBatch, scores: Tensor, prompts: int
    ) -> tuple[Tensor, dict[str, Figure]]:
        """Compute the loss of a micro-batch, divided by the prompts of the whole batch.

        Args:
            config: The stage's settings.
            groups: The micro-batch.
            batch: The same as tensors.
            scores: Score of each response, (N,).
            prompts: Prompts of the batch.

        Returns:
            The loss, and figures of ties to sum over the batch; none where ties are left out.
        """
        if self.ties is None:
            return loss_of(config, batch, scores, prompts), {}
        return self.ties.loss(groups, scores, prompts, by_choices=config.ranking_weight == "choices")

    def scorer(self, batch_size: int) -> RewardModelScorer:
        """Return what scores responses by this model, as PPO and evaluate do.

        Args:
            batch_size: Responses of a forward pass.
        """
        return RewardModelScorer(ScorerSpec(self.model, self.pad_id, self.runtime.accelerator, batch_size))


def ranking_task(
    config: RMSettings,
    ranker: RankingModel,
    groups: Sequence[PromptGroup],
    held: Sequence[PromptGroup],
    order: list[int],
) -> Task:
    """Return the batches, the loss and the evaluation of a reward model.

    Args:
        config: The stage's settings.
        ranker: The model.
        groups: The groups to train on.
        held: The held-out groups.
        order: Indices of the groups of all batches.
    """

    paired = has_pair(groups)  # a prompt with ties only has no accuracy

    def loss(rows: list[int], whole: Sequence[int]) -> tuple[Tensor, dict[str, Figure]]:
        members = [groups[i] for i in rows]
        batch, scores = ranker.scores(members)
        value, figures = ranker.loss(config, members, batch, scores, len(whole))
        margins = (scores[batch.winners] - scores[batch.losers]).detach()
        weight = sum(paired[i] for i in rows) / max(1, sum(paired[i] for i in whole))
        return value, {
            "loss": value,
            "accuracy": Share(batch.mean((margins > 0).float()), weight),
            "margin": Share(batch.mean(margins), weight),
            **figures,
        }

    def evaluate_held_out(poll: Callable[[], None]) -> dict[str, float]:
        found = evaluate(config, ranker, held, poll)
        margins = found.margins
        figures = {"loss": found.loss, "accuracy": float(rights(margins).mean()), "margin": sum(margins) / len(margins)}
        return figures | found.ties | (ranker.ties.figures() if ranker.ties else {})

    batches = batches_of(config, ranker, groups)
    return Task(
        order=order,
        batch_size=config.per_device_train_batch_size * config.gradient_accumulation_steps,
        costs=batches.tokens,
        cut=batches.to_train,
        loss=loss,
        evaluate=evaluate_held_out,
    )


def batches_of(config: RMSettings, ranker: RankingModel, groups: Sequence[PromptGroup]) -> GroupBatches:
    """Return how batches of some groups are cut.

    Args:
        config: The stage's settings.
        ranker: The model; it packs rows or not.
        groups: The groups.
    """
    return GroupBatches(
        groups, config.per_device_train_batch_size, config.per_device_train_tokens, ranker.runtime.packed
    )


def loss_of(c: RMSettings, batch: GroupBatch, scores: Tensor, prompts: int) -> Tensor:
    """Compute the loss of a micro-batch without ties, divided by the prompts of the whole batch.

    Args:
        c: The stage's settings.
        batch: The micro-batch: pairs, choices and their weights.
        scores: Score of each response, (N,).
        prompts: Prompts of the batch.
    """
    pair_weights, choice_weights = batch.pair_weights, batch.choice_weights
    if c.ranking_weight == "choices":
        # a choice weighs 1 / (K − 1) of its ranking, so this makes every choice weigh 1
        pair_weights = pair_weights / choice_weights[batch.choice]
        choice_weights = torch.ones_like(choice_weights)
    if c.loss_type == "plackett_luce":
        return plackett_luce_loss(scores, batch.winners, batch.losers, batch.choice, choice_weights, prompts)
    margins = c.margin_coef * batch.pair_margins
    return ranking_loss(scores, batch.winners, batch.losers, pair_weights, prompts, margins, c.label_smoothing)


@dataclass(frozen=True)
class HeldOutScores:
    """Hold the scores of a reward model on the held-out rankings."""

    margins: list[float]
    """For each pair, the score of the preferred response minus the other one's."""
    owners: list[tuple[int, Pair]]
    """Of each pair its group's index and the pair itself."""
    loss: float
    """The mean loss of a prompt."""
    ties: dict[str, float] = field(default_factory=dict)
    """`ties` and `ties_expected`, where the loss counts ties."""


@torch.no_grad()
def evaluate(
    config: RMSettings, ranker: RankingModel, held: Sequence[PromptGroup], poll: Callable[[], None] = lambda: None
) -> HeldOutScores:
    """Score all held-out responses, on all ranks together.

    Args:
        config: The stage's settings.
        ranker: The model.
        held: The held-out groups.
        poll: Called between two forward passes; may raise Interrupted.
    """
    parts, costs = batches_of(config, ranker, held).to_evaluate()
    spare = parts[0] if is_sharded(ranker.model) else None

    def evaluate_part(rows: list[int]) -> tuple[list[float], float, dict[str, float]]:
        poll()
        members = [held[i] for i in rows]
        batch, scores = ranker.scores(members)
        value, figures = ranker.loss(config, members, batch, scores, len(held))
        sums, (loss,) = read_sums([figures], value)
        return (scores[batch.winners] - scores[batch.losers]).tolist(), loss, sums

    def evaluate_own(own: list[list[int]]) -> list[tuple[list[float], float, dict[str, float]]]:
        results = []
        for rows, is_own in parallel.padded_micro_batches(own, spare):
            result = evaluate_part(rows)
            if is_own:
                results.append(result)
        return results

    results = parallel.compute_and_all_gather(parts, costs, evaluate_own, idle=spare is not None)
    ties: dict[str, float] = {}
    for _, _, figures in results:
        for key, share in figures.items():
            ties[key] = ties.get(key, 0.0) + share
    return HeldOutScores(
        margins=[margin for margins, _, _ in results for margin in margins],
        owners=[(i, pair) for rows in parts for i in rows for pair in held[i].pairs()],
        loss=sum(value for _, value, _ in results),
        ties=ties,
    )
