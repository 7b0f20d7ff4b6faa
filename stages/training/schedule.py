"""Compute the learning rate of an optimizer step from the step only. Imports no torch."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """A learning rate as a pure function of the step: a linear warm-up, then a shape."""

    peak: float
    """The highest rate, reached at the end of the warm-up."""
    shape: str
    """constant, linear, cosine or cosine_with_min_lr (trl's lr_scheduler_type)."""
    warmup_steps: int
    """Optimizer steps of the warm-up."""
    total: int
    """Optimizer steps of the whole training."""
    warmup_from: float = 0.0
    """Fraction of the peak that step 1 takes; 0: the warm-up starts at 0, before step 1."""

    def rate_at(self, step: int) -> float:
        """Return the rate of step 1 … total."""
        return learning_rate_at(step, self.total, self.peak, self.shape, self.warmup_steps, self.warmup_from)


def learning_rate_at(
    step: int, total: int, peak: float, schedule: str, warmup_steps: int, warmup_from: float = 0.0
) -> float:
    """Return the rate of a step, of 1 … total: a linear warm-up, then the schedule.

    Args:
        step: The step, from 1.
        total: Steps of the training.
        peak: The highest rate.
        schedule: constant; linear, to 0; cosine, to 0; cosine_with_min_lr, to a tenth of the peak
            (InstructGPT).
        warmup_steps: Steps of the warm-up; it starts at 0, before step 1.
        warmup_from: If above 0, step 1 has this fraction of the peak.
    """
    if step <= warmup_steps:
        done = (step - 1 if warmup_from else step) / warmup_steps
        return peak * (warmup_from + (1 - warmup_from) * done)
    done = (step - warmup_steps - 1) / max(1, total - warmup_steps)
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * (1 - done)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    if schedule == "cosine":
        return peak * cosine
    if schedule == "cosine_with_min_lr":
        return peak * (0.1 + 0.9 * cosine)
    raise ValueError(f"lr_scheduler_type is {schedule!r}; it can be constant, linear, cosine or cosine_with_min_lr")
