"""State what a stage needs of a device, and how its processes share that."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Need:
    """The bytes that a stage needs."""

    stage: str
    """The stage, or the command."""
    weights: int
    """All weights."""
    moments: int
    """Adam's moments, and AdaLoRA's averages."""
    kept: int
    """Copies that are kept: the best weights, and averages."""
    step: int
    """The most that a step holds in addition: activations and gradients."""
    sampling: int = 0
    """The most that sampling holds in addition: the cache, and weights cast for it."""
    host: int = 0
    """What a process with a GPU offloads to the CPU's memory; not in the others."""
    saving: int = 0
    """What a save copies to the CPU's memory, where threads write it; not in the others."""

    @property
    def most(self) -> int:
        """Return the most bytes at once."""
        return self.weights + self.moments + self.kept + max(self.step, self.sampling)

    def most_on(self, device: str) -> int:
        """Return the most bytes at once in a device's memory, which may be the CPU's."""
        return self.most + self.saving * (device == "cpu")

    def most_beside(self, device: str) -> int:
        """Return the bytes in the CPU's memory beside those in a device's."""
        return self.host + self.saving * (device != "cpu")


def processes(experiment: Any) -> int:
    """Return the world size."""
    return experiment.launch.processes * experiment.launch.nodes


def sharers(experiment: Any) -> int:
    """Return how many processes hold a shard of each weight."""
    launch = experiment.launch
    return processes(experiment) if launch.shards_weights else launch.tensor_parallel or 1


def saves_copies(experiment: Any) -> bool:
    """Return whether processes save from copies while training goes on (see `save_groups`)."""
    return processes(experiment) > 1 and experiment.launch.shares_state and experiment.checkpoints.every != 0


def is_sharded(experiment: Any) -> bool:
    """Return whether models are held in shares: of several processes, or in the CPU's memory."""
    return sharers(experiment) > 1 or experiment.launch.offload == "all"


def groups(experiment: Any) -> int:
    """Return how many processes, or groups of them, share the rows of a batch."""
    return max(1, processes(experiment) // experiment.launch.together)
