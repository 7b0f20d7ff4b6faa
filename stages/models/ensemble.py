"""Several reward models that score as one: their mean, or their minimum (Coste 2023: worst-case optimisation)."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from stages.models.ensemble_folder import How, others_of
from stages.models.loading import load_scalar_model


class Ensemble(nn.Module):
    """Reward models of one tokenizer. `response_scores` reads each, bias subtracted, and combines."""

    def __init__(self, members, how: How):
        super().__init__()
        self.members, self.how = nn.ModuleList(members), how

    def combine(self, scores: list[Tensor]) -> Tensor:
        """(B,) of each member → (B,)."""
        every = torch.stack(scores)
        return every.mean(0) if self.how == "mean" else every.amin(0)


def members(model) -> list[nn.Module]:
    """The models of an Ensemble; of any other, itself."""
    return list(model.members) if isinstance(model, Ensemble) else [model]


def load_reward_model(folder: Path, how: How, load: Callable = load_scalar_model, **options) -> nn.Module:
    """The reward model in `folder`; with those of ensemble/ beside it, if rm made them, an Ensemble. load(folder,
    **options) → one of them."""
    first, rest = load(folder, **options), others_of(folder)
    return Ensemble([first, *(load(path, **options) for path in rest)], how) if rest else first
