"""Order of data: endless, shuffled anew each epoch, sharded, and resumable from two numbers; and seeds by name."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass


def derive_seed(*parts) -> int:
    """A 63-bit seed from names and numbers: seed = H(run, stream, update, …). The same parts, the same seed.

    Counter-based randomness needs no generator state in a checkpoint and does not depend on the world size.
    """
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass
class Stream:
    """Endless indices into `size` rows: every epoch a new permutation, given by `seed` and the epoch alone.

    `rank` of `world` processes takes every world-th index. State: the seed and how many were drawn (all ranks).
    """

    size: int
    seed: int
    cursor: int = 0
    rank: int = 0
    world: int = 1

    def __post_init__(self):
        if self.size < 1:
            raise ValueError("a stream needs at least one row")
        self._order: tuple[int, list[int]] = (-1, [])

    def take(self, count: int) -> list[int]:
        """The next `count` indices over all ranks, of which this rank's share is returned."""
        drawn = [self._at(self.cursor + i) for i in range(count)]
        self.cursor += count
        return drawn[self.rank :: self.world]

    def _at(self, position: int) -> int:
        epoch, offset = divmod(position, self.size)
        if self._order[0] != epoch:
            order = list(range(self.size))
            random.Random(derive_seed(self.seed, "epoch", epoch)).shuffle(order)
            self._order = (epoch, order)
        return self._order[1][offset]

    def state_dict(self) -> dict:
        return {"seed": self.seed, "cursor": self.cursor}

    def load_state_dict(self, state: dict) -> None:
        if state["seed"] != self.seed:
            raise ValueError(f"stream state of seed {state['seed']} offered to a stream of seed {self.seed}")
        self.cursor = state["cursor"]


def held_out(keys: Sequence[str], fraction: float, least: int | None = None) -> tuple[list[int], list[int]]:
    """Split rows by key (say, the prompt's text): → (training indices, held-out indices).

    The same key is always on the same side, whatever else is in the file. At least `least` rows are held out
    (the ones with the smallest hash; by default one, unless the fraction is 0), and at least one stays for training.
    """
    place = {k: int.from_bytes(hashlib.sha256(k.encode()).digest()[:8], "big") / 2**64 for k in keys}
    ranked = sorted(place, key=place.get)
    below = sum(p < fraction for p in place.values())
    count = min(max(below, int(fraction > 0) if least is None else least), len(ranked) - 1)
    chosen = set(ranked[:count])
    train = [i for i, k in enumerate(keys) if k not in chosen]
    return train, [i for i, k in enumerate(keys) if k in chosen]


def grouped_by_length(lengths: Sequence[int], batch_size: int, count: int, seed: int, window: int = 16) -> list[int]:
    """`count` indices of an endless shuffled order in which the rows of a batch are of like length: less padding.

    Within windows of `window` batches rows are sorted by length and cut into batches, and the batches shuffled. A
    window ends where a pass over the rows ends, so each pass holds every row once, however few there are; the rows
    left over at the end of a pass share a batch with the first ones of the next. A longer order begins as a shorter
    one.
    """
    stream, order = Stream(len(lengths), seed), []
    while len(order) < count:
        left_in_pass = len(lengths) - stream.cursor % len(lengths)
        batches_now = min(window, max(1, left_in_pass // batch_size))
        rows = sorted(stream.take(batches_now * batch_size), key=lambda i: lengths[i])
        batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        random.Random(derive_seed(seed, "batches", len(order))).shuffle(batches)
        order += [i for batch in batches for i in batch]
    return order[:count]
