"""Keep rows on disk while they are sifted, so that memory holds only digests of them."""

import json
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data.records import Record, to_json

PROTECTED = "protected"
"""Stands for the kind of evaluation prompts that training must not hold."""
UNREAD = "unread"
"""Stands for the kind of a row of which reading made no record."""


class Row(NamedTuple):
    """Hold a row of the input."""

    number: int
    """Its position among all rows, from 0."""
    kind: str
    """The kind of its file, PROTECTED or UNREAD."""
    place: str
    """Where it is: FILE:LINE, or with an index."""
    value: dict
    """Its record as JSON; of an UNREAD row {"reason": …}."""

    @property
    def user(self) -> str | None:
        """Return who wrote the prompt, if that is known."""
        return self.value.get("user_id")

    @property
    def text(self) -> str | list[dict]:
        """Return the prompt, or the text of a document."""
        return self.value["text"] if self.kind == "documents" else self.value["prompt"]


class Spool:
    """Write rows to a file and read them again, in order or one at a time."""

    def __init__(self, path: Path):
        """Create the file.

        Args:
            path: The file.
        """
        self._handle = path.open("w+b")
        self._starts = array("Q")  # where each row starts, in bytes
        self._end = 0

    def __len__(self) -> int:
        return len(self._starts)

    def add(self, kind: str, place: str, value: Record | dict) -> None:
        """Append a row; the spool must not have been read yet."""
        row = value if isinstance(value, dict) else to_json(value)
        line = json.dumps([kind, place, row], ensure_ascii=False).encode() + b"\n"
        self._handle.write(line)
        self._starts.append(self._end)
        self._end += len(line)

    def __getitem__(self, number: int) -> Row:
        self._handle.seek(self._starts[number])
        return Row(number, *json.loads(self._handle.readline()))

    def __iter__(self) -> Iterator[Row]:
        for number in range(len(self)):
            yield self[number]

    def close(self) -> None:
        """Close the file."""
        self._handle.close()


# ── texts ────────────────────────────────────────────────────────────────────────────────────────


def texts_of(value: dict) -> dict[str, str]:
    """Return {where: text} of all texts of a record, such as {"prompt": …, "responses[0]": …}.

    Args:
        value: The record as JSON. Its `meta` counts: logs have addresses there.
    """
    texts: dict[str, str] = {}
    for key in ("prompt", "text", "completion", "responses", "meta"):
        if value.get(key) is not None:
            collect_texts(value[key], key, texts)
    return texts


def collect_texts(value: object, where: str, texts: dict[str, str]) -> None:
    """Add the texts inside a value.

    Args:
        value: A text, a list, an object, or anything else, which holds no text.
        where: Its place.
        texts: {where: text}, to which is added.
    """
    if isinstance(value, str):
        texts[where] = value
    elif isinstance(value, list):
        for i, item in enumerate(value):
            collect_texts(item, f"{where}[{i}]", texts)
    elif isinstance(value, dict):
        for key, item in value.items():
            collect_texts(item, f"{where}.{key}", texts)


def with_texts(value: dict, texts: dict[str, str]) -> dict:
    """Return a record with other texts.

    Args:
        value: The record as JSON.
        texts: {where: text} of those that change.
    """
    keys = {re.split(r"[.\[]", where)[0] for where in texts}
    return {key: replaced(item, key, texts) if key in keys else item for key, item in value.items()}


def replaced(value: object, where: str, texts: dict[str, str]) -> object:
    """Return a value with other texts inside.

    Args:
        value: As of `collect_texts`.
        where: Its place.
        texts: {where: text} of those that change.
    """
    if isinstance(value, str):
        return texts.get(where, value)
    if isinstance(value, list):
        return [replaced(item, f"{where}[{i}]", texts) for i, item in enumerate(value)]
    if isinstance(value, dict):
        return {key: replaced(item, f"{where}.{key}", texts) for key, item in value.items()}
    return value
