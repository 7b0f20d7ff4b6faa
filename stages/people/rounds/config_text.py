"""Write the config of the next round: the text of the last one's, with some settings changed.

Comments and the order of the file stay. The text is read back and must say what was meant;
otherwise the file is written anew, without the comments.
"""

import re
from collections.abc import Mapping
from typing import Any

import yaml

from pipeline.config.yaml_tree import parse_tree
from pipeline.errors import UserError

REMOVED = object()
"""Stands for a setting that is taken out."""
Changes = Mapping[str, Any]
"""Section → its new value, REMOVED, or (of a section that stays) its changed settings in a Some."""
LIKE_A_NUMBER = re.compile(r"[-+]?\.?[0-9]")
BARE = re.compile(r"[A-Za-z_]+:\s*(#.*)?")
KEY = re.compile(r"([A-Za-z_][A-Za-z0-9_]*):")


class Some(dict[str, Any]):
    """Settings of a section that change; the others stay."""


def next_text(text: str, values: Mapping[str, Any], changes: Changes, comments: Mapping[str, str]) -> str:
    """Return the text of a config with changed settings.

    Args:
        text: The text of the last round's file.
        values: What that file says, with the settings of the command line.
        changes: What changes.
        comments: Section or `section.key` → the comment that is written above it.

    Raises:
        UserError: A value cannot be written in the YAML that configs are read in.
    """
    meant = changed_values(values, changes)
    edited = edited_text(text, differing(parse_tree(text, "round").values, values, changes), meant, comments)
    if says(edited, meant):
        return edited
    sections = {key: Some(value) if isinstance(value, dict) else value for key, value in meant.items()}
    whole = edited_text("", sections, meant, comments)
    if says(whole, meant):
        return whole
    raise UserError("rounds: the config of the next round cannot be written; leave out unusual texts, and quote others")


def changed_values(values: Mapping[str, Any], changes: Changes) -> dict[str, Any]:
    """Return the values of a config after some changes."""
    result = dict(values)
    for section, value in changes.items():
        if value is REMOVED:
            result.pop(section, None)
        elif isinstance(value, Some):
            own = dict(result.get(section) or {})
            for key, item in value.items():
                if item is REMOVED:
                    own.pop(key, None)
                else:
                    own[key] = item
            if own or section in result:
                result[section] = own
        else:
            result[section] = value
    return result


def differing(written: Mapping[str, Any], values: Mapping[str, Any], changes: Changes) -> dict[str, Any]:
    """Return changes together with what the command line set on top of the file.

    Args:
        written: What the file says.
        values: The same with the settings of the command line.
        changes: What changes after those.
    """
    result = dict(changes)
    for section, value in values.items():
        own, change = written.get(section), changes.get(section, Some())
        if value == own or not isinstance(change, Some):
            continue
        if isinstance(value, dict):
            set_there = {key: item for key, item in value.items() if item != (own or {}).get(key)}
            result[section] = Some(set_there | change)
        else:
            result[section] = value
    return result


def says(text: str, meant: Mapping[str, Any]) -> bool:
    """Return whether a text, read as configs are, says what is meant; an empty section is none."""
    try:
        tree = parse_tree(text, "next round")
    except UserError:
        return False
    return not tree.problems and without_empty(tree.values) == without_empty(meant)


def without_empty(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values without sections that say nothing."""
    return {key: value for key, value in values.items() if value not in (None, {})}


# -- the text ------------------------------------------------------------------------------------


def edited_text(text: str, changes: Changes, meant: Mapping[str, Any], comments: Mapping[str, str]) -> str:
    """Return a text with some sections changed.

    Args:
        text: The text.
        changes: What changes.
        meant: What the text says in the end.
        comments: As of `next_text`.
    """
    blocks = blocks_of(text)
    for section, value in changes.items():
        old = blocks.get(section)
        if value is REMOVED:
            blocks.pop(section, None)
        elif isinstance(value, Some):
            if any(item is not REMOVED or key in "".join(old or []) for key, item in value.items()):
                whole = meant.get(section) or {}
                blocks[section] = some_lines(old, section, value, whole, comments)
        else:
            blocks[section] = [*comment_lines(comments.get(section), ""), *dumped({section: value}, "")]
    first = [section for section in ("", "name", "round", "from", "seed") if section in blocks]
    order = [*first, *(section for section in blocks if section not in first)]
    return "\n".join(line for section in order for line in blocks[section]).strip("\n") + "\n"


def blocks_of(text: str) -> dict[str, list[str]]:
    """Return the lines of each section; "" has what stands before the first."""
    blocks: dict[str, list[str]] = {"": []}
    section = ""
    pending: list[str] = []
    for line in text.splitlines():
        if match := KEY.match(line):
            section = match[1]
            blocks[section] = [*pending, line]
            pending = []
        elif line.startswith("#") or not line.strip():
            pending.append(line)  # it belongs to what follows
        else:
            blocks[section] += [*pending, line]
            pending = []
    blocks[section] += pending
    # what stands above the first section is about the whole file
    first = next((name for name in blocks if name), None)
    if first is not None and not blocks[""]:
        count = next(i for i, line in enumerate(blocks[first]) if KEY.match(line))
        blocks[""], blocks[first] = blocks[first][:count], blocks[first][count:]
    return blocks


def some_lines(
    old: list[str] | None, section: str, changed: Some, whole: Mapping[str, Any], comments: Mapping[str, str]
) -> list[str]:
    """Return the lines of a section with some settings changed.

    Args:
        old: Its lines; None for a new section.
        section: Its name.
        changed: What changes.
        whole: What it says in the end.
        comments: As of `next_text`.
    """
    old = old or [f"{section}:"]
    head = next(i for i, line in enumerate(old) if KEY.match(line))
    if not BARE.fullmatch(old[head]):  # {…} on one line
        lines = [line for key, value in whole.items() for line in setting_lines(section, key, value, "  ", comments)]
        return [*old[:head], f"{section}:", *lines]
    new = {key: value for key, value in changed.items() if value is not REMOVED}
    rest = old[head + 1 :]
    indent = next(
        (line[: len(line) - len(line.lstrip())] for line in rest if line.strip(" -") and line[0] == " "), "  "
    )
    kept: list[str] = []
    drops = False
    for line in rest:
        own = line.removeprefix(indent) if line.startswith(indent) else None
        if own is not None and (match := KEY.match(own)):
            drops = match[1] in changed
        elif not line.strip() or (own is not None and own.startswith("#")):
            drops = False
        if not drops:
            kept.append(line)
    lines = [line for key, value in new.items() for line in setting_lines(section, key, value, indent, comments)]
    return [*old[: head + 1], *lines, *kept]


def setting_lines(section: str, key: str, value: Any, indent: str, comments: Mapping[str, str]) -> list[str]:
    """Return the lines of one setting, its comment above it."""
    return [*comment_lines(comments.get(f"{section}.{key}"), indent), *dumped({key: value}, indent)]


def comment_lines(text: str | None, indent: str) -> list[str]:
    """Return a comment's lines; none of None."""
    return [] if text is None else [f"{indent}# {line}" for line in text.splitlines()]


def dumped(value: dict[str, Any], indent: str) -> list[str]:
    """Return values as lines of YAML."""
    text = yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=1000)
    return [indent + line for line in text.splitlines()]


class Dumper(yaml.SafeDumper):
    """Write YAML, and quote each text that a config would read as a number."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    """Return the node of a text."""
    style = '"' if LIKE_A_NUMBER.match(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


Dumper.add_representer(str, _text)
