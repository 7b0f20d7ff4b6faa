"""Write texts with {fields} from the values of a row.

A text is what `str.format` takes, and less: `{premise}` is the value under a key. `{answer.text}`
and `{choices[0]}` lead into objects and lists; `{choices[label]}` is the entry of a list that
another key of the row numbers. No attribute is read and nothing is executed, and braces in the
values stay as they are.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any

from data.parsing import describe

PATH = re.compile(r"(?P<key>[^.\[\]{}]+)(?P<steps>(?:\.[^.\[\]]+|\[[^\[\]]+\])*)")
"""A key of the row, and what leads from its value into objects and lists."""
STEP = re.compile(r"\.([^.\[\]]+)|\[([^\[\]]+)\]")
LISTED = ("letters", "dashes", "lines")
"""How a list of texts is written: "A. first", "- first" or "first", one entry a line."""
LETTER = "letter"
"""How a number is written as the letter of a choice: 0 is A."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

Labels = Mapping[str, Mapping[str, str | None]]
"""Key of a row → the text of its value → what is written in its place; None leaves the row out."""


@dataclass(frozen=True)
class Field:
    """Name a value of a row, and how it is written."""

    name: str
    """What stands between the braces: "answer.text"."""
    key: str
    """The key in the row that it begins with."""
    steps: tuple[str, ...]
    """What leads from there into objects and lists."""
    style: str
    """One of LISTED, LETTER, or "" for a plain value."""


Template = tuple[str | Field, ...]
"""Texts and fields, in order."""


def parse_template(text: str) -> Template:
    """Parse a text with {fields}.

    Raises:
        ValueError: A brace is not closed, or a field is more than the name of a value.
    """
    try:
        parts = list(Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{describe(text)}: {error}; write {{{{ and }}}} for braces that are text") from None
    template: list[str | Field] = []
    for literal, name, style, conversion in parts:
        if literal:
            template.append(literal)
        if name is not None:
            template.append(parse_field(name, style or "", conversion))
    return tuple(template)


def parse_field(name: str, style: str, conversion: str | None) -> Field:
    """Parse what stands between two braces.

    Args:
        name: What stands before ":" or "!".
        style: What stands after ":".
        conversion: What stands after "!".
    """
    match = PATH.fullmatch(name)
    if match is None or name.isdecimal():
        raise ValueError(f"the field {{{name}}} names no key of a row; write {{premise}} or {{choices[0]}}")
    if conversion is not None:
        raise ValueError(f"the field {{{name}!{conversion}}} has a conversion; write {{{name}}}")
    if style not in ("", LETTER, *LISTED):
        known = ", ".join((*LISTED, LETTER))
        raise ValueError(f"the field {{{name}:{style}}} asks for {style!r}; known are {known}")
    steps = tuple(dotted or bracketed for dotted, bracketed in STEP.findall(match["steps"]))
    return Field(name, match["key"], steps, style)


def fields_of(template: Template) -> list[Field]:
    """Return the fields of a template, in order."""
    return [part for part in template if isinstance(part, Field)]


def written(template: Template, row: Mapping[str, Any], labels: Labels) -> str | None:
    """Return the text that a template makes of a row.

    Args:
        template: The template.
        row: The row.
        labels: What is written in place of values.

    Returns:
        The text; None where a label says that the row is left out.

    Raises:
        ValueError: The row lacks a key, or a value cannot be written.
    """
    parts: list[str] = []
    for part in template:
        text = part if isinstance(part, str) else written_field(part, row, labels)
        if text is None:
            return None
        parts.append(text)
    return "".join(parts)


def written_field(field: Field, row: Mapping[str, Any], labels: Labels) -> str | None:
    """Return how the value of a field is written; None where a label says to leave the row out."""
    value = value_of(field, row)
    if field.name in labels:
        known, text = labels[field.name], plain_text(value)
        if text not in known:
            raise ValueError(
                f"'{field.name}' is {describe(value)}, which labels does not name ({', '.join(known)}); add it, "
                f"or null in its place to leave such rows out"
            )
        return known[text]
    if field.style == LETTER:
        return LETTERS[index_of(value, len(LETTERS), field.name)]
    if field.style:
        return listed(value, field)
    if isinstance(value, list | dict):
        hint = f"{{{field.name}:dashes}}, or an entry as {{{field.name}[0]}}" if isinstance(value, list) else "a key"
        raise ValueError(f"'{field.name}' is {describe(value)}; write {hint}")
    return plain_text(value)


def value_of(field: Field, row: Mapping[str, Any]) -> Any:
    """Return the value that a field names.

    Args:
        field: The field.
        row: The row.

    Raises:
        ValueError: It is missing or null.
    """
    steps: tuple[str, ...] = ()
    if field.name in row:  # a key may hold dots itself
        value = row[field.name]
    elif field.key in row:
        value, steps = row[field.key], field.steps
    else:
        raise ValueError(f"the key '{field.key}' is missing or null, which {{{field.name}}} asks for; {keys_of(row)}")
    for step in steps:
        value = entry_of(value, step, field, row)
    if value is None:
        raise ValueError(f"'{field.name}' is null; leave such rows out (where), or take the field out of the wording")
    return value


def entry_of(value: Any, step: str, field: Field, row: Mapping[str, Any]) -> Any:
    """Return an entry of an object or a list.

    Args:
        value: The object or list.
        step: The key; in a list a number, or the key of the row that holds the number.
        field: The field that asks for it.
        row: The row.
    """
    if isinstance(value, Mapping) and step in value:
        return value[step]
    if isinstance(value, list):
        if step.isdecimal():
            return value[index_of(step, len(value), field.name)]
        if step in row:
            return value[index_of(row[step], len(value), step)]
    what = "has no such entry" if isinstance(value, Mapping | list) else f"leads into {describe(value)}"
    raise ValueError(f"the field {{{field.name}}} {what} ('{step}'); {keys_of(row)}")


def index_of(value: Any, count: int, name: str) -> int:
    """Return a value as an index from 0.

    Args:
        value: A number, or a text that is one.
        count: How many entries there are.
        name: The field that holds it, for the error.
    """
    text = plain_text(value)
    if not text.isdecimal() or not int(text) < count:
        raise ValueError(f"'{name}' is {describe(value)}; expected a number from 0 to {count - 1}")
    return int(text)


def listed(value: Any, field: Field) -> str:
    """Return a list of values as lines.

    Args:
        value: The value, which has to be a list.
        field: The field; its style is one of LISTED.
    """
    if not isinstance(value, list) or not value or any(isinstance(one, list | dict) or one is None for one in value):
        raise ValueError(f"'{field.name}' is {describe(value)}; {{{field.name}:{field.style}}} needs a list of texts")
    lines = [plain_text(one) for one in value]
    if field.style == "dashes":
        lines = [f"- {line}" for line in lines]
    if field.style == "letters":
        if len(lines) > len(LETTERS):
            raise ValueError(f"'{field.name}' has {len(lines)} entries, more than there are letters; write dashes")
        lines = [f"{letter}. {line}" for letter, line in zip(LETTERS, lines, strict=False)]
    return "\n".join(lines)


def plain_text(value: Any) -> str:
    """Return a value as a text; 1.0 is "1", since some tables hold whole numbers so."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def keys_of(row: Mapping[str, Any]) -> str:
    """Return what keys a row has, for an error line."""
    return f"the row has {', '.join(row) or 'no keys'}"
