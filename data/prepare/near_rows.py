"""Find near copies among many rows, with little memory: the sketches of all rows lie on disk.

The definition of near copies, and how candidates are found, is that of `data/near_copies.py`. Here
each row is compared only with rows that were kept before it, so that of a thousand near copies one
is kept and 999 comparisons are made.
"""

import hashlib
import zlib
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from data.near_copies import (
    LONGEST,
    PERMUTATIONS,
    Words,
    as_bytes,
    bands,
    normal_words,
    of_length,
    shingle_length,
    shingles,
)

BLOCK = 4096
"""Rows whose band keys are computed together."""
REMEMBERED = 4096
"""Kept rows whose words are remembered after they were read again."""


class NearRows:
    """Hold the sketches of all rows, and which of them were kept."""

    def __init__(self, folder: Path, threshold: float, text_of: Callable[[int], str | list[dict]]):
        """Start without rows.

        Args:
            folder: Where the sketches are written.
            threshold: The smallest Jaccard index of two near copies.
            text_of: Returns the text or the prompt of a row by its number.
        """
        self.threshold = threshold
        self._folder = folder
        self._tables: list[BandTable] = []
        self._kept: dict[int, list[int]] = {}  # band key → kept rows that have it
        self._words_of = lru_cache(REMEMBERED)(lambda number: normal_words(text_of(number)))

    def sketch(self, rows: Iterable[tuple[int, str | list[dict]]]) -> None:
        """Sketch all rows, for each length of shingles that they can be compared in.

        Args:
            rows: (number, text or prompt), in the order of numbers.
        """
        from datasketch import MinHash  # imports scipy, which takes a second

        sketcher = MinHash(num_perm=PERMUTATIONS, hashfunc=zlib.crc32, scheme="affine32")
        lengths = range(1, LONGEST + 1)
        self._tables = [BandTable(self._folder / f"bands-{length}", length, self.threshold) for length in lengths]
        for number, text in rows:
            words = normal_words(text)
            if not words:
                continue
            for table in self._tables:
                for _, runs in of_length([words], table.length, self.threshold):
                    sketcher.clear()
                    sketcher.update_batch(as_bytes(runs))
                    table.add(number, sketcher.hashvalues.copy())
        for table in self._tables:
            table.finish()

    def find(self, number: int) -> int | None:
        """Return the kept row that a row is the nearest copy of, the first of several; or None."""
        best = (0.0, 0)
        for other in sorted({other for key in self._keys(number) for other in self._kept.get(key, ())}):
            jaccard = jaccard_index(self._words_of(number), self._words_of(other))
            if jaccard >= self.threshold:
                best = max(best, (jaccard, -other))
        return -best[1] if best[0] else None

    def keep(self, number: int) -> None:
        """Note that a row was kept."""
        for key in self._keys(number):
            self._kept.setdefault(key, []).append(number)

    def _keys(self, number: int) -> Iterator[int]:
        """Yield the band keys that a row shares with any other row."""
        for table in self._tables:
            yield from table.shared_keys(number)


class BandTable:
    """Hold, on disk, the band keys of all rows for one length of shingles."""

    def __init__(self, path: Path, length: int, threshold: float):
        """Start without rows.

        Args:
            path: The file to write.
            length: The words of a shingle.
            threshold: The smallest Jaccard index of two near copies.
        """
        self.length = length
        self._path = path
        self._handle = path.open("wb")
        self._bands, self._per_band = bands(threshold)
        self._numbers = array("q")  # of the rows, in order
        self._block: list[np.ndarray] = []  # MinHashes whose keys are not written yet
        self._keys: np.ndarray = np.zeros((0, self._bands), np.uint64)
        self._is_shared: np.ndarray = np.zeros(0, bool)

    def add(self, number: int, sketch: np.ndarray) -> None:
        """Add a row.

        Args:
            number: Its number, larger than those before.
            sketch: (permutations,), its MinHash.
        """
        self._numbers.append(number)
        self._block.append(sketch)
        if len(self._block) == BLOCK:
            self._write()

    def finish(self) -> None:
        """Find the rows that share a key with any other."""
        self._write()
        self._handle.close()
        rows = len(self._numbers)
        self._is_shared = np.zeros(rows, bool)
        if rows:
            self._keys = np.memmap(self._path, np.uint64, "r", shape=(rows, self._bands))
        for band in range(self._bands):
            column = np.array(self._keys[:, band])
            order = np.argsort(column, kind="stable")
            equal = column[order][1:] == column[order][:-1]
            self._is_shared[order[1:][equal]] = True
            self._is_shared[order[:-1][equal]] = True

    def shared_keys(self, number: int) -> list[int]:
        """Return the band keys of a row; none if no other row has any of them."""
        position = bisect_left(self._numbers, number)
        if position == len(self._numbers) or self._numbers[position] != number or not self._is_shared[position]:
            return []
        return self._keys[position].tolist()

    def _write(self) -> None:
        """Write the keys of the rows that were added last."""
        if self._block:
            keys = band_keys(np.stack(self._block), self._bands, self._per_band, self.length)
            self._handle.write(keys.tobytes())
            self._block = []


def band_keys(sketches: np.ndarray, number: int, per_band: int, length: int) -> np.ndarray:
    """Return (N, bands) keys: equal for two rows where a band of their MinHashes is equal.

    Args:
        sketches: (N, permutations), the MinHashes.
        number: The number of bands.
        per_band: Hashes of a band.
        length: The words of a shingle, which enters the keys, as the band does.
    """
    values = sketches[:, : number * per_band].astype(np.uint64).reshape(len(sketches), number, per_band)
    seeds = [hashlib.sha256(f"{length} {band}".encode()).digest()[:8] for band in range(number)]
    keys = np.tile(np.frombuffer(b"".join(seeds), "<u8").astype(np.uint64), (len(sketches), 1))
    for column in range(per_band):
        # Products of odd numbers modulo 2^64; a collision costs one exact comparison in vain.
        keys = (keys ^ values[:, :, column]) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(29)
    return keys


def jaccard_index(words: Words, others: Words) -> float:
    """Return the Jaccard index of the shingles of two texts, 0 for a text without words."""
    if not words or not others:
        return 0.0
    length = min(shingle_length(words), shingle_length(others))
    ours, theirs = shingles(words, length), shingles(others, length)
    shared = len(ours & theirs)
    return shared / (len(ours) + len(theirs) - shared)
