"""Say what a stage did not take of its data, and list it beside the artifact.

`left_out.jsonl` has a line {data, file, line, reason} for each row that `on_bad_row: drop` left
out, and for each row, or part of one, that holds nothing of the kind; if there are many of these,
the last lines count the others: {data, file, reason, rows}. Without any there is no file.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from data.error_lines import PLACE
from data.source import Loaded

FILE = "left_out.jsonl"
MOST_KEYS = 8
"""Keys that are not read and are named at most."""
MOST_REASONS = 3
"""Reasons why bad rows were dropped that are named at most."""


@dataclass(frozen=True)
class NotTaken:
    """Hold what was not taken of one kind of data, as JSON values."""

    words: list[str]
    """What was not taken, in words, reason by reason."""
    rows: list[dict]
    """The lines of left_out.jsonl."""
    figures: dict[str, int]
    """Counts for the manifest."""


@dataclass(frozen=True)
class DataNotes:
    """Take down what was not taken of data, as they are read."""

    say: Callable[[str], None] | None = None
    """Prints a line; None: nothing is said or written."""
    folder: Path | None = None
    """The folder that becomes the artifact."""
    figures: dict[str, int] = field(default_factory=dict)
    """Counts for the manifest: `bad_rows` that were dropped, and rows `left_out`; none are 0."""

    def take_down(self, kind: str, name: str, loaded: Loaded) -> None:
        """Say what was not taken of one kind of data, and write it down.

        Args:
            kind: The kind of data.
            name: The path or the id.
            loaded: What was read.
        """
        self.write_down(kind, not_taken(kind, name, loaded))

    def write_down(self, kind: str, what: NotTaken) -> None:
        """Say what was not taken of one kind of data, and write it to left_out.jsonl.

        Args:
            kind: The kind of data.
            what: What was not taken.
        """
        if self.say is None:
            return
        if what.words:
            self.say(f"{kind}: {'; '.join(what.words)}")
        if what.rows and self.folder is not None:
            with (self.folder / FILE).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in what.rows)
        for key, count in what.figures.items():
            self.figures[key] = self.figures.get(key, 0) + count


def not_taken(kind: str, name: str, loaded: Loaded) -> NotTaken:
    """Describe what was not taken of data.

    Args:
        kind: The kind of data.
        name: The path or the id.
        loaded: What was read.
    """
    counts = {"bad_rows": len(loaded.dropped), "left_out": loaded.left_out.total()}
    figures = {key: count for key, count in counts.items() if count}
    return NotTaken(words_of(kind, loaded), left_out_rows(kind, name, loaded), figures)


def words_of(kind: str, loaded: Loaded) -> list[str]:
    """Return what was not taken of data, in words, reason by reason.

    Args:
        kind: The kind of data.
        loaded: What was read.
    """
    words = []
    if loaded.dropped:
        reasons: dict[str, int] = {}
        for _, reason in loaded.dropped:
            reasons[reason] = reasons.get(reason, 0) + 1
        named = sorted(reasons, key=lambda reason: -reasons[reason])[:MOST_REASONS]
        more = f"; {len(reasons) - len(named)} more reasons" if len(reasons) > len(named) else ""
        listed = "; ".join(f"{reasons[reason]:,}: {reason}" for reason in named)
        words.append(f"{len(loaded.dropped):,} bad rows dropped ({listed}{more})")
    words += [f"left out, {line}" for line in loaded.left_out_lines()]
    if loaded.filtered:
        words.append(f"{loaded.filtered:,} rows left out by where")
    if loaded.duplicates:
        other = f", {loaded.differing:,} of them with other values than the first" if loaded.differing else ""
        words.append(f"{loaded.duplicates:,} repeated prompts left out{other}")
    if loaded.unread:
        keys = [key for key, _ in loaded.unread.most_common()]
        more = f" and {len(keys) - MOST_KEYS} more" if len(keys) > MOST_KEYS else ""
        reads = "keys that scorers alone read" if kind == "prompts" else "keys not read"
        words.append(f"{reads}: {', '.join(keys[:MOST_KEYS])}{more}")
    return words


def left_out_rows(kind: str, name: str, loaded: Loaded) -> list[dict]:
    """Return the lines of left_out.jsonl.

    Args:
        kind: The kind of data.
        name: The path or the id.
        loaded: What was read.
    """
    listed = [*loaded.dropped, *loaded.left_out_places]
    rows = [{"data": kind, **place_of(location), "reason": reason} for location, reason in listed]
    others = loaded.left_out - Counter(reason for _, reason in loaded.left_out_places)
    return rows + [
        {"data": kind, "file": name, "reason": reason, "rows": count} for reason, count in others.most_common()
    ]


def place_of(location: str) -> dict[str, str | int]:
    """Return a location as {file, line, index}; the last two only where it has them."""
    place = PLACE.fullmatch(f"{location}: ")
    if place is None:
        return {"file": location}
    numbers = {key: int(place[key]) for key in ("line", "index") if place[key]}
    return {"file": place["file"], **numbers}
