"""Define the report on a file, and which part of a file is checked."""

from dataclasses import dataclass, field

from data.records import Demonstration, Document, Ranking, Record, prompt_key
from data.sources import Loaded, Source


@dataclass(frozen=True)
class OtherData:
    """Name data that must not share prompts with the data that are checked."""

    name: str
    """Their kind, or another name for them."""
    source: Source
    """Where they are."""


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
        verdict = ("errors", str(len(self.errors)) if self.errors else "none")
        rows = [("file", self.name), ("kind", self.kind or "not recognised"), *self.facts, verdict]
        width = max(len(label) for label, _ in rows)
        return [f"{label:<{width}}  {text}" for label, text in rows]


# ── parts of what was loaded ─────────────────────────────────────────────────────────────────────


def prompt_value(record: Record) -> str | tuple[dict, ...]:
    """Return the prompt of any record except a document."""
    assert not isinstance(record, Document)
    return record.prompt


def prompt_keys(loaded: Loaded) -> list[str]:
    """Return the key of each record's prompt."""
    return [prompt_key(prompt_value(record)) for record in loaded.records]


def prompt_locations(loaded: Loaded) -> dict[str, str]:
    """Return {key of a prompt: its last location}."""
    return dict(zip(prompt_keys(loaded), loaded.locations, strict=True))


def rankings_of(loaded: Loaded) -> list[Ranking]:
    """Return the records, all of which are rankings."""
    return [record for record in loaded.records if isinstance(record, Ranking)]


def demonstrations_of(loaded: Loaded) -> list[Demonstration]:
    """Return the records, all of which are demonstrations."""
    return [record for record in loaded.records if isinstance(record, Demonstration)]
