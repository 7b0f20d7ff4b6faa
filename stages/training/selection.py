"""State which weights of a training are published and when it ends early. Imports no torch."""

from dataclasses import dataclass


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
