"""Count how often the host reads numbers of tensors, each of which waits for a device."""

from collections import Counter
from contextlib import ExitStack

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operators whose result, or its shape, depends on numbers on the device.
DEPENDENT = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "repeat_interleave", "equal")


class HostReads(TorchDispatchMode):
    """Count reads of tensors while inside, by their name."""

    def __init__(self):
        super().__init__()
        self.counted = Counter()
        self.stack = ExitStack()

    def __enter__(self):
        self.stack.enter_context(Methods(self.counted))
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.stack.close()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        by_mask = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        if name in DEPENDENT or name.startswith("unique") or by_mask:
            self.counted[name] += 1
        return operator(*args, **(kwargs or {}))


class Methods(TorchFunctionMode):
    """Count the methods that copy whole tensors to the host."""

    def __init__(self, counted):
        super().__init__()
        self.counted = counted

    def __torch_function__(self, function, types, args=(), kwargs=None):
        # `item` and its like end in an operator that is counted there
        if function in (Tensor.tolist, Tensor.cpu, Tensor.numpy):
            self.counted[function.__name__] += 1
        return function(*args, **(kwargs or {}))
