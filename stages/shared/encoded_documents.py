"""Encode documents as they are read, and keep those of the training part as one run of token ids.

The ids lie in one file that every process maps into memory. Rows of any length are cut from it
when they are asked for.
"""

import os
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.documents import PackedRows, joined
from data.streams import held_out_limit, position_of
from pipeline.stage import Source
from stages.shared.inputs import GivenText, content_of, stream_records
from stages.shared.row_cache import RowCache

NAME = "documents"
"""The name of the ids in the cache."""
IDS = np.dtype(np.int32).newbyteorder("<")
"""How an id is written."""
MOST_MOVED = 2**22
"""Ids that are moved together in the file at most, unless one document has more."""


def load_training_text(given: GivenText, fraction: float, tokenizer: Any, cache: RowCache, length: int) -> PackedRows:
    """Read and encode documents, now or at an earlier start, and cut the training part into rows.

    The split is that of `split_documents`.

    Args:
        given: Where the documents are.
        fraction: The fraction to hold out (data.validation_fraction).
        tokenizer: The tokenizer.
        cache: Where their ids are kept.
        length: The number of token ids in a row.
    """

    def write(paths: dict[str, Path]) -> dict[str, Any]:
        with cache.progress(NAME, given.rows) as note:
            return {"tokens": write_training_ids(paths["ids"], given.source, fraction, tokenizer, note)}

    content = content_of(given.source)
    says = cache.entry(NAME, ("ids",), None if content is None else [content, fraction, IDS.str], write)
    if not says["tokens"]:  # an empty file cannot be mapped
        return PackedRows(np.empty(0, IDS), length)
    return PackedRows(np.memmap(cache.path(NAME, "ids"), IDS, "r"), length)


def write_training_ids(path: Path, source: Source, fraction: float, tokenizer: Any, note: Callable[[int], None]) -> int:
    """Write the ids of the training part of documents, end to end, and return their number.

    Which documents are held out is known only when all of them have been read. So all of them are
    written first, and those that are held out are then taken out.

    Args:
        path: The file.
        source: Where the documents are.
        fraction: The fraction to hold out.
        tokenizer: The tokenizer.
        note: Called with the number of documents so far, now and then.

    Raises:
        UserError: With the errors of the data.
    """
    positions, lengths = array("d"), array("q")

    def texts() -> Iterator[str]:
        for text in texts_of(source):
            positions.append(position_of(text))
            yield text

    with path.open("wb") as file:
        for ids, its in joined(tokenizer, texts()):
            file.write(ids.astype(IDS, copy=False).tobytes())
            lengths.extend(its)
            note(len(lengths))
    trains = np.asarray(positions) > held_out_limit(positions, fraction)
    return take_out(path, np.asarray(lengths), trains)


def load_held_out_text(source: Source, fraction: float, tokenizer: Any, length: int, most: int) -> list[list[int]]:
    """Return the first rows of the held-out part of documents.

    The documents are read twice, and none of them is kept: which are held out is known only when
    all have been read.

    Args:
        source: Where the documents are.
        fraction: The fraction that is held out.
        tokenizer: The tokenizer.
        length: The number of token ids in a row.
        most: Rows at most.

    Raises:
        UserError: With the errors of the data.
    """
    positions = array("d", (position_of(text) for text in texts_of(source)))
    limit = held_out_limit(positions, fraction)
    held_out = (text for text, position in zip(texts_of(source), positions, strict=True) if position <= limit)
    parts, tokens = [], 0
    for ids, _ in joined(tokenizer, held_out):
        parts.append(ids)
        tokens += len(ids)
        if tokens >= most * length:
            break
    return PackedRows(np.concatenate(parts) if parts else np.empty(0, IDS), length)[:most]


def texts_of(source: Source) -> Iterator[str]:
    """Yield the texts of documents as `stream_records` does."""
    return (document.text for document in stream_records(NAME, source))


def take_out(path: Path, lengths: np.ndarray, stays: np.ndarray) -> int:
    """Leave only the ids of some documents in a file, in their order, and return their number.

    Args:
        path: The file, with the ids of all documents end to end.
        lengths: (N,): the number of ids of each document.
        stays: (N,): True for those that stay.
    """
    left = int(lengths[stays].sum())
    if left < int(lengths.sum()):
        ids: np.ndarray = np.memmap(path, IDS, "r+")
        written = read = first = 0
        ends = np.cumsum(lengths)
        while first < len(lengths):
            # at least one document, and further ones up to MOST_MOVED ids
            last = max(first + 1, int(np.searchsorted(ends, read + MOST_MOVED, side="right")))
            chosen: np.ndarray = np.repeat(stays[first:last], lengths[first:last])
            kept = ids[read : read + len(chosen)][chosen]  # a copy: both places may overlap
            ids[written : written + len(kept)] = kept
            written, read, first = written + len(kept), read + len(chosen), last
        assert written == left
        del ids  # which writes it
        os.truncate(path, left * IDS.itemsize)
    return left
