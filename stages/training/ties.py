"""Hold the parameters of losses that count ties, with their first values, figures and loss."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from data.group_rows import most_tied
from data.groups import PromptGroup, moved
from data.ties import compare, judged_ties, ranked_once, tiers
from stages.models.sharding import local_shard, replicate_beside
from stages.objectives.ties import davidson_logprobs, davidson_loss, davidson_luce_logprobs, davidson_luce_loss
from stages.settings.training import TIE_LOSSES, PreferenceTraining
from stages.training.readings import Figure, Share

NAME = "ties.log_strengths"
"""Name of the learned parameter in checkpoints."""
LEARNING_RATE = 0.01
"""Peak learning rate of the log tie strengths where the settings name none."""
LOOKED_AT = 2000
"""Groups that the first values are fitted on."""
SEEN = 0.5
"""Ties of each size that are added to those counted, so that no strength begins at 0."""


@dataclass(frozen=True)
class TieModel:
    """A loss that counts ties, with its parameters."""

    loss_type: str
    """"davidson" or "davidson_luce"."""
    log_strengths: Tensor
    """log δ of ties of 2, 3, … responses, (D − 1,); a parameter where it is learned."""

    @property
    def learned(self) -> dict[str, nn.Parameter]:
        """The parameter to train, by name; nothing where strengths are stated."""
        return {NAME: self.log_strengths} if isinstance(self.log_strengths, nn.Parameter) else {}

    @property
    def here(self) -> Tensor:
        """The log strengths as a plain tensor; beside a sharded model each process has its own."""
        return local_shard(self.log_strengths)

    def loss(
        self, groups: Sequence[PromptGroup], utilities: Tensor, prompts: int, by_choices: bool = False
    ) -> tuple[Tensor, dict[str, Figure]]:
        """Compute the loss of a micro-batch, divided by the prompts of the whole batch.

        Args:
            groups: The micro-batch.
            utilities: Scores of its responses, or β log π/π_ref, (B,).
            prompts: Prompts of the whole batch.
            by_choices: Whether a ranking of K responses weighs K − 1.

        Returns:
            The loss, and figures to sum over the batch: `ties`, the share of a prompt's
            comparisons that are ties, and `ties_expected`, their probability under the model.
        """
        compared = compare(groups, by_choices=by_choices)
        said = compared.to(utilities.device)
        if self.loss_type == "davidson":
            pairs = (said.first, said.second, said.tied)
            value = davidson_loss(utilities, *pairs, said.pair_weights, self.here[0], prompts)
            with torch.no_grad():
                _, tie = davidson_logprobs(utilities[said.first] - utilities[said.second], self.here[0])
                shares = moved({"shares": pair_shares(compared.first, groups)}, utilities.device)["shares"]
                is_tie, expected = said.tied, tie.exp()
        else:
            choices = (said.alternatives, said.is_open, said.chosen)
            value = davidson_luce_loss(utilities, *choices, said.choice_weights, self.here, prompts)
            with torch.no_grad():
                _, single = davidson_luce_logprobs(utilities, *choices, self.here)
                shares, is_tie, expected = said.choice_shares, said.chosen.sum(1) > 1, -torch.expm1(single)
        return value, {
            "ties": Share((shares * is_tie).sum(), divisor=prompts),
            "ties_expected": Share((shares * expected).sum(), divisor=prompts),
        }

    def figures(self) -> dict[str, float]:
        """Return δ of two responses (Davidson's ν), as evaluations.jsonl has it."""
        return {"tie_strength": self.here[0].exp().item()}

    def published(self) -> dict[str, list[float]]:
        """Return δ of ties of 2, 3, … responses, as the manifest has them."""
        return {"tie_strengths": self.here.detach().exp().tolist()}


def pair_shares(first: Tensor, groups: Sequence[PromptGroup]) -> Tensor:
    """Return the share of each pair among the judged pairs of its group, (P,), on the CPU.

    Args:
        first: Row of a response of each pair, (P,), on the CPU.
        groups: The groups whose responses the rows are, in order.
    """
    sizes = torch.tensor([len(group.responses) for group in groups])
    owner = torch.repeat_interleave(torch.arange(len(groups)), sizes)[first]
    return 1.0 / torch.bincount(owner, minlength=len(groups))[owner]


def tie_model(
    section: PreferenceTraining,
    loss_types: Iterable[str],
    train: Sequence[PromptGroup],
    others: Iterable[Sequence[PromptGroup]],
    device: torch.device | str,
    model: nn.Module | None = None,
) -> TieModel | None:
    """Return the loss that counts ties, if the settings name one.

    Args:
        section: The stage's settings.
        loss_types: Names of its losses.
        train: The groups to train on, which the first values are fitted on.
        others: Further groups that the loss is computed of.
        device: Where the model computes.
        model: The model that trains, if it may be sharded.
    """
    named = [name for name in loss_types if name in TIE_LOSSES]
    if not named:
        return None
    largest = 2 if named[0] == "davidson" else max(2, most_tied(train), *map(most_tied, others))
    if section.tie_strength is not None:
        stated = torch.full((largest - 1,), math.log(section.tie_strength), device=device)
        return TieModel(named[0], stated)
    counted = count_choices(islice(iter(train), LOOKED_AT), pairs=named[0] == "davidson")
    start = torch.tensor([math.log(x) for x in strengths_at_equal_scores(counted, largest)], device=device)
    return TieModel(named[0], nn.Parameter(start if model is None else replicate_beside(start, model)))


def learned_ties(section: PreferenceTraining, ties: TieModel | None) -> dict[str, Any]:
    """Return the arguments that `trainee_of` takes for a learned parameter; none without one.

    Args:
        section: The stage's settings.
        ties: The loss that counts ties, if there is one.
    """
    if ties is None or not ties.learned:
        return {}
    return {"further": ties.learned, "further_rate": section.tie_learning_rate or LEARNING_RATE}


def tie_note(ties: int, counted: bool) -> str:
    """Return what to say of tied pairs after the number of pairs; "" if there are none.

    Args:
        ties: Tied pairs of the rankings to train on.
        counted: Whether the loss counts them.
    """
    if not ties:
        return ""
    said = f", {ties} tied"
    return said if counted else f"{said} (left out; loss_type {' and '.join(TIE_LOSSES)} count them)"


def count_choices(groups: Iterable[PromptGroup], pairs: bool) -> Counter[tuple[int, int]]:
    """Count choices by (how many responses were chosen, out of how many).

    Args:
        groups: The groups.
        pairs: Whether to count pairs, each a choice out of two; otherwise the choices of rankings.
    """
    counted: Counter[tuple[int, int]] = Counter()
    for group in groups:
        if pairs:
            counted[1, 2] += len(group.pairs())
            counted[2, 2] += sum(1 for _ in judged_ties(group))
            continue
        for ranked in ranked_once(group):
            rest = len(ranked)
            for tier in tiers(ranked):
                if rest > 1:
                    counted[len(tier), rest] += 1
                rest -= len(tier)
    return counted


def strengths_at_equal_scores(counted: Counter[tuple[int, int]], largest: int) -> list[float]:
    """Return the most likely δ₂ … δ_D if all scores are equal, as at the start of a training.

    Then P(t out of n) is C(n, t) δ_t / Σ_s C(n, s) δ_s, and each round of iterative scaling sets
    δ_t to the ties that were counted over those expected with δ_t = 1.

    Args:
        counted: As of `count_choices`.
        largest: D.
    """
    strengths = [1.0] * largest
    ties = [SEEN + sum(n for (size, _), n in counted.items() if size == t) for t in range(1, largest + 1)]
    for _ in range(100):
        expected = [SEEN] * largest
        for (_, out_of), n in counted.items():
            weights = [math.comb(out_of, t) * strengths[t - 1] for t in range(1, largest + 1)]
            for t in range(1, largest + 1):
                expected[t - 1] += n * math.comb(out_of, t) / sum(weights)
        strengths = [1.0, *(ties[t - 1] / expected[t - 1] for t in range(2, largest + 1))]
    return strengths[1:]
