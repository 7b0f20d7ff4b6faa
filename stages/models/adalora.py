"""Train AdaLoRA (Zhang 2023, arXiv 2303.10512): an optimizer that moves rank to where it is needed.

A layer computes W + P Λ Q. Singular values Λ are pruned where they matter least to the loss. peft
provides the layers. When to prune what is decided by the optimizer here, so that a checkpoint of
the optimizer holds the whole state.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stages.models.sharding import local_shard, shard_like, whole

BETA = 0.85  # decay of both averages; β₁ and β₂ of the paper
ORTHOGONAL = 0.1  # γ, the weight of the penalty R, a mean over all P and Q
BEGIN, END = 0.1, 0.5  # pruning begins and ends after these shares of all steps
PRUNINGS = 100  # while it prunes, it does so every steps // PRUNINGS steps


@dataclass(frozen=True)
class Triplets:
    """The adapter of one layer: r triplets of a singular value and its two vectors."""

    left: nn.Parameter
    """P, [out, r]."""
    values: nn.Parameter
    """Λ, [r, 1]."""
    right: nn.Parameter
    """Q, [r, in]."""

    def __iter__(self) -> Iterator[nn.Parameter]:
        """Yield P, Λ and Q."""
        return iter((self.left, self.values, self.right))


def triplets_of(model: nn.Module) -> list[Triplets]:
    """Return the triplets of each AdaLoRA layer, in the model's order; [] for other models."""
    layers = [layer for layer in model.modules() if hasattr(layer, "lora_E")]
    return [
        Triplets(layer.lora_B[name], layer.lora_E[name], layer.lora_A[name])
        for layer in layers
        for name in layer.active_adapters
    ]


def window(steps: int) -> tuple[int, int]:
    """Return the step after which pruning begins, and the step at which it ends."""
    return round(BEGIN * steps), round(END * steps)


def budget_at(step: int, steps: int, first: int, last: int) -> int:
    """Return b(t), how many triplets of all layers are left after a step (equation 12).

    The budget is `first`, then falls as a cubic, then stays at `last`.

    Args:
        step: 1 … steps.
        steps: Of the whole training.
        first: Triplets at the start.
        last: Triplets at the end.
    """
    begin, end = window(steps)
    if step <= begin:
        return first
    if step >= end:
        return last
    return last + int((first - last) * (1 - (step - begin) / (end - begin)) ** 3)


def orthogonality_gradient(rows: Tensor) -> Tensor:
    """Return ∇ ‖Q Qᵀ − I‖_F for Q [r, n] (equation 4; not squared, as in the authors' code)."""
    gram = rows @ rows.T
    gram.diagonal().sub_(1.0)
    return 2 * (gram @ rows) / torch.linalg.matrix_norm(gram).clamp_min(torch.finfo(rows.dtype).tiny)


def importances(scores: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Return S of every triplet, one layer after the other (equation 7).

    Args:
        scores: For each layer, scores of the weights in P, Λ and Q, in their shapes.
    """
    return torch.cat([values.flatten() + left.mean(0) + right.mean(1) for left, values, right in scores])


class AdaLora(torch.optim.AdamW):
    """AdamW that also prunes triplets.

    For each weight of a triplet its state has `sensitivity` Ī and `uncertainty` Ū (equations 9 and
    10); after pruning has ended, it has for the singular values a mask `kept` in their place. The
    gradient of the penalty on vectors that are not orthogonal is added in `step`, to gradients that
    are clipped already.
    """

    def __init__(self, params: Any, *, triplets: list[Triplets], rank: int, steps: int, **options: Any) -> None:
        """Set up the optimizer.

        Args:
            params: As of AdamW.
            triplets: Of the model.
            rank: Triplets per layer, on average, that are left at the end.
            steps: Of the whole training.
            options: As of AdamW.
        """
        super().__init__(params, **options)
        self.triplets, self.rank, self.steps = triplets, rank, steps
        for group in self.param_groups:
            group["taken"] = 0  # steps so far

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Take a step of AdamW, update the importances and prune."""
        assert closure is None
        weights = [p for t in self.triplets for p in t]
        for p in weights:
            if p.grad is None:  # an expert that no token was routed to
                p.grad = torch.zeros_like(p)
        weight = ORTHOGONAL / (2 * len(self.triplets))
        for t in self.triplets:  # a sharded one is gathered: its rows are compared with each other
            penalties = orthogonality_gradient(whole(t.right)), orthogonality_gradient(whole(t.left).T).T
            for p, penalty in zip((t.right, t.left), penalties, strict=True):
                local_shard(p.grad).add_(local_shard(shard_like(p, penalty)), alpha=weight)
        # I(w), equation 8: before the step, with the weights that the gradient was computed at.
        sensitivities = [(local_shard(p) * local_shard(p.grad)).abs() for p in weights]
        super().step()  # before `watch`: Adam initialises only a state that is empty
        for group in self.param_groups:
            group["taken"] += 1
        step, values = self.param_groups[0]["taken"], [t.values for t in self.triplets]
        begin, end = window(self.steps)
        if "kept" not in self.state[values[0]]:
            self.watch(weights, sensitivities)
            if step >= end:
                for p, mask in zip(values, self.best(step), strict=True):
                    self.state[p]["kept"] = mask
                for p in weights:
                    del self.state[p]["sensitivity"], self.state[p]["uncertainty"]
            elif step > begin and step % max(1, self.steps // PRUNINGS) == 0:
                for p, mask in zip(values, self.best(step), strict=True):
                    p.mul_(mask)  # pruned values continue to train, and may come back
        for p in values:
            if "kept" in self.state[p]:
                p.mul_(self.state[p]["kept"])

    def watch(self, weights: list[nn.Parameter], sensitivities: list[Tensor]) -> None:
        """Update the averages with the newest sensitivities.

        Args:
            weights: All weights of triplets.
            sensitivities: Sensitivity of each, in the shape of this process's share of it.
        """
        for p, sensitivity in zip(weights, sensitivities, strict=True):
            state = self.state[p]
            if "sensitivity" not in state:
                state |= {name: torch.zeros_like(p) for name in ("sensitivity", "uncertainty")}
            mean, spread = (local_shard(state[name]) for name in ("sensitivity", "uncertainty"))
            mean.lerp_(sensitivity, 1 - BETA)
            spread.lerp_((sensitivity - mean).abs(), 1 - BETA)

    def best(self, step: int) -> list[Tensor]:
        """Return masks of the most important triplets, as many as the budget allows.

        All processes gather the same averages, and so decide alike.

        Args:
            step: Decides on the budget.

        Returns:
            1 for the triplets that stay and 0 for the others, in the shapes of the Λ, and sharded
            as they are.
        """
        values = [t.values for t in self.triplets]
        budget = budget_at(step, self.steps, sum(map(len, values)), self.rank * len(values))

        def score(p: nn.Parameter) -> Tensor:
            """Return the scores of a parameter's entries (equation 11)."""
            return whole(self.state[p]["sensitivity"] * self.state[p]["uncertainty"])

        importance = importances([(score(t.left), score(t.values), score(t.right)) for t in self.triplets])
        kept = torch.zeros_like(importance)
        kept[importance.argsort(descending=True, stable=True)[:budget]] = 1.0
        masks = kept.split([len(p) for p in values])
        return [shard_like(p, mask.view(p.shape)) for mask, p in zip(masks, values, strict=True)]


def adamw_for(model: nn.Module, steps: int | None) -> tuple[type[torch.optim.AdamW], dict]:
    """Return the optimizer's class and its extra options: AdamW, or `AdaLora` for its adapters.

    Args:
        model: The model that trains.
        steps: Of the whole training; needed for AdaLoRA.
    """
    triplets = triplets_of(model)
    if not triplets:
        return torch.optim.AdamW, {}
    assert steps is not None
    (config,) = model.peft_config.values()
    return AdaLora, {"triplets": triplets, "rank": config.target_r, "steps": steps}
