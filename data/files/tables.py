"""Read the rows of parquet and Arrow files; null means no such key."""

from __future__ import annotations

import datetime
import decimal
import io
import math
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any, BinaryIO

from data.files.reading import Reading

BATCH = 1024
"""Rows that become Python values at a time."""
PANDAS_INDEX = "__index_level_"
"""How the columns are named in which pandas writes an index without a name."""


def is_parquet(path: str | Path) -> bool:
    """Return whether a file's name ends in .parquet."""
    return Path(path).suffix.lower() == ".parquet"


def table_rows(name: str, file: BinaryIO, table_format: str, reading: Reading) -> Generator[tuple[str, dict]]:
    """Read a parquet or Arrow file row by row, a batch at a time.

    Args:
        name: The path, for locations.
        file: The open file, at its beginning; it can be read at any position.
        table_format: parquet or arrow.
        reading: Gets an error line where the file cannot be read, and for NaN.

    Yields:
        ("FILE: index I", row), I from 0. Values are those of JSON: texts in binary columns, dates
        and times become strings, decimals numbers. Bytes that are no text stay bytes, which no form
        accepts.
    """
    import pyarrow

    index = 0
    try:
        batches = parquet_batches if table_format == "parquet" else arrow_batches
        for batch in batches(file, reading):
            for row in batch.to_pylist(maps_as_pydicts="strict"):
                location = f"{name}: index {index}"
                index += 1
                try:
                    yield location, {key: item for key, item in plain(row).items() if not key.startswith(PANDAS_INDEX)}
                except ValueError as error:
                    reading.errors.append(f"{location}: {error}")
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        reading.errors.append(f"{name}: not readable as {table_format}: {first_line(error)}; write it again")


def parquet_batches(file: BinaryIO, reading: Reading) -> Iterable[Any]:
    """Yield the batches of a parquet file without reading it as a whole.

    Args:
        file: The open file.
        reading: Is told how to find the share that has been read.
    """
    from pyarrow.parquet import ParquetFile

    rows = 0
    with ParquetFile(file, buffer_size=2**20, pre_buffer=False) as table:
        number = max(1, table.metadata.num_rows)
        reading.file_share = lambda: rows / number  # bytes are read here and there
        for batch in table.iter_batches(BATCH):
            yield batch
            rows += batch.num_rows


def arrow_batches(file: BinaryIO, reading: Reading) -> Iterable[Any]:
    """Yield the batches of an Arrow file, or of an Arrow stream, which `datasets` writes.

    Args:
        file: The open file.
        reading: Is told how to find the share that has been read.
    """
    import pyarrow

    size = max(1, file.seek(0, io.SEEK_END))
    file.seek(0)
    reading.file_share = lambda: min(1.0, file.tell() / size)

    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    if is_file:
        reader = pyarrow.ipc.open_file(file)
        batches: Iterable[Any] = map(reader.get_batch, range(reader.num_record_batches))
    else:
        batches = pyarrow.ipc.open_stream(file)
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH):
            yield batch.slice(start, BATCH)


def plain(value: Any) -> Any:
    """Return a value as JSON would hold it, and without the keys that are null.

    Raises:
        ValueError: A number is NaN or infinite.
    """
    if isinstance(value, str | int) or value is None:
        return value
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float | decimal.Decimal) and not math.isfinite(value):
        raise ValueError(f"{value} is not a JSON number; use a finite number or null")
    if isinstance(value, decimal.Decimal):
        return int(value) if value == int(value) else float(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return str(value)
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value
    return value


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
