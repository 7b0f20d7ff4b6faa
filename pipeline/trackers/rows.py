"""Read a run's journals, while they grow, as one sequence of rows for trackers.

The order is a function of the journals alone: by step, and within a step metrics, evaluations,
samples. So a tracker that knows how many rows it has knows which one comes next.
"""

import itertools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

KINDS = ("metrics", "evaluations", "samples")
SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}  # as the journals write them


class Entry(NamedTuple):
    """One row of a tracker's run."""

    step: int
    """The step."""
    kind: str
    """metrics, evaluations or samples."""
    figures: dict[str, float]
    """Its numbers by the names that trackers show; {} for samples."""
    texts: tuple[dict[str, Any], ...] = ()
    """The samples of the step."""


class File:
    """A journal that another process appends to."""

    def __init__(self, path: Path):
        """Start at the beginning of a file, which may not exist yet."""
        self.path, self.offset = path, 0

    def new_rows(self) -> list[dict[str, Any]]:
        """Return the rows that are complete and were not returned before."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                content = file.read()
        except FileNotFoundError:
            return []
        content = content[: content.rfind(b"\n") + 1]
        self.offset += len(content)
        return [json.loads(line) for line in content.splitlines()]


class Journals:
    """The journals of one run of one stage."""

    def __init__(self, folder: Path):
        """Start at the beginning of the journals in a folder."""
        self.files = {name: File(folder / f"{name}.jsonl") for name in ("timing", *KINDS)}
        self.times: dict[int, dict[str, Any]] = {}  # rows of timing.jsonl whose step's metrics are not read yet
        self.waiting: list[tuple[int, int, dict[str, Any]]] = []  # (step, number of its kind, row), not returned yet
        self.metrics_until = 0  # the last step of metrics.jsonl that has been read

    def new_entries(self, complete: bool) -> list[Entry]:
        """Return the entries that follow those returned before.

        Args:
            complete: Whether the journals grow no more. Otherwise the newest rows wait for a later
                call (evaluations and samples for the metrics of the next step): a row that comes
                before them may not have been written yet.
        """
        # Metrics that an earlier call has seen: all that comes before them has been written by now.
        limit = (math.inf, 0) if complete else (self.metrics_until, 0)
        # The stage writes timing, metrics, evaluations, samples. Read the other way round: whoever
        # sees a row also sees what was written before it.
        for number, kind in reversed(list(enumerate(KINDS))):
            rows = self.files[kind].new_rows()
            self.waiting += [(row["step"], number, row) for row in rows]
            if kind == "metrics" and rows:
                self.metrics_until = rows[-1]["step"]
        self.times |= {row["step"]: row for row in self.files["timing"].new_rows()}
        self.waiting.sort(key=_place)
        ready = [item for item in self.waiting if _place(item) <= limit]
        self.waiting = self.waiting[len(ready) :]
        return self._entries(ready)

    def _entries(self, rows: list[tuple[int, int, dict[str, Any]]]) -> list[Entry]:
        """Return rows as entries: all samples of a step are one, a row without numbers is none."""
        entries: list[Entry] = []
        for (step, number), group in itertools.groupby(rows, key=_place):
            kind = KINDS[number]
            group_rows = [row for _, _, row in group]
            if kind == "samples":
                entries.append(Entry(step, kind, {}, tuple(group_rows)))
                continue
            for row in group_rows:
                if kind == "metrics":
                    figures = numbers(row, "train/") | numbers(self.times.pop(step, {}), "time/", always=True)
                else:
                    figures = numbers(row, "eval/", always=True)
                if figures:
                    entries.append(Entry(step, kind, figures))
        return entries


def _place(item: tuple[int, int, dict[str, Any]]) -> tuple[int, int]:
    """Return the place of a row in the sequence; rows of the same place keep their order."""
    return item[:2]


def numbers(row: dict[str, Any], prefix: str, always: bool = False) -> dict[str, float]:
    """Return the numbers of a journal's row under the names that trackers show.

    Args:
        row: The row.
        prefix: Is put before names, so that trackers group them.
        always: Also before names that have a group already (`objective/kl`).
    """
    shown = {}
    for key, value in row.items():
        value = SPECIAL.get(value, value) if isinstance(value, str) else value
        if key != "step" and isinstance(value, (int, float)):
            shown[key if "/" in key and not always else prefix + key] = float(value)
    return shown
