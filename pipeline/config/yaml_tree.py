"""A YAML file and `a.b.c=value` overrides in, plain values out, with where each was written.

Read is the small, unsurprising part of YAML 1.2: `1e-5` is a number, only true and false are booleans, `0777`
and `12:30:00` are strings; tags, anchors, aliases and duplicate keys are errors.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UserError

MAX_BYTES, MAX_DEPTH = 2**20, 20
YAML_REMEDY = "close every bracket and quote, indent with spaces, and put text with special signs in quotes"


_NULL = re.compile(r"|~|null|Null|NULL")
_TRUE, _FALSE = re.compile("true|True|TRUE"), re.compile("false|False|FALSE")
_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,99})")
_FLOAT = re.compile(
    r"[-+]?(([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(inf|Inf|INF))|\.(nan|NaN|NAN)"
)


@dataclass
class Tree:
    """A config as read: plain values, where each came from ("FILE:LINE" or "override a=b"), and what was
    wrong."""

    values: dict[str, Any]
    source: str
    origins: dict[tuple, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def origin(self, path: tuple) -> str:
        """Where a key was written, or the nearest key above it that was."""
        while path and path not in self.origins:
            path = path[:-1]
        return self.origins.get(path, self.source)


def read_tree(path: str | Path, overrides: Iterable[str] = ()) -> Tree:
    """Reads a YAML file and puts overrides on top. What cannot be read at all is a UserError; smaller
    mistakes are noted."""
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UserError(f"{path}: has {size:,} bytes; a config should have at most {MAX_BYTES:,}")
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); should be a YAML file") from None
    tree = Tree({}, str(path))
    values = _parse(text, (), lambda line: f"{path}:{line}", tree)
    if isinstance(values, dict):
        tree.values = values
    elif values is not None or not tree.problems:
        raise UserError([*tree.problems, f"{path}: is no mapping; should be lines `key: value`"])
    for override in overrides:
        _apply(override, tree)
    return tree


def _parse(text: str, at: tuple, where: Callable[[int], str], tree: Tree) -> Any:
    """YAML text as plain values. `at`: the key that the text is the value of; `where`: names a line."""
    events = yaml.parse(text, Loader=yaml.SafeLoader)  # lazy: what nests too deep is never parsed to its end
    value, documents = None, 0
    try:
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    line = where(event.start_mark.line + 1)
                    raise UserError(f"{line}: a second document begins; one file is one experiment")
                value = _build(next(events), events, at, where, tree)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = where(mark.line + 1 if mark else 1)
        raise UserError(f"{line}: not YAML: {error.problem or error.context}; {YAML_REMEDY}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where(1)}: not YAML: {str(error).splitlines()[0]}; {YAML_REMEDY}") from None
    return value


def _build(event: yaml.Event, events: Iterator[yaml.Event], at: tuple, where: Callable[[int], str], tree: Tree) -> Any:
    """One value from the parser's events: no constructors, so nothing can be constructed."""
    line = where(event.start_mark.line + 1)
    _refuse_extras(event, line, tree)
    if len(at) > MAX_DEPTH:
        raise UserError(f"{line}: nested deeper than {MAX_DEPTH} levels; a config needs three")
    if at:
        tree.origins.setdefault(at, line)
    if isinstance(event, yaml.MappingStartEvent):
        mapping: dict[str, Any] = {}
        while not isinstance(key := next(events), yaml.MappingEndEvent):
            line = where(key.start_mark.line + 1)
            _refuse_extras(key, line, tree)
            if not isinstance(key, yaml.ScalarEvent):
                raise UserError(f"{line}: this key is no plain word; should be `key: value`")
            inner = (*at, key.value)
            if key.value in mapping:
                tree.problems.append(f"{line}: {dotted(inner)}: stands twice; {tree.origins[inner]} has it already")
            tree.origins[inner] = line
            mapping[key.value] = _build(next(events), events, inner, where, tree)
        return mapping
    if isinstance(event, yaml.SequenceStartEvent):
        items: list[Any] = []
        while not isinstance(item := next(events), yaml.SequenceEndEvent):
            items.append(_build(item, events, (*at, len(items)), where, tree))
        return items
    return _scalar(event) if isinstance(event, yaml.ScalarEvent) else None


def _refuse_extras(event: yaml.Event, line: str, tree: Tree) -> None:
    if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
        tree.problems.append(f"{line}: anchors and aliases (& and *) are not read; write the value out")
    if getattr(event, "tag", None):
        tree.problems.append(f"{line}: the tag {event.tag} is not read; write the plain value")


def _scalar(event: yaml.ScalarEvent) -> Any:
    text = event.value
    if event.style is not None:  # quoted or a block: text, whatever it looks like
        return text
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text):
        return True
    if _FALSE.fullmatch(text):
        return False
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _apply(override: str, tree: Tree) -> None:
    """Puts `a.b.c=value` on the tree; the value is read as YAML."""
    where = f"override {override}"
    key, equals, text = override.partition("=")
    path = tuple(key.split("."))
    if not equals or not all(path):
        tree.problems.append(f"{where}: should be key=value, as in ppo.kl_coef=0.05")
        return
    for known in [known for known in tree.origins if known[: len(path)] == path]:
        del tree.origins[known]
    try:
        value = _parse(text, path, lambda line: where, tree)
    except UserError as error:
        tree.problems += error.lines
        return
    node = tree.values
    for depth, part in enumerate(path[:-1], start=1):
        if node.get(part) is None:
            tree.origins.setdefault(path[:depth], where)
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            at = dotted(path[:depth])
            tree.problems.append(f"{where}: {at} is {show(node)}, no section; set {at}={{…}} as a whole")
            return
    node[path[-1]] = value
    tree.origins[path] = where


def dotted(path: tuple) -> str:
    return ".".join(str(part) for part in path)


def show(value: Any) -> str:
    """A value in an error message, with its type where that is the point."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    text = json.dumps(value, ensure_ascii=False)
    text = text if len(text) <= 60 else text[:57] + "…"
    return f"the string {text}" if isinstance(value, str) else text
