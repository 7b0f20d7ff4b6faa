"""Parse a YAML file and overrides `a.b.c=value` into plain values, with the place of each.

Only a small, unsurprising part of YAML 1.2 is accepted: `1e-5` is a number, only true and false are
booleans, `0777` and `12:30:00` are strings; tags, anchors, aliases and duplicate keys are errors.
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
YAML_REMEDY = "close every bracket and quote, indent with spaces, and quote text with special characters"

_NULL = re.compile(r"|~|null|Null|NULL")
_TRUE, _FALSE = re.compile("true|True|TRUE"), re.compile("false|False|FALSE")
_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,99})")
_PASSWORD = re.compile(r"://[^/@\s]*@")  # the user and password of an address
_FLOAT = re.compile(
    r"[-+]?(([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(inf|Inf|INF))|\.(nan|NaN|NAN)"
)


@dataclass
class Tree:
    """Hold a parsed config."""

    values: dict[str, Any]
    """The plain values."""
    source: str
    """The file."""
    overrides: tuple[str, ...] = ()
    """The settings given on top of the file."""
    origins: dict[tuple, str] = field(default_factory=dict)
    """Where each key was written, by its path: "FILE:LINE" or "override a=b"."""
    problems: list[str] = field(default_factory=list)
    """Mistakes found while parsing, one line each."""

    def origin(self, path: tuple) -> str:
        """Return where a key was written, or the nearest key above it that was written."""
        while path and path not in self.origins:
            path = path[:-1]
        return self.origins.get(path, self.source)


def read_tree(path: str | Path, overrides: Iterable[str] = ()) -> Tree:
    """Parse a YAML file and apply overrides to it.

    Smaller mistakes are noted in `Tree.problems`, so that they are reported with all others.

    Raises:
        UserError: If the file cannot be parsed at all.
    """
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
    return parse_tree(text, str(path), overrides)


def parse_tree(text: str, source: str, overrides: Iterable[str] = ()) -> Tree:
    """Parse YAML text and apply overrides to it; see `read_tree`.

    Args:
        text: The YAML.
        source: Name of the file, for messages.
        overrides: Settings on top of it, `section.key=value` each.
    """
    overrides = tuple(overrides)
    tree = Tree({}, source, overrides)
    values = _parse(text, (), lambda line: f"{source}:{line}", tree)
    if isinstance(values, dict):
        tree.values = values
    elif values is not None or not tree.problems:
        raise UserError([*tree.problems, f"{source}: is not a mapping; write lines `key: value`"])
    for override in overrides:
        _apply(override, tree)
    return tree


def _parse(text: str, at: tuple, where: Callable[[int], str], tree: Tree) -> Any:
    """Parse YAML text into plain values.

    Args:
        text: The YAML.
        at: Path of the key whose value the text is; () for a whole file.
        where: Function that names the place of a line number.
        tree: Receives origins and problems.
    """
    events = yaml.parse(text, Loader=yaml.SafeLoader)  # lazy: text that nests too deep is not parsed to its end
    value, documents = None, 0
    try:
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise UserError(f"{where(_line_of(event))}: a second document begins; a file holds one experiment")
                value = _build(next(events), events, at, where, tree)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = where(mark.line + 1 if mark else 1)
        raise UserError(f"{line}: not YAML: {error.problem or error.context}; {YAML_REMEDY}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where(1)}: not YAML: {str(error).splitlines()[0]}; {YAML_REMEDY}") from None
    return value


def _build(event: yaml.Event, events: Iterator[yaml.Event], at: tuple, where: Callable[[int], str], tree: Tree) -> Any:
    """Build one value from the parser's events.

    No YAML constructors are involved, so a config cannot create arbitrary Python objects.
    """
    line = where(_line_of(event))
    _refuse_extras(event, line, tree)
    if len(at) > MAX_DEPTH:
        raise UserError(f"{line}: nested deeper than {MAX_DEPTH} levels; a config needs three")
    if at:
        tree.origins.setdefault(at, line)
    if isinstance(event, yaml.MappingStartEvent):
        mapping: dict[str, Any] = {}
        while not isinstance(key := next(events), yaml.MappingEndEvent):
            line = where(_line_of(key))
            _refuse_extras(key, line, tree)
            if not isinstance(key, yaml.ScalarEvent):
                raise UserError(f"{line}: this key is not a plain word; write `key: value`")
            inner = (*at, key.value)
            if key.value in mapping:
                tree.problems.append(
                    f"{line}: {dotted(inner)}: is set twice; {tree.origins[inner]} has it already; remove one"
                )
            tree.origins[inner] = line
            mapping[key.value] = _build(next(events), events, inner, where, tree)
        return mapping
    if isinstance(event, yaml.SequenceStartEvent):
        items: list[Any] = []
        while not isinstance(item := next(events), yaml.SequenceEndEvent):
            items.append(_build(item, events, (*at, len(items)), where, tree))
        return items
    return _scalar(event) if isinstance(event, yaml.ScalarEvent) else None


def _line_of(event: yaml.Event) -> int:
    """Return the number of the line in which an event begins, counted from 1."""
    return 1 if event.start_mark is None else event.start_mark.line + 1


def _refuse_extras(event: yaml.Event, line: str, tree: Tree) -> None:
    """Note a problem for an anchor, alias or tag."""
    if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
        tree.problems.append(f"{line}: anchors and aliases (& and *) are not supported; write the value out")
    if tag := getattr(event, "tag", None):
        tree.problems.append(f"{line}: the tag {tag} is not supported; write the plain value")


def _scalar(event: yaml.ScalarEvent) -> Any:
    """Return the value of a scalar: null, a boolean, a number or a string."""
    text = event.value
    if event.style is not None:  # quoted or a block: always text
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
    """Set `a.b.c=value` in the tree; the value is parsed as YAML."""
    where = f"override {_PASSWORD.sub('://…@', override)}"  # error lines get into logs
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
            tree.problems.append(f"{where}: {at} is {show(node)}, not a section; set {at}={{…}} as a whole")
            return
    node[path[-1]] = value
    tree.origins[path] = where


def dotted(path: tuple) -> str:
    """Return a path of keys as one dotted key."""
    return ".".join(str(part) for part in path)


def show(value: Any) -> str:
    """Return a value as error messages show it; strings and containers with their type."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    text = json.dumps(value, ensure_ascii=False)
    text = text if len(text) <= 60 else text[:57] + "…"
    return f"the string {text}" if isinstance(value, str) else text
