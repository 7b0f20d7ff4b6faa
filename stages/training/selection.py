"""Choose the weights that a training publishes, and end it early. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.store.checkpoints import Checkpoint
    from stages.training.trainee import Trainee


@dataclass(frozen=True)
class Selection:
    """How held-out evaluations choose the published weights and end a training early."""

    keep: str
    """"best" or "last": which weights are published."""
    patience: int | None
    """End after so many evaluations without an improvement; None: never."""
    judge: str
    """Name of the held-out figure that is compared."""
    higher_is_better: bool
    """Direction of that figure."""
    eval_steps: int
    """Optimizer steps (PPO: updates) between two evaluations."""

    def start(self) -> Best:
        """Return the record of the best evaluation, before the first one."""
        return Best(self.keep, self.patience, self.higher_is_better)


@dataclass
class Best:
    """The best held-out figure so far and, with `keep: best`, the weights that reached it."""

    keep: str
    """"best" or "last": whether the weights of the best evaluation are kept."""
    patience: int | None
    """Evaluations without an improvement after which training ends; None: never."""
    higher_is_better: bool
    """Direction of the figure."""
    value: float | None = None
    """The best figure; None before the first evaluation."""
    step: int = 0
    """The step of the best figure."""
    since: int = 0
    """Evaluations since then."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """The weights of the best evaluation, by name; empty with `keep: last`."""

    def offer(self, value: float, step: int, trainee: Trainee) -> None:
        """Take the figure of an evaluation into account, and keep the weights if it is the best."""
        sign = 1 if self.higher_is_better else -1
        if self.value is None or math.isnan(self.value) or sign * value > sign * self.value:
            self.value, self.step, self.since = value, step, 0
            if self.keep == "best":
                self.tensors = {k: v.clone() for k, v in trainee.tensors().items()}
        else:
            self.since += 1

    @property
    def exhausted(self) -> bool:
        """Whether `patience` evaluations have brought no improvement."""
        return self.patience is not None and self.since >= self.patience

    def state(self) -> dict:
        """Return what a checkpoint records besides the weights."""
        return {"value": self.value, "step": self.step, "since": self.since, "kept": bool(self.tensors)}

    def restore(self, checkpoint: Checkpoint, read: Callable[[], dict[str, Tensor]]) -> None:
        """Continue as a checkpoint says.

        Args:
            checkpoint: The checkpoint.
            read: Reads the best weights, if they are kept.
        """
        state = checkpoint.state["best"]
        if self.keep == "best" and not state["kept"]:
            return  # `keep` was "last" until now, so the best weights are gone: compare from here on
        self.value, self.step, self.since = state["value"], state["step"], state["since"]
        self.tensors = read() if self.keep == "best" else {}
