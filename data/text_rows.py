"""Keep rows of token ids and labels in an Arrow file, and read them when they are asked for.

The file is mapped into memory by the library `datasets`, so that a million rows take no more of it
than those that are being read.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from data.documents import PackedRows
from data.encode import EncodedRow
from data.streams import held_out_limit, position_of
from data.turns import conversation_key

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

ROWS_AT_ONCE = 1024
"""Rows of a batch in the file."""
MOST_VALUES = 2**30
"""Token ids in a part of a column: Arrow counts those of a list in 32 bits."""
TRAINED_ON = ["input_ids", "labels"]
"""The columns that a trainer gets."""


def schema() -> pyarrow.Schema:
    """Return the columns of a file of rows.

    `position` decides on which side of the held-out split a row is. `prompt` is the JSON text of
    the row's prompt, only where the row may be held out. `taught` counts the labels.
    """
    import pyarrow as pa

    ids = pa.list_(pa.int32())
    return pa.schema(
        {"input_ids": ids, "labels": ids, "taught": pa.int32(), "position": pa.float64(), "prompt": pa.string()}
    )


def write_text_rows(target: str, rows: Iterable[EncodedRow], fraction: float, answer_tokens: array) -> None:
    """Write encoded demonstrations as an Arrow file.

    Args:
        target: The path.
        rows: The rows.
        fraction: The share of conversations that will be held out.
        answer_tokens: Gets the tokens of each answer that is taught.
    """
    import pyarrow as pa

    columns, objects = schema(), row_objects(rows, fraction, answer_tokens)
    with pa.ipc.new_stream(target, columns) as writer:
        while batch := list(islice(objects, ROWS_AT_ONCE)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=columns))


def row_objects(rows: Iterable[EncodedRow], fraction: float, answer_tokens: array) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file as objects; the arguments are those of `write_text_rows`."""
    lowest = 1.0
    for row in rows:
        lengths = [end - begin for begin, end in row.spans]
        answer_tokens.extend(lengths)
        position = position_of(conversation_key(row.turn.own_text))
        lowest = min(lowest, position)
        # the lowest of all is held out even where it is not below the fraction
        may_be_held_out = position < fraction or position == lowest
        yield {
            "input_ids": row.ids,
            "labels": row.labels,
            "taught": sum(lengths),
            "position": position,
            "prompt": json.dumps(row.turn.prompt) if may_be_held_out else None,
        }


@dataclass(eq=False)
class TextRows(Sequence[dict]):
    """Read {input_ids, labels} of rows from a data set, each when it is asked for."""

    dataset: Dataset
    """The data set, without an order of its own."""
    indices: np.ndarray
    """The index in the data set of each row."""

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.indices)

    @overload
    def __getitem__(self, at: int) -> dict: ...

    @overload
    def __getitem__(self, at: slice) -> list[dict]: ...

    def __getitem__(self, at: int | slice) -> dict | list[dict]:
        """Return a row, or several."""
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        return self._taught[int(self.indices[at])]

    @cached_property
    def _taught(self) -> Dataset:
        """The data set with the columns that a trainer gets."""
        return self.dataset.select_columns(TRAINED_ON)

    @cached_property
    def lengths(self) -> list[int]:
        """Return the tokens of each row."""
        import pyarrow.compute as pc

        return pc.list_value_length(self.dataset.data.column("input_ids")).to_numpy()[self.indices].tolist()

    def labels(self) -> int:
        """Return the number of labels, over all rows."""
        return int(self.dataset.data.column("taught").to_numpy()[self.indices].sum())

    def taken(self, order: Sequence[int]) -> Dataset:
        """Return a data set with these rows, in this order.

        Args:
            order: Indices of rows; they may repeat.
        """
        chosen = self.indices[np.asarray(order, dtype=np.int64)]
        # with a name, it need not be made of a digest of the order
        return self._taught.select(chosen, keep_in_memory=True, new_fingerprint="rows")

    def with_texts(self, texts: Sequence[list[int]], read_before: Sequence[int] = ()) -> TextRows:
        """Return these rows and, after them, rows of text of which every token is taught.

        Args:
            texts: Token ids of each row of text.
            read_before: Token ids that each of them is read after, which are not taught.
        """
        from datasets import Dataset, concatenate_datasets

        read, untaught = list(read_before), [-100] * len(read_before)
        counts = [{"taught": len(ids), "position": 1.0, "prompt": None} for ids in texts]
        more = [
            {"input_ids": read + ids, "labels": untaught + ids, **count}
            for ids, count in zip(texts, counts, strict=True)
        ]
        together = concatenate_datasets([self.dataset, Dataset.from_list(more, features=self.dataset.features)])
        first = len(self.dataset)
        return TextRows(together, np.concatenate([self.indices, np.arange(first, first + len(texts))]))


@dataclass(frozen=True)
class SplitRows:
    """The rows of a file, split by conversation."""

    train: TextRows
    """Rows to train on."""
    held_out: TextRows
    """The held-out rows."""

    def prompts(self, count: int) -> list[Any]:
        """Return the prompts of the first held-out rows, strings or lists of messages."""
        texts = self.held_out.dataset.data.column("prompt")
        return [json.loads(texts[int(i)].as_py()) for i in self.held_out.indices[:count]]


def read_text_rows(path: Path, fraction: float) -> SplitRows:
    """Map a file of rows into memory, and split them as `held_out` does.

    Args:
        path: The file.
        fraction: The share of conversations to hold out: the one that the file was written with.
    """
    from datasets import Dataset

    dataset = Dataset.from_file(str(path))
    positions = dataset.data.column("position").to_numpy()
    is_held_out = positions <= held_out_limit(positions, fraction)
    return SplitRows(
        train=TextRows(dataset, np.flatnonzero(~is_held_out)), held_out=TextRows(dataset, np.flatnonzero(is_held_out))
    )


@dataclass(eq=False)
class DocumentRows(Sequence[dict]):
    """Read {input_ids, labels} of rows of documents, in which every token is taught."""

    packed: PackedRows
    """The rows."""

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.packed)

    @overload
    def __getitem__(self, at: int) -> dict: ...

    @overload
    def __getitem__(self, at: slice) -> list[dict]: ...

    def __getitem__(self, at: int | slice) -> dict | list[dict]:
        """Return a row, or several."""
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        ids = self.packed[at]
        return {"input_ids": ids, "labels": ids}

    @property
    def lengths(self) -> list[int]:
        """Return the tokens of each row."""
        return [self.packed.length] * len(self)

    def taken(self, order: Sequence[int]) -> Dataset:
        """Return a data set with these rows, in this order.

        Its two columns are the same memory as the ids: nothing is copied.

        Args:
            order: Indices of rows; they may repeat.
        """
        import pyarrow as pa
        from datasets import Dataset
        from datasets.table import InMemoryTable

        length, chunks = self.packed.length, []
        most = max(1, MOST_VALUES // length)
        for first in range(0, len(self), most):
            count = min(most, len(self) - first)
            values = pa.array(self.packed.ids[first * length : (first + count) * length])
            offsets = pa.array(np.arange(count + 1, dtype=np.int32) * np.int32(length))
            chunks.append(pa.ListArray.from_arrays(offsets, values))
        column = pa.chunked_array(chunks, pa.list_(pa.int32()))
        table = InMemoryTable(pa.table({"input_ids": column, "labels": column}))
        # with names, they need not be made of digests of the rows and of the order
        rows = Dataset(table, fingerprint="documents")
        return rows.select(np.asarray(order, dtype=np.int64), keep_in_memory=True, new_fingerprint="rows")


# ── what a trainer needs of many rows ────────────────────────────────────────────────────────────


def lengths_of(rows: Sequence[dict]) -> list[int]:
    """Return the tokens of each row."""
    return rows.lengths if isinstance(rows, TextRows | DocumentRows) else [len(row["input_ids"]) for row in rows]


def dataset_of(rows: Sequence[dict], order: Sequence[int]) -> Dataset:
    """Return a data set with some rows.

    Args:
        rows: The rows.
        order: Indices of the rows, in order; they may repeat.
    """
    from datasets import Dataset

    if isinstance(rows, TextRows | DocumentRows):
        return rows.taken(order)
    return Dataset.from_list([rows[i] for i in order])
