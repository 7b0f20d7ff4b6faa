"""Read a file of wordings: YAML, with a prompt, a response and labels for each wording.

Every value is read as text, so `yes` and `no` are words and 0 is "0"; only null is null.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from data.records import prompt_key
from data.streams import derive_seed
from data.tasks.fields import Field, Labels, Template, fields_of, parse_template, plain_text, value_of
from pipeline.errors import UserError

MOST_BYTES = 2**20
KEYS = ("name", "system", "prompt", "response", "answer", "labels", "weight")
"""Keys of a wording."""
LABEL = "label"
"""The key of the rows that `labels` is about where it does not name one."""
NULLS = ("null", "~", "")
"""What YAML writes for null."""


@dataclass(frozen=True)
class Wording:
    """Hold one way to write a prompt and a response from a row."""

    name: str
    """Its name, by which it is counted and chosen."""
    prompt: Template
    """The user's message."""
    response: Template | None
    """The assistant's message; None: it serves prompts only."""
    answer: Template | None
    """The final answer, for scorers; None: there is no response."""
    system: Template
    """The system message; empty for none."""
    labels: Labels
    """What is written in place of values."""
    weight: float
    """Its share of the rows, relative to the other weights."""


@dataclass(frozen=True)
class Wordings:
    """Hold the wordings of a file."""

    name: str
    """The name of the file, without its folder."""
    wordings: tuple[Wording, ...]
    """The wordings, at least one."""
    seed: str
    """What gives the choice of a wording for each row."""

    @cached_property
    def asked(self) -> tuple[Field, ...]:
        """Return the fields of all prompts, each once, by name: what tells rows apart."""
        fields = [field for one in self.wordings for field in fields_of((*one.system, *one.prompt))]
        by_name = {field.name: field for field in fields}
        return tuple(by_name[name] for name in sorted(by_name))

    @cached_property
    def answered(self) -> tuple[Field, ...]:
        """Return the fields of all responses and answers, each once."""
        templates = [part for one in self.wordings for part in (*(one.response or ()), *(one.answer or ()))]
        return tuple({field.name: field for field in fields_of(tuple(templates))}.values())

    def text_of(self, row: Mapping[str, Any]) -> str:
        """Return what a row says beside its answer: the values that any of the prompts asks for."""
        values = [value_of(field, row) for field in self.asked]
        return "\n".join(plain_text(one) for value in values for one in (value if isinstance(value, list) else [value]))

    def chosen(self, text: str) -> Wording:
        """Return the wording of a row: always the same one, whatever else is in the files.

        Each wording draws a number by a hash of the seed, its name and the row, and the lowest wins
        (weighted rendezvous hashing), so that a further wording takes rows from the others and
        moves none between them.

        Args:
            text: What the row says, as of `text_of`.
        """
        key = prompt_key(text)

        def drawn(wording: Wording) -> float:
            share = (derive_seed("wording", self.seed, wording.name, key) + 1) / 2**63
            return -math.log(share) / wording.weight

        return min(self.wordings, key=drawn)


def read_wordings(path: str | Path, sha256: str | None = None) -> Wordings:
    """Read a file of wordings: a list of them, or {seed, wordings}.

    Args:
        path: The file.
        sha256: The digest that it must have; None: any.

    Raises:
        UserError: With a line for every mistake.
    """
    path = Path(path).expanduser()
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a YAML file of wordings") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{path}: was edited since this command inspected it; run again")
    if len(content) > MOST_BYTES:
        raise UserError(f"{path}: has {len(content):,} bytes, more than a file of wordings may have ({MOST_BYTES:,})")
    try:
        node = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "no YAML"
        remedy = "quote texts that hold : # { or }"
        raise UserError(f"{path}{line}: cannot be parsed ({problem}); {remedy}") from None
    return Parser(path).wordings(node)


@dataclass
class Parser:
    """Make wordings of the nodes of a YAML file, and collect what is wrong with them."""

    path: Path
    """The file."""

    def __post_init__(self) -> None:
        self.problems: list[str] = []

    def wordings(self, node: yaml.Node | None) -> Wordings:
        """Return the wordings of a file; UserError with everything that is wrong with it."""
        seed, listed = "0", node
        if isinstance(node, yaml.MappingNode):
            parts = self.mapping(node, ("seed", "wordings"))
            listed = parts.get("wordings")
            if "seed" in parts:
                seed = self.text(parts["seed"], "seed") or seed
        found: list[Wording] = []
        if not isinstance(listed, yaml.SequenceNode) or not listed.value:
            self.wrong(node, "holds no list of wordings; write `- {prompt: …, response: …}`, one entry a wording")
        else:
            for number, one in enumerate(listed.value, 1):
                try:
                    found.append(self.wording(one, number))
                except ValueError as error:
                    self.wrong(one, str(error))
        names = [wording.name for wording in found]
        for name in dict.fromkeys(name for name in names if names.count(name) > 1):
            self.wrong(node, f"{names.count(name)} wordings are called {name!r}; give each its own name")
        if self.problems:
            raise UserError(self.problems)
        return Wordings(self.path.name, tuple(found), seed)

    def wording(self, node: yaml.Node, number: int) -> Wording:
        """Return a wording.

        Args:
            node: Its node.
            number: Its number in the file, which is its name if it has none.

        Raises:
            ValueError: Something is wrong with it.
        """
        if not isinstance(node, yaml.MappingNode):
            raise ValueError("a wording is {prompt, response, …}; write its keys")
        parts = self.mapping(node, KEYS)
        if "prompt" not in parts:
            raise ValueError('a wording has no prompt; add prompt: "… {key} …"')
        prompt = self.template(parts["prompt"], "prompt")
        response = self.template(parts["response"], "response") if "response" in parts else None
        for what, template in (("prompt", prompt), ("response", response)):
            if template is not None and not fields_of(template):
                raise ValueError(f"{what} holds no {{field}}, so it would be the same for every row; name a key")
        answer = self.template(parts["answer"], "answer") if "answer" in parts else None
        if answer is not None and response is None:
            raise ValueError("answer stands without a response; add response")
        if response is not None and answer is None:
            answer = self.only_field(response)
        return Wording(
            name=self.text(parts["name"], "name") if "name" in parts else str(number),
            prompt=prompt,
            response=response,
            answer=answer,
            system=self.template(parts["system"], "system") if "system" in parts else (),
            labels=self.labels(parts["labels"]) if "labels" in parts else {},
            weight=self.weight(parts["weight"]) if "weight" in parts else 1.0,
        )

    def only_field(self, response: Template) -> Template:
        """Return the one field of a response, which is its final answer.

        Raises:
            ValueError: It has several.
        """
        fields = fields_of(response)
        if len({field.name for field in fields}) > 1:
            names = ", ".join(f"{{{field.name}}}" for field in fields)
            raise ValueError(
                f"response has several fields ({names}); say which is the final answer, as answer: "
                f'"{{{fields[-1].name}}}"'
            )
        return (fields[0],)

    def labels(self, node: yaml.Node) -> dict[str, dict[str, str | None]]:
        """Return what is written in place of values, by key: {0: no} is {label: {0: no}}."""
        if not isinstance(node, yaml.MappingNode) or not node.value:
            raise ValueError('labels is no mapping; write labels: {0: "no", 1: "yes"}')
        values = self.mapping(node, None)
        inner = [value for value in values.values() if isinstance(value, yaml.MappingNode)]
        if not inner:
            return {LABEL: self.words(node)}
        if len(inner) < len(values):
            raise ValueError('labels mixes values and keys; write labels: {KEY: {0: "no", 1: "yes"}}')
        return {key: self.words(value) for key, value in values.items() if isinstance(value, yaml.MappingNode)}

    def words(self, node: yaml.MappingNode) -> dict[str, str | None]:
        """Return the words of one key's values."""
        found: dict[str, str | None] = {}
        for key, value in self.mapping(node, None).items():
            is_null = isinstance(value, yaml.ScalarNode) and value.style is None and value.value in NULLS
            found[plain_text(key)] = None if is_null else self.text(value, f"labels: {key}")
        return found

    def weight(self, node: yaml.Node) -> float:
        """Return a weight, which is above 0."""
        text = self.text(node, "weight")
        try:
            weight = float(text)
        except ValueError:
            weight = 0.0
        if not 0 < weight < math.inf:
            raise ValueError(f"weight is {text!r}; expected a number above 0")
        return weight

    def template(self, node: yaml.Node, key: str) -> Template:
        """Return a text with fields."""
        text = self.text(node, key)
        try:
            return parse_template(text)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None

    def text(self, node: yaml.Node, key: str) -> str:
        """Return the text under a key, which may not be blank."""
        if not isinstance(node, yaml.ScalarNode) or not node.value.strip():
            raise ValueError(f'{key} is no text; write {key}: "…" in quotes (a brace begins an object otherwise)')
        return node.value

    def mapping(self, node: yaml.MappingNode, known: tuple[str, ...] | None) -> dict[str, yaml.Node]:
        """Return the values of a mapping by key, and note keys that are unknown or written twice.

        Args:
            node: The mapping.
            known: The keys that it may have; None: any.
        """
        found: dict[str, yaml.Node] = {}
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else "?"
            if name in found:
                self.wrong(key, f"the key {name!r} is written twice; take one out")
            elif known is not None and name not in known:
                self.wrong(key, f"unknown key {name!r}; known are {', '.join(known)}")
            found[name] = value
        return found

    def wrong(self, node: yaml.Node | None, problem: str) -> None:
        """Note a problem, with the line."""
        line = f":{node.start_mark.line + 1}" if node is not None else ""
        self.problems.append(f"{self.path}{line}: {problem}")
