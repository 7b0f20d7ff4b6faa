"""Combine several reward models into one score: their mean or minimum (Coste 2023)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stages.models.ensemble_folder import How, others_of
from stages.models.loading import load_scalar_model


class Ensemble(nn.Module):
    """Hold reward models that share a tokenizer.

    `response_scores` scores with each of them, subtracts each bias, and combines.
    """

    def __init__(self, members: Sequence[nn.Module], how: How) -> None:
        super().__init__()
        self.members, self.how = nn.ModuleList(members), how

    def combine(self, scores: list[Tensor]) -> Tensor:
        """Return the mean or minimum of the members' scores, (B,) each, as (B,)."""
        stacked = torch.stack(scores)
        return stacked.mean(0) if self.how == "mean" else stacked.amin(0)


def members(model: nn.Module) -> list[nn.Module]:
    """Return the models of an Ensemble, or a list of the model itself."""
    return list(model.members) if isinstance(model, Ensemble) else [model]


def load_reward_model(folder: Path, how: How, load: Callable = load_scalar_model, **options: Any) -> nn.Module:
    """Load a reward model, as an Ensemble if rm wrote others into ensemble/ beside its folder.

    Args:
        folder: Of the first reward model.
        how: "mean" or "min".
        load: Returns the reward model in a folder, given the options.
        options: Passed to `load`.
    """
    first, rest = load(folder, **options), others_of(folder)
    return Ensemble([first, *(load(path, **options) for path in rest)], how) if rest else first
