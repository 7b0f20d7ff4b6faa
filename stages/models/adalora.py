"""AdaLoRA (Zhang 2023, arXiv 2303.10512): W + P Λ Q, the singular values Λ pruned where they matter least to the loss,
so that rank goes to the layers that need it. peft has the layers; when to prune what is an optimizer's matter here,
whose state a checkpoint holds.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

BETA = 0.85  # of both averages; the paper's β₁ and β₂
ORTHOGONAL = 0.1  # γ, the weight of R, as a mean over all P and Q
BEGIN, END = 0.1, 0.5  # pruning begins and ends after these parts of a training
LOOKS = 100  # while it prunes: every so many parts of a training


@dataclass(frozen=True)
class Triplets:
    """P [out, r], Λ [r, 1] and Q [r, in] of one layer: r triplets of a singular value and its vectors."""

    left: nn.Parameter
    values: nn.Parameter
    right: nn.Parameter

    def __iter__(self):
        return iter((self.left, self.values, self.right))


def triplets_of(model: nn.Module) -> list[Triplets]:
    """Of each layer that peft gave an AdaLoRA adapter, in the model's order; [] for other models."""
    layers = [layer for layer in model.modules() if hasattr(layer, "lora_E")]
    return [
        Triplets(layer.lora_B[name], layer.lora_E[name], layer.lora_A[name])
        for layer in layers
        for name in layer.active_adapters
    ]


def window(steps: int) -> tuple[int, int]:
    """The step behind which pruning begins, and the one at which it ends."""
    return round(BEGIN * steps), round(END * steps)


def budget_at(step: int, steps: int, first: int, last: int) -> int:
    """b(t) (equation 12): how many triplets of all layers are left after step 1 … steps: `first`, then fewer by a
    cubic, then `last`."""
    begin, end = window(steps)
    if step <= begin:
        return first
    if step >= end:
        return last
    return last + int((first - last) * (1 - (step - begin) / (end - begin)) ** 3)


def orthogonality_gradient(rows: Tensor) -> Tensor:
    """∇ of ‖Q Qᵀ − I‖_F (equation 4; not squared, as the authors' code) for Q [r, n]."""
    gram = rows @ rows.T
    gram.diagonal().sub_(1.0)
    return 2 * (gram @ rows) / torch.linalg.matrix_norm(gram).clamp_min(torch.finfo(rows.dtype).tiny)


def importances(scores: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """S of every triplet of every layer, one layer after the other (equation 7): of scores like P, Λ, Q."""
    return torch.cat([values.flatten() + left.mean(0) + right.mean(1) for left, values, right in scores])


class AdaLora(torch.optim.AdamW):
    """AdamW that also prunes. Its state has, of each weight of a triplet, `sensitivity` Ī and `uncertainty` Ū
    (equations 9 and 10); once pruning has ended, of the singular values what is `kept` in their place. The penalty on
    vectors that are not orthogonal is added here, to gradients that are clipped already.

    rank: triplets a layer that are left in the end, on average. steps: of the whole training.
    """

    def __init__(self, params, *, triplets: list[Triplets], rank: int, steps: int, **options):
        super().__init__(params, **options)
        self.triplets, self.rank, self.steps = triplets, rank, steps
        for group in self.param_groups:
            group["taken"] = 0  # steps so far

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        weights = [p for t in self.triplets for p in t]
        for p in weights:
            if p.grad is None:  # an expert that no token went to
                p.grad = torch.zeros_like(p)
        for t in self.triplets:
            weight = ORTHOGONAL / (2 * len(self.triplets))
            t.right.grad.add_(orthogonality_gradient(t.right), alpha=weight)
            t.left.grad.add_(orthogonality_gradient(t.left.T).T, alpha=weight)
        felt = [(p * p.grad).abs() for p in weights]  # I(w), equation 8: of the weights that the gradient is of
        super().step()  # first, for Adam takes a state that is not empty for its own
        for group in self.param_groups:
            group["taken"] += 1
        step, values = self.param_groups[0]["taken"], [t.values for t in self.triplets]
        begin, end = window(self.steps)
        if "kept" not in self.state[values[0]]:
            self.watch(weights, felt)
            if step >= end:
                for p, some in zip(values, self.best(step), strict=True):
                    self.state[p]["kept"] = some
                for p in weights:
                    del self.state[p]["sensitivity"], self.state[p]["uncertainty"]
            elif step > begin and step % max(1, self.steps // LOOKS) == 0:
                for p, some in zip(values, self.best(step), strict=True):
                    p.mul_(some)  # they go on training, and may come back
        for p in values:
            if "kept" in self.state[p]:
                p.mul_(self.state[p]["kept"])

    def watch(self, weights: list[nn.Parameter], felt: list[Tensor]) -> None:
        """The averages, with the newest sensitivities."""
        for p, sensitivity in zip(weights, felt, strict=True):
            state = self.state[p]
            if "sensitivity" not in state:
                state |= {name: torch.zeros_like(p) for name in ("sensitivity", "uncertainty")}
            state["sensitivity"].lerp_(sensitivity, 1 - BETA)
            state["uncertainty"].lerp_((sensitivity - state["sensitivity"]).abs(), 1 - BETA)

    def best(self, step: int) -> list[Tensor]:
        """1 for the most important triplets of all layers, as many as the budget after `step` has room for; 0 for the
        others. Shaped as the Λ."""
        values = [t.values for t in self.triplets]
        budget = budget_at(step, self.steps, sum(map(len, values)), self.rank * len(values))
        score = lambda p: self.state[p]["sensitivity"] * self.state[p]["uncertainty"]  # noqa: E731 (equation 11)
        found = importances([tuple(map(score, t)) for t in self.triplets])
        kept = torch.zeros_like(found)
        kept[found.argsort(descending=True, stable=True)[:budget]] = 1.0
        return [x.view_as(p) for x, p in zip(kept.split([len(p) for p in values]), values, strict=True)]


def adamw_for(model: nn.Module, steps: int | None) -> tuple[type[torch.optim.AdamW], dict]:
    """(AdamW, no options); under AdaLoRA the optimizer above, with its options for a training of `steps` steps."""
    triplets = triplets_of(model)
    if not triplets:
        return torch.optim.AdamW, {}
    assert steps is not None
    (config,) = model.peft_config.values()
    return AdaLora, {"triplets": triplets, "rank": config.target_r, "steps": steps}
