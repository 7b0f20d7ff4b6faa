"""Read the rows of CSV and TSV strictly."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Generator

from data.files.raw import head_of
from data.files.reading import Reading
from data.files.utf8 import decode_utf8, skip_mark

DELIMITERS = {"csv": ",", "tsv": "\t"}
NAMES = {",": "a comma", "\t": "a tab", ";": "a semicolon", "|": "a bar"}


def delimited_rows(
    name: str, handle: io.BufferedReader, delimiter: str, reading: Reading
) -> Generator[tuple[str, dict[str, str]]]:
    """Read CSV or TSV row by row; its first line names the columns.

    Every value is a string, numbers too, and JSON in a cell stays text: the form that reads a
    column knows what it holds. An empty cell counts as a missing key. A first column without a name
    that numbers the rows, as pandas writes it, is left out.

    Args:
        name: The path, for locations.
        handle: The open file.
        delimiter: What separates the cells.
        reading: Gets an error line for a missing, empty or repeated name of a column, a row with
            another number of cells, damaged quotes, and bytes that are not a text.

    Yields:
        ("FILE:LINE", row), the line being that of the row's first character.
    """
    try:
        offset = skip_mark(handle)
    except ValueError as error:
        reading.errors.append(f"{name}:1: {error}")
        return
    if head_of(handle).lstrip()[:1] in (b"{", b"["):
        reading.errors.append(f"{name}:1: holds JSON; rename the file to .jsonl or .json")
        return
    csv.field_size_limit(sys.maxsize)  # its default of 128 kB a cell is too little for documents
    lines = csv.reader(text_lines(handle, offset), delimiter=delimiter, strict=True)
    line, columns = 1, None
    try:
        for cells in lines:
            first, line = line, lines.line_num + 1
            if not cells:
                reading.blanks += 1
            elif columns is None:
                columns = cells
                if problem := header_problem(columns, delimiter):
                    reading.errors.append(f"{name}:{first}: {problem}")
                    return
            elif len(cells) != len(columns):
                problem = f"{len(cells)} cells, and the first line names {len(columns)} columns"
                reading.errors.append(f"{name}:{first}: {problem}; put cells that hold {quoted(delimiter)} in quotes")
            elif not columns[0] and not cells[0].isdecimal():
                reading.errors.append(f"{name}:{first}: column 1 has no name; name it in the first line")
            else:
                yield f"{name}:{first}", {key: cell for key, cell in zip(columns, cells, strict=True) if key and cell}
    except csv.Error as error:
        problem = f"not valid {'TSV' if delimiter == chr(9) else 'CSV'}: {error}; double the quotes inside quotes"
        reading.errors.append(f"{name}:{line}: {problem}")
        return
    except ValueError as error:
        reading.errors.append(f"{name}:{lines.line_num + 1}: {error}")
        return
    if columns is None:
        reading.errors.append(f"{name}: the file is empty; expected a line with the names of the columns")


def text_lines(handle: io.BufferedReader, offset: int) -> Generator[str]:
    """Yield the lines of a file as text, with their ends.

    Args:
        handle: The open file.
        offset: The bytes before it.

    Raises:
        ValueError: Bytes are not UTF-8, or NUL.
    """
    for raw in handle:
        yield decode_utf8(raw, offset)
        offset += len(raw)


def header_problem(columns: list[str], delimiter: str) -> str | None:
    """Return what is wrong with the names of the columns; None if nothing is.

    Args:
        columns: The cells of the first line.
        delimiter: What separates the cells.
    """
    if "" in columns[1:] or columns == [""]:
        number = columns.index("", 1) + 1 if "" in columns[1:] else 1
        return f"column {number} has no name; the first line names the columns"
    repeated = next((column for column in columns if columns.count(column) > 1), None)
    if repeated is not None:
        return f"two columns are named {repeated!r}; give each its own name"
    for other in NAMES:
        if len(columns) == 1 and other != delimiter and other in columns[0]:
            wanted = "; name the file .tsv" if other == "\t" else f"; separate them by {quoted(delimiter)}"
            return f"the columns are separated by {quoted(other)}{wanted}"
    return None


def quoted(delimiter: str) -> str:
    """Return the name of a delimiter for an error line."""
    return NAMES[delimiter]
