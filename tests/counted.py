"""Count the bytes that a process holds, including what FSDP allocates past torch's dispatcher."""

from functools import partial

from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group

from stages.models.sharding import local_shard
from stages.tools.memory_step import LiveBytes


class Held(LiveBytes):
    """Count memory, including what FSDP allocates and frees outside torch's dispatcher."""

    def add(self, tensor):
        super().add(local_shard(tensor))

    def __enter__(self):
        for name in ("alloc_storage", "free_storage"):
            for module in (_fsdp_param, _fsdp_param_group):
                if hasattr(module, name):
                    setattr(module, name, partial(self.resize, getattr(module, name)))
        return super().__enter__()

    def resize(self, change, tensor: Tensor) -> None:
        before = tensor.untyped_storage().nbytes()
        change(tensor)
        self.known.add(tensor.untyped_storage())
        self.grow(tensor.untyped_storage().nbytes() - before)
