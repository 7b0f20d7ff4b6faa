"""Define the report on a file, and the limits that hold for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from data.source import Source
from data.turns import Turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class OtherData:
    """Name data that must not share prompts with the data that are checked."""

    name: str
    """Their kind, or another name for them."""
    source: Source
    """Where they are."""


@dataclass(frozen=True)
class Limits:
    """Say what lengths are counted with and what limits hold."""

    tokenizer: PreTrainedTokenizerBase | None = None
    """What lengths are counted with; None: lengths are in words or characters."""
    max_length: int | None = None
    """The limit in tokens of the section that reads the data; of prompts without the response."""
    on_too_long: str | None = "error"
    """What happens to longer rows: error, drop or truncate; None: nothing is too long."""
    response_length: int | None = None
    """ppo.response_length, with which the answers of demonstrations are compared."""
    turns: Turns = "all"
    """Which answers of demonstrations are taught."""


@dataclass
class Report:
    """Collect the facts and errors of a file."""

    name: str
    """The file, or the id of a data set."""
    kind: str | None = None
    """The kind of data; None if it was not recognised."""
    facts: list[tuple[str, str]] = field(default_factory=list)
    """(label, text), in the order in which they are printed."""
    errors: list[str] = field(default_factory=list)
    """Lines "FILE:LINE: what is wrong; what to do"."""

    def add(self, label: str, text: str) -> None:
        """Add a fact."""
        self.facts.append((label, text))

    def lines(self) -> list[str]:
        """Return the facts as a table of two columns, with the number of errors under it."""
        verdict = ("errors", f"{len(self.errors):,}" if self.errors else "none")
        rows = [("file", self.name), ("kind", self.kind or "not recognised"), *self.facts, verdict]
        width = max(len(label) for label, _ in rows)
        return [f"{label:<{width}}  {text}" for label, text in rows]
