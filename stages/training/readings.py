"""Read figures from a device all at once.

A device works through a queue. Each number that the host reads from it waits until the queue is
empty, and until it is filled again the device has nothing to do. So figures stay tensors while a
gradient is computed, and are read together at its end.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Share(NamedTuple):
    """A number on a device, which is multiplied and divided once it has been read, in float64."""

    value: Tensor
    """The number, a scalar."""
    factor: float = 1.0
    """What it is multiplied by."""
    divisor: float = 1.0
    """What it is divided by."""


Figure = Tensor | Share | float
"""A figure that may still be on a device."""


def read_all(values: Sequence[Tensor | float]) -> list[float]:
    """Return numbers as floats; those on a device are read from it together.

    Args:
        values: Scalar tensors, not distributed, or numbers.
    """
    on_devices: dict[torch.device, dict[int, Tensor]] = {}
    read: dict[int, float] = {}
    for i, x in enumerate(values):
        if isinstance(x, Tensor):
            on_devices.setdefault(x.device, {})[i] = x.detach()
        else:
            read[i] = x
    for found in on_devices.values():
        # dtypes are promoted: no bit of a float is lost
        read |= zip(found, torch.stack(list(found.values())).tolist(), strict=True)
    return [read[i] for i in range(len(values))]


def read_sums(parts: Iterable[Mapping[str, Figure]], *more: Figure) -> tuple[dict[str, float], list[float]]:
    """Read the figures of micro-batches, and further ones, from the device together.

    Args:
        parts: The figures of each micro-batch; one may lack some of the names.
        more: Further figures.

    Returns:
        The sums of the figures over the micro-batches, by name; and the further figures.
    """
    named = [(name, figure) for figures in parts for name, figure in figures.items()]
    shares = [as_share(figure) for figure in (*(figure for _, figure in named), *more)]
    numbers = read_all([share.value for share in shares])
    numbers = [share.factor * x / share.divisor for share, x in zip(shares, numbers, strict=True)]
    sums: dict[str, float] = {}
    for (name, _), number in zip(named, numbers, strict=False):
        sums[name] = sums.get(name, 0.0) + number
    return sums, numbers[len(named) :]


def detached(figures: Mapping[str, Figure]) -> dict[str, Figure]:
    """Return figures that keep no graph of a backward pass alive."""
    return {name: x.detach() if isinstance(x, Tensor) else x for name, x in figures.items()}


def as_share(figure: Figure) -> Share:
    """Return a figure with its factor and divisor."""
    return figure if isinstance(figure, Share) else Share(figure)
