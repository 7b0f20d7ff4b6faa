"""Choose the records of a mixture of several sources."""

import random
from collections.abc import Sequence

from data.streams import derive_seed


def mix(sizes: Sequence[int], weights: Sequence[float | None]) -> list[tuple[int, int]]:
    """Choose records of several sources so that their shares are as the weights say.

    Without weights all records are taken, source after source. With weights no record is taken
    twice: the source that is scarcest for its weight gives all it has, and the others a random
    part, always the same one. The sources are interleaved evenly, so that the first records of a
    mixture have its shares too.

    Args:
        sizes: The number of records of each source.
        weights: The weight of each; None counts as 1 where another source has one.

    Returns:
        (source, index of the record) of each chosen record, in order.
    """
    if all(weight is None for weight in weights):
        return [(source, i) for source, size in enumerate(sizes) for i in range(size)]
    known = [1.0 if weight is None else weight for weight in weights]
    scale = min(size / weight for size, weight in zip(sizes, known, strict=True))
    chosen: list[tuple[float, int, int]] = []
    for source, (size, weight) in enumerate(zip(sizes, known, strict=True)):
        taken = min(size, round(scale * weight))
        indices = sorted(random.Random(derive_seed("mixture", source, size)).sample(range(size), taken))
        chosen += [((position + 0.5) / taken, source, i) for position, i in enumerate(indices)]
    return [(source, i) for _, source, i in sorted(chosen)]
