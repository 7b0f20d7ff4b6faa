"""Scale losses so that float16 can hold their gradients; skip a step whose gradients overflow.

Gradients of float16 products below 6e-8 are 0. So the loss is multiplied by a factor (its scale)
before the backward pass, and the gradients are divided by it before the step. Where they overflow,
the step is skipped and the scale halved; after many steps without an overflow it is doubled. The
scaler is torch's GradScaler, which accelerate's backward pass multiplies by.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stages.models.precision import compute_in_float16
from stages.training.trainee import Trainee


@dataclass
class Scaling:
    """The gradient scaler of a training, and what it has skipped; nothing in other dtypes."""

    scaler: Any = None
    """torch's GradScaler, which may serve several optimizers; None: losses are not scaled."""
    skipped: int = 0
    """Steps skipped because gradients overflowed."""

    @property
    def scale(self) -> float:
        """Factor of the losses, a power of two; 1 without a scaler."""
        return 1.0 if self.scaler is None else self.scaler.get_scale()

    def overflow(self, trainees: Sequence[Trainee]) -> bool:
        """Unscale all gradients, and set the scale of the next step.

        Args:
            trainees: The models that step together.

        Returns:
            Whether any gradient overflowed: then all gradients are cleared, and none may step.
        """
        optimizers = [t.optimizer for t in trainees if any(p.grad is not None for p in t.parameters.values())]
        if self.scaler is None or not optimizers:
            return False
        before = self.scale
        for optimizer in optimizers:
            self.scaler.unscale_(optimizer)
        self.scaler.update()
        if not self.lost(before):
            return False
        for trainee in trainees:
            trainee.optimizer.zero_grad(set_to_none=True)
        return True

    def lost(self, before: float) -> bool:
        """Return whether a step was skipped, and count it.

        Args:
            before: The scale that the step began with; only an overflow lowers it.
        """
        is_lost = self.scale < before
        self.skipped += is_lost
        return is_lost

    def problem(self, step: int) -> str | None:
        """Return what is wrong, in words, where gradients overflow at every scale; otherwise None.

        Args:
            step: The step that was skipped.
        """
        if self.scale >= 1:
            return None
        return f"the gradient at step {step} is not finite in float16, whatever the scale of the loss"

    def figures(self) -> dict[str, float]:
        """Return the metrics; {} in other dtypes."""
        return {} if self.scaler is None else {"grad_scale": self.scale} | self.skips()

    def skips(self) -> dict[str, int]:
        """Return what the manifest records; {} in other dtypes."""
        return {} if self.scaler is None else {"steps_skipped_by_scaler": self.skipped}

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint records; {} in other dtypes."""
        return {} if self.scaler is None else {"grad_scaler": self.scaler.state_dict() | {"skipped": self.skipped}}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue as a checkpoint's JSON says; one of another dtype says nothing."""
        saved = state.get("grad_scaler")
        if self.scaler is not None and saved is not None:
            self.skipped = saved["skipped"]
            self.scaler.load_state_dict({name: value for name, value in saved.items() if name != "skipped"})


def new_scaling(accelerator: Any) -> Scaling:
    """Return the scaling of a training that begins, with a scaler of its own under float16.

    Args:
        accelerator: accelerate's Accelerator; under float16 it gets the scaler.
    """
    if accelerator.mixed_precision != "fp16":
        return Scaling()
    compute_in_float16(accelerator)
    return Scaling(accelerator.scaler)
