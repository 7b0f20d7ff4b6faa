"""Read the rows of one JSON array, or of one JSON object that holds rows or columns."""

from __future__ import annotations

import json
from collections.abc import Generator

from data.files.reading import Reading
from data.files.scanner import Scanner
from data.files.strict_json import explain

SPLITS = ("train", "validation", "valid", "val", "dev", "eval", "test")
WRAPPERS = frozenset(
    ("data", "rows", "examples", "instances", "items", "records", "samples", "entries", "dataset", *SPLITS)
)
"""Keys under which an object may hold a list of rows."""
METADATA = frozenset(
    (
        *("version", "info", "license", "licenses", "description", "name", "title", "author", "citation", "homepage"),
        *("features", "schema", "columns", "split", "config", "meta", "metadata", "source", "url", "language", "date"),
        *("created", "created_at", "count", "total", "size", "length", "num_rows", "num_rows_total", "num_examples"),
        *("num_rows_per_page", "partial", "truncated", "offset", "limit", "type", "format", "task", "tasks"),
    )
)
"""Keys that may stand beside the rows and say something of them all."""
MESSAGE_KEYS = frozenset(("role", "from", "content", "value", "type"))
"""Keys of messages and of their parts."""


def array_rows(name: str, scanner: Scanner, reading: Reading) -> Generator[tuple[str, object]]:
    """Yield the elements of a JSON array, decoded one by one for the line and index of each error.

    Args:
        name: The path, for locations.
        scanner: The text, at its beginning.
        reading: Gets error lines.
    """
    try:
        yield from elements(name, scanner, reading)
        line = scanner.last_line
        if scanner.peek():
            problem = "text after the array; expected one array, or one JSON object a line"
            reading.errors.append(f"{name}:{line}{scanner.place}: {problem}")
    except (ValueError, RecursionError) as error:
        reading.errors.append(document_error(name, scanner, error))


def elements(name: str, scanner: Scanner, reading: Reading) -> Generator[tuple[str, object]]:
    """Yield the elements of the array that comes next, and take its closing bracket.

    Args:
        name, scanner, reading: As of `array_rows`.

    Raises:
        ValueError: The array is empty, damaged or cut off.
    """
    scanner.take()
    if scanner.peek() == "]":
        raise ValueError("the array is empty; add at least one row")
    sign, index = ",", -1
    while sign == ",":
        index += 1
        scanner.peek()
        scanner.place = f": index {index}"
        location = f"{name}:{scanner.line()}{scanner.place}"
        value, problem = scanner.value()
        if problem:
            reading.errors.append(f"{location}: {problem}")
        else:
            yield location, value
        sign = scanner.peek()
        if sign not in (",", "]"):
            break
        scanner.take()
    if sign != "]":
        raise ValueError(after_value(sign))


def object_rows(name: str, scanner: Scanner, reading: Reading) -> Generator[tuple[str, object]]:
    """Yield the rows of objects over many lines: one that holds rows or columns, or several rows.

    A list of objects under a key of `WRAPPERS` is read row by row; only what stands beside it must
    fit into memory.

    Args:
        name, scanner, reading: As of `array_rows`.
    """
    count = 0
    try:
        while scanner.peek():
            count += 1
            location = f"{name}:{scanner.line()}"
            members: dict[str, object] = {}
            wrapped: str | None = None
            if scanner.take() != "{":
                raise ValueError("invalid JSON: text after the object; expected one object, or one a line")
            sign = "," if scanner.peek() != "}" else scanner.take()
            while sign == ",":
                key = next_key(scanner)
                if key in members or key == wrapped:
                    twice = f"the key {key!r} occurs twice in one object; keep one of them"
                    reading.errors.append(f"{location}: {twice}")
                if key in WRAPPERS and wrapped is None and scanner.opens_objects():
                    wrapped = key
                    yield from elements(name, scanner, reading)
                    scanner.place = ""
                else:
                    members[key], problem = scanner.value()
                    if problem:
                        reading.errors.append(f"{location}: {problem}")
                sign = scanner.peek()
                if sign not in (",", "}"):
                    raise ValueError(after_value(sign))
                scanner.take()
            if wrapped is not None:
                reading.errors += beside_rows(name, wrapped, members)
                if scanner.peek():
                    raise ValueError(f"text after the object with the list {wrapped!r}; expected one such object")
            elif count == 1 and not scanner.peek():
                present = {key: value for key, value in members.items() if value is not None}
                yield from rows_of_object(name, location, present, reading)
            else:
                yield location, {key: value for key, value in members.items() if value is not None}
    except (ValueError, RecursionError) as error:
        reading.errors.append(document_error(name, scanner, error))


def next_key(scanner: Scanner) -> str:
    """Take the next key of an object and the colon after it.

    Raises:
        ValueError: There is none.
    """
    key, _ = scanner.value()
    if not isinstance(key, str):
        raise ValueError("invalid JSON: a key is not a string; put it into double quotes")
    sign = scanner.take()
    if sign != ":":
        raise ValueError(f"invalid JSON: {sign!r} after the key {key!r}; expected ':'" if sign else after_value(sign))
    return key


def after_value(sign: str) -> str:
    """Return the error of a character that may not follow a value; "" is the end of the file."""
    problem = f"{sign!r} after the row" if sign else "the file is cut off after this row"
    return f"invalid JSON: {problem}; expected ',' or ']'"


def document_error(name: str, scanner: Scanner, error: Exception) -> str:
    """Return the error line of a document that cannot be read further."""
    problem = explain(error)
    if scanner.bad_line is not None:
        return f"{name}:{scanner.bad_line}: {problem}"
    line = scanner.line()
    if isinstance(error, json.JSONDecodeError):
        line = error.lineno
        if scanner.is_cut(error):
            problem = f"the file is cut off ({problem.partition(';')[0]}); write it again"
    return f"{name}:{line}{scanner.place}: {problem}"


def beside_rows(name: str, wrapped: str, members: dict) -> list[str]:
    """Return an error line if the keys beside a list of rows are not known to be metadata.

    Args:
        name: The path.
        wrapped: The key of the list.
        members: The other keys and their values.
    """
    others = [key for key in members if key not in METADATA or is_object_list(members[key])]
    if not others:
        return []
    keys = ", ".join(repr(key) for key in [wrapped, *others])
    problem = f"one object with the keys {keys}, of which only {wrapped!r} can be read as rows"
    return [f"{name}: {problem}; write the rows as JSONL, each list of rows in a file of its own"]


def rows_of_object(name: str, location: str, value: object, reading: Reading) -> Generator[tuple[str, object]]:
    """Yield the rows that the only value of a file stands for.

    Args:
        name: The path.
        location: Where the value is.
        value: Rows under a key of `WRAPPERS`; columns as lists of equal lengths, or as pandas
            writes them (`orient` columns, index, split); anything else is a row itself.
        reading: Gets an error line for columns of different lengths.
    """
    if not isinstance(value, dict) or not value:
        yield location, value
        return
    wrapped = next((key for key in value if key in WRAPPERS and is_object_list(value[key])), None)
    rows: list | None = None
    others = {key: item for key, item in value.items() if key != wrapped}
    problems = [] if wrapped is None else beside_rows(name, wrapped, others)
    if wrapped is not None and (not problems or any(map(is_object_list, others.values()))):
        reading.errors += problems
        rows = value[wrapped]
    elif is_split_orient(value):
        lengths = {len(row) for row in value["data"]}
        if lengths - {len(value["columns"])}:
            what = f"'columns' names {len(value['columns'])} columns, and a row of 'data' has another number"
            reading.errors.append(f"{name}: {what}; write the file again")
            return
        rows = [dict(zip(value["columns"], row, strict=True)) for row in value["data"]]
    elif is_column_lists(value):
        rows = rows_of_columns(name, value, reading)
    elif all(isinstance(item, dict) and item for item in value.values()):
        rows = rows_of_numbered(value)
    if rows is None:
        yield location, value
        return
    for index, row in enumerate(rows):
        present = {key: item for key, item in row.items() if item is not None} if isinstance(row, dict) else row
        yield f"{name}: index {index}", present


def is_object_list(value: object) -> bool:
    """Return whether a value is a list that begins with an object."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def is_split_orient(value: dict) -> bool:
    """Return whether an object has columns and rows as pandas writes them with orient="split"."""
    columns, data = value.get("columns"), value.get("data")
    return (
        set(value) <= {"columns", "data", "index"}
        and isinstance(columns, list)
        and all(isinstance(column, str) for column in columns)
        and isinstance(data, list)
        and all(isinstance(row, list) for row in data)
    )


CONVERSATIONS = {"messages", "conversations", "conversation", "dialogue", "dialog", "contents"}
"""Keys of a whole conversation: alone, such a list is a row and no column."""


def is_column_lists(value: dict) -> bool:
    """Return whether all values are lists, and none is a conversation: then they are columns."""
    if set(value) & CONVERSATIONS and len(value) == 1:
        return False  # one row whose conversation is a list of texts, or of pairs
    return all(isinstance(column, list) and column and not is_message(column[0]) for column in value.values())


def is_message(value: object) -> bool:
    """Return whether a value is a message of a conversation."""
    return isinstance(value, dict) and not MESSAGE_KEYS.isdisjoint(value)


def rows_of_columns(name: str, columns: dict[str, list], reading: Reading) -> list[dict]:
    """Return the rows of columns; with an error line and no rows if their lengths differ.

    Args:
        name: The path.
        columns: The columns.
        reading: Gets the error line.
    """
    if len({len(column) for column in columns.values()}) > 1:
        lengths = ", ".join(f"{key!r} has {len(column)}" for key, column in columns.items())
        problem = f"columns of different lengths: {lengths}; give each a value a row"
        reading.errors.append(f"{name}: {problem}")
        return []
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def rows_of_numbered(value: dict[str, dict]) -> list[dict] | None:
    """Return the rows of objects that pandas numbered: columns of {"0": …}, or rows under "0", ….

    Args:
        value: Objects by key.

    Returns:
        The rows; None if nothing is numbered.
    """
    if all(key.isdecimal() for key in value):
        return list(value.values())
    if not all(number.isdecimal() for column in value.values() for number in column):
        return None
    numbers = dict.fromkeys(number for column in value.values() for number in column)
    return [{key: column[number] for key, column in value.items() if number in column} for number in numbers]
