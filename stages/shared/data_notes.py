"""Say what a stage did not take of its data, and list it beside the artifact.

`left_out.jsonl` has a line {data, file, line, reason} for each row that `on_bad_row: drop` left
out, and {data, file, reason, rows} for each other reason why rows, or parts of them, hold nothing
of the kind. Without any there is no file.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from data.error_lines import PLACE
from data.sources import Loaded

FILE = "left_out.jsonl"
MOST_KEYS = 8
"""Keys that are not read and are named at most."""
MOST_REASONS = 3
"""Reasons why bad rows were dropped that are named at most."""


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
        if self.say is None:
            return
        if words := not_taken(loaded):
            self.say(f"{kind}: {'; '.join(words)}")
        rows = left_out_rows(kind, name, loaded)
        if rows and self.folder is not None:
            with (self.folder / FILE).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        for key, count in (("bad_rows", len(loaded.dropped)), ("left_out", loaded.left_out.total())):
            if count:
                self.figures[key] = self.figures.get(key, 0) + count


def not_taken(loaded: Loaded) -> list[str]:
    """Return what was not taken of data, in words, reason by reason."""
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
        words.append(f"{loaded.duplicates:,} repeated prompts left out")
    if loaded.unread:
        keys = [key for key, _ in loaded.unread.most_common()]
        more = f" and {len(keys) - MOST_KEYS} more" if len(keys) > MOST_KEYS else ""
        words.append(f"keys not read: {', '.join(keys[:MOST_KEYS])}{more}")
    return words


def left_out_rows(kind: str, name: str, loaded: Loaded) -> list[dict]:
    """Return the lines of left_out.jsonl.

    Args:
        kind: The kind of data.
        name: The path or the id.
        loaded: What was read.
    """
    rows: list[dict] = []
    for location, reason in loaded.dropped:
        place = PLACE.fullmatch(f"{location}: {reason}")
        row: dict = {"data": kind, "file": place["file"] if place else location}
        if place and place["line"]:
            row["line"] = int(place["line"])
        if place and place["index"]:
            row["index"] = int(place["index"])
        rows.append(row | {"reason": reason})
    for reason, count in loaded.left_out.most_common():
        rows.append({"data": kind, "file": name, "reason": reason, "rows": count})
    return rows
