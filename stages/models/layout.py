"""Say what training keeps on each device, besides the choice whether weights are sharded.

Imports no torch.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Layout:
    """Hold what is sharded over processes, and what lies in the CPU's memory."""

    shard: str = "weights"
    """What fsdp2 shards: "optimizer" (moments), "gradients" (too) or "weights" (all)."""
    offload: str = "none"
    """What lies in the CPU's memory: "none", "optimizer" (moments) or "all" (weights too)."""
    offload_activations: bool = False
    """Whether what a forward pass keeps for the backward pass waits in the CPU's memory."""
    splits_step: bool = False
    """Whether each of several processes steps its rows of whole weights only (ZeRO-1)."""
    casts_gathers: bool = True
    """Whether linear layers that train are gathered in the dtype that autocast casts them to."""
    reduces_last: bool = False
    """Whether sharded models sum gradients over processes at a step's last micro-batch only."""

    @property
    def has_stand_ins(self) -> bool:
        """Return whether the optimizer steps other tensors than the model's weights."""
        return self.splits_step or self.offload == "optimizer"


def layout_of(launch: Any, world_size: int) -> Layout:
    """Return the layout that the section `launch` asks for.

    Args:
        launch: The section.
        world_size: Number of processes.
    """
    return Layout(
        shard=launch.shard or "weights",
        offload=launch.offload or "none",
        offload_activations=bool(launch.offload_activations),
        splits_step=world_size > 1 and launch.strategy == "fsdp2" and launch.shard == "optimizer",
        casts_gathers=(launch.tensor_parallel or 1) == 1,
        reduces_last=launch.reduce == "last",
    )
