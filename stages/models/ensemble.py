"""Combine several reward models into one score (Coste 2023)."""

from collections.abc import Callable, Sequence
from functools import partial
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

    def __init__(self, members: Sequence[nn.Module], how: How, deviations: float = 1.0) -> None:
        super().__init__()
        self.members, self.how, self.deviations = nn.ModuleList(members), how, deviations

    def combine(self, scores: list[Tensor]) -> Tensor:
        """Return one score (B,) of the members' scores, (B,) each."""
        return combine(scores, self.how, self.deviations)


def combine(scores: Sequence[Tensor], how: How, deviations: float = 1.0) -> Tensor:
    """Return the mean or minimum of several models' scores, or their mean less their spread.

    Args:
        scores: (B,) of each model.
        how: "mean"; "min" (worst-case optimization, Coste 2023, eq. 4); or "mean_minus_std", the
            mean minus a multiple of the standard deviation (over the number of models; Coste's
            eq. 5 takes off a multiple of the variance).
        deviations: That multiple.
    """
    stacked = torch.stack(list(scores))
    if how == "min":
        return stacked.amin(0)
    mean = stacked.mean(0)
    return mean if how == "mean" else mean - deviations * stacked.std(0, correction=0)


def members(model: nn.Module) -> list[nn.Module]:
    """Return the models of an Ensemble, or a list of the model itself."""
    return list(model.members) if isinstance(model, Ensemble) else [model]


def load_reward_model(folder: Path, how: How, load: Callable = load_scalar_model, **options: Any) -> nn.Module:
    """Load a reward model, as an Ensemble if rm wrote others into ensemble/ beside its folder.

    Args:
        folder: Of the first reward model.
        how: How the scores of several are combined.
        load: Returns the reward model in a folder, given the options.
        options: Passed to `load`.
    """
    return load_ensemble([folder, *others_of(folder)], how, partial(load, **options))


def load_ensemble(
    folders: Sequence[Path], how: How, load: Callable[[Path], nn.Module], deviations: float = 1.0
) -> nn.Module:
    """Load the reward models of several folders as an Ensemble; of one, that model.

    Args:
        folders: Their folders.
        how: How their scores are combined.
        load: Returns the reward model in a folder.
        deviations: As of `combine`.
    """
    models = [load(folder) for folder in folders]
    return models[0] if len(models) == 1 else Ensemble(models, how, deviations)
