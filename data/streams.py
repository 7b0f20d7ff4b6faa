"""Order the rows of training: shuffle endlessly, hold rows out, group rows by length.

The order is given by a few numbers, so that a run resumes with the rows it would have drawn next.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def derive_seed(*parts: object) -> int:
    """Derive a 63-bit seed from names and numbers: the same parts give the same seed.

    Counter-based randomness, seed = H(run, stream, update, …), needs no generator state in a
    checkpoint and does not depend on the world size.
    """
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass
class Stream:
    """Draw indices of rows endlessly: each epoch is a new permutation, given by seed and epoch.

    Rank r of w takes every w-th index. The state is the seed and how many indices all ranks have
    drawn.
    """

    size: int
    """The number of rows, at least 1."""
    seed: int
    """What gives the permutations."""
    cursor: int = 0
    """The number of indices that all ranks together have drawn."""
    rank: int = 0
    """The rank of this process."""
    world: int = 1
    """The world size."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError("a stream needs at least one row")
        self._order: tuple[int, list[int]] = (-1, [])  # the last epoch that was drawn from, and its permutation

    def take(self, count: int) -> list[int]:
        """Draw the next `count` indices over all ranks, and return this rank's share of them."""
        drawn = [self._at(self.cursor + i) for i in range(count)]
        self.cursor += count
        return drawn[self.rank :: self.world]

    def _at(self, position: int) -> int:
        """Return the index at a position of the endless order."""
        epoch, offset = divmod(position, self.size)
        if self._order[0] != epoch:
            order = list(range(self.size))
            random.Random(derive_seed(self.seed, "epoch", epoch)).shuffle(order)
            self._order = (epoch, order)
        return self._order[1][offset]

    def state_dict(self) -> dict[str, int]:
        """Return what a checkpoint keeps."""
        return {"seed": self.seed, "cursor": self.cursor}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a checkpoint's state; ValueError if it belongs to another seed."""
        if state["seed"] != self.seed:
            raise ValueError(f"stream state of seed {state['seed']} offered to a stream of seed {self.seed}")
        self.cursor = state["cursor"]


def held_out(keys: Sequence[str], fraction: float, least: int | None = None) -> tuple[list[int], list[int]]:
    """Split rows by key into a training part and a held-out part.

    The rows whose key has the smallest hash are held out, so the same key is always on the same
    side, whatever else is in the file. At least one key stays for training.

    Args:
        keys: The key of each row, for example the prompt's text.
        fraction: The share of keys to hold out.
        least: The number of keys to hold out at least; by default one, or none if the fraction is
            0.

    Returns:
        The indices of the training rows, and those of the held-out rows.
    """
    position = {key: position_of(key) for key in keys}
    ranked = sorted(position, key=lambda key: position[key])
    below = sum(value < fraction for value in position.values())
    if least is None:
        least = 1 if fraction > 0 else 0
    chosen = set(ranked[: min(max(below, least), len(ranked) - 1)])
    train = [i for i, key in enumerate(keys) if key not in chosen]
    return train, [i for i, key in enumerate(keys) if key in chosen]


def position_of(key: str) -> float:
    """Return the number in [0, 1) that decides on which side of a split a key is."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def held_out_limit(positions: "Sequence[float] | np.ndarray", fraction: float, least: int | None = None) -> float:
    """Return the highest position that `held_out` holds out; -1 if it holds nothing out.

    Args:
        positions: The position of each row's key, as of `position_of`.
        fraction: The share of keys to hold out.
        least: As of `held_out`.
    """
    import numpy as np

    different = np.unique(np.asarray(positions, dtype=np.float64))
    below = int((different < fraction).sum())
    if least is None:
        least = int(fraction > 0)
    count = min(max(below, least), len(different) - 1)
    return float(different[count - 1]) if count > 0 else -1.0


ORDER_VERSION = 2
"""Version of the order that `grouped_by_length` gives, which checkpoints record.

Before 2, a window could span several passes over few rows, so a short one repeated some of them."""


def grouped_by_length(lengths: Sequence[int], batch_size: int, count: int, seed: int, window: int = 16) -> list[int]:
    """Order rows so that those of a batch have similar lengths, which saves padding.

    Rows are shuffled endlessly. Within windows of `window` batches they are sorted by length and
    cut into batches, and the batches are shuffled. A window ends where a pass over the rows ends,
    so each pass holds every row once, however few there are; the rows left over at the end of a
    pass share a batch with the first ones of the next.

    Args:
        lengths: The length of each row.
        batch_size: The number of rows in a batch.
        count: The number of indices to return; a longer order begins as a shorter one.
        seed: What gives the order.
        window: The number of batches in a window.

    Returns:
        Indices of rows; each run of `batch_size` of them is a batch.
    """
    stream = Stream(len(lengths), seed)
    order: list[int] = []
    while len(order) < count:
        left_in_pass = len(lengths) - stream.cursor % len(lengths)
        batches_now = min(window, max(1, left_in_pass // batch_size))
        rows = sorted(stream.take(batches_now * batch_size), key=lambda i: lengths[i])
        batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        random.Random(derive_seed(seed, "batches", len(order))).shuffle(batches)
        for batch in batches:
            order += batch
    return order[:count]
