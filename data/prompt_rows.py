"""Keep encoded prompts with their rows of data in an Arrow file, and read them one by one.

The file is mapped into memory, so that a million prompts take no more of it than those that are
being read.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from data.group_rows import Lists
from pipeline.errors import UserError

if TYPE_CHECKING:
    import pyarrow

ROWS_AT_ONCE = 1024
"""Rows of a batch in the file."""


@dataclass(frozen=True)
class EncodedPrompt:
    """Hold a prompt within the limits."""

    ids: list[int]
    """Its token ids."""
    data_row: dict
    """Its row of data, which scorers of texts read."""
    place: str
    """The location of that row, for error lines."""

    @property
    def prompt(self) -> str | list[dict]:
        """Return its text, or its messages."""
        return self.data_row["prompt"]


def schema() -> pyarrow.Schema:
    """Return the columns of a file of prompts.

    `position` decides on which side of the held-out split a prompt is.
    """
    import pyarrow as pa

    return pa.schema({"ids": pa.list_(pa.int32()), "row": pa.string(), "place": pa.string(), "position": pa.float64()})


def write_prompts(target: Path, prompts: Iterable[tuple[EncodedPrompt, float]]) -> None:
    """Write encoded prompts as an Arrow file.

    Args:
        target: The path.
        prompts: Each prompt with its position.

    Raises:
        UserError: As of `text_of`.
    """
    import pyarrow as pa

    columns = schema()
    objects = (
        {"ids": one.ids, "row": text_of(one), "place": one.place, "position": position} for one, position in prompts
    )
    with pa.ipc.new_file(str(target), columns) as writer:
        while batch := list(islice(objects, ROWS_AT_ONCE)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=columns))


def text_of(prompt: EncodedPrompt) -> str:
    """Return the row of data of a prompt as a text, of which `row_of` makes the same row again.

    That is JSON, or a Python literal of a row with what JSON has not: tables may hold bytes, and
    keys that are numbers.

    Raises:
        UserError: The row holds something else.
    """
    row = prompt.data_row
    if is_json(row):
        return json.dumps(row)
    text = " " + repr(row)  # JSON begins without a blank
    with suppress(ValueError, SyntaxError):
        if row_of(text) == row:
            return text
    raise UserError([f"{prompt.place}: the row holds values that are no JSON; write it without them"])


def row_of(text: str) -> dict:
    """Return the row of data that a text of `text_of` stands for."""
    return ast.literal_eval(text[1:]) if text.startswith(" ") else json.loads(text)


def is_json(value: object) -> bool:
    """Return whether a value reads back from its JSON text as the same value."""
    if isinstance(value, dict):
        return all(type(key) is str and is_json(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(is_json, value))
    return value is None or type(value) in (str, int, float, bool)


@dataclass(eq=False)
class PromptRows(Sequence[EncodedPrompt]):
    """Read prompts from a file, each when it is asked for."""

    reader: Any
    """pyarrow's RecordBatchFileReader."""
    indices: np.ndarray
    """The number in the file of each prompt."""
    _batches: dict[int, tuple[Any, Lists]] = field(default_factory=dict)
    """Batches that have been read, with their token ids; they hold no memory but the file's own."""

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self.indices)

    @overload
    def __getitem__(self, at: int) -> EncodedPrompt: ...

    @overload
    def __getitem__(self, at: slice) -> list[EncodedPrompt]: ...

    def __getitem__(self, at: int | slice) -> EncodedPrompt | list[EncodedPrompt]:
        """Return a prompt, or several."""
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        batch, ids, i = self._place(at)
        return EncodedPrompt(
            ids=ids[i], data_row=row_of(batch.column("row")[i].as_py()), place=batch.column("place")[i].as_py()
        )

    def ids(self, at: int) -> list[int]:
        """Return the token ids of a prompt alone."""
        _, ids, i = self._place(at)
        return ids[i]

    def _place(self, at: int) -> tuple[Any, Lists, int]:
        """Return the batch that holds a prompt, the batch's token ids, and its number there."""
        number, i = divmod(int(self.indices[at]), ROWS_AT_ONCE)
        if number not in self._batches:
            batch = self.reader.get_batch(number)
            self._batches[number] = batch, Lists.of(batch.column("ids"))
        return *self._batches[number], i


def read_prompts(path: Path) -> tuple[PromptRows, np.ndarray]:
    """Map a file of prompts into memory.

    Args:
        path: The file.

    Returns:
        The prompts, in their order, and the position of each.
    """
    import pyarrow as pa

    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    parts = [reader.get_batch(i).column("position").to_numpy() for i in range(reader.num_record_batches)]
    positions = np.concatenate(parts) if parts else np.empty(0)
    return PromptRows(reader, np.arange(len(positions))), positions


def part_of(prompts: PromptRows, chosen: np.ndarray) -> PromptRows:
    """Return some of the prompts.

    Args:
        prompts: The prompts.
        chosen: Their indices, or a mask.
    """
    return PromptRows(prompts.reader, prompts.indices[chosen])
