"""Test how much rankings of different K weigh in the reward model's loss."""

import math
from itertools import combinations

import pytest
import torch

from data.groups import PromptGroup, batch_groups
from stages.settings.rm import RMSettings
from stages.training.ranking import loss_of

SCORES = [0.3, -0.2, 1.0, 0.1, 0.4, -0.5]
"""Scores of a ranking of 2 responses and one of 4, each in order of preference."""


def groups() -> list[PromptGroup]:
    """Return a ranking of 2 and one of 4 responses, the first one best."""
    return [PromptGroup([1], [[10 + i, 2] for i in range(k)], tuple(range(1, k + 1)), str(k), (), (None,), (0.0,))
            for k in (2, 4)]  # fmt: skip


def pair_losses(scores: list[float]) -> list[float]:
    return [math.log1p(math.exp(worse - better)) for better, worse in combinations(scores, 2)]


@pytest.mark.parametrize(("weight", "factors"), [("equal", (1, 1)), ("choices", (1, 3))])
def test_a_ranking_counts_once_or_by_its_choices(weight, factors):
    batch, scores = batch_groups(groups(), 0), torch.tensor(SCORES, requires_grad=True)
    loss = loss_of(RMSettings(ranking_weight=weight), batch, scores, 2)
    parts = pair_losses(SCORES[:2]), pair_losses(SCORES[2:])
    expected = sum(f * sum(part) / len(part) for f, part in zip(factors, parts, strict=True)) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.backward()
    slope = -1 / (1 + math.exp(SCORES[0] - SCORES[1])) / 2
    assert scores.grad[0].item() == pytest.approx(slope, rel=1e-5), "a pair counts the same either way"


def test_the_whole_order_counts_by_its_choices_too():
    """With plackett_luce each choice then weighs 1."""
    batch, scores = batch_groups(groups(), 0), torch.tensor(SCORES)
    settings = RMSettings(ranking_weight="choices", loss_type="plackett_luce")
    first, second = SCORES[:2], SCORES[2:]
    choices = [
        math.log(sum(map(math.exp, rest[i:]))) - rest[i] for rest in (first, second) for i in range(len(rest) - 1)
    ]
    assert loss_of(settings, batch, scores, 2).item() == pytest.approx(sum(choices) / 2, rel=1e-6)
