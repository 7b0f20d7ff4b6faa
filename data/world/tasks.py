"""Divide the requests of the embedded world between training and evaluation.

A task is what a request asks for (the colour of the fox), a wording is how (`what colour is the fox
?`). Half of the evaluation prompts set tasks that no training data sets; the other half set known
tasks in wordings that no training data uses. The two halves measure different things, so they are
reported apart.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

from data.world.grammar import Task

Requests = dict[str, list[tuple[str, Task]]]
"""Kind of request → (text without opener and closer, task) pairs."""
HELD_OUT_SHARE = 4
"""One task in so many is held out."""


@dataclass(frozen=True)
class Shares:
    """Hold every request of the world in exactly one of three shares."""

    training: Requests
    """Requests that documents, demonstrations, rankings and PPO prompts may use."""
    reworded: Requests
    """For each task of `training` one wording that training never uses."""
    held_out: Requests
    """Every wording of the tasks that training never sets."""


def divide(requests: dict[str, Task], rng: random.Random) -> Shares:
    """Divide the requests of a world into training, reworded and held-out shares.

    Args:
        requests: Request text → the task that it sets.
        rng: The generator that the choice is drawn from.

    Returns:
        The three shares. In each, the requests of a kind are shuffled.
    """
    reserved = _held_out_cells(requests.values(), rng)
    wordings: dict[Task, list[str]] = {}
    for text, task in requests.items():
        wordings.setdefault(task, []).append(text)
    kinds = dict.fromkeys(task.kind for task in wordings)
    training: Requests = {kind: [] for kind in kinds}
    reworded: Requests = {kind: [] for kind in kinds}
    held_out: Requests = {kind: [] for kind in kinds}
    for task, texts in wordings.items():
        rows = [(text, task) for text in texts]
        if reserved.isdisjoint(_cells(task)):
            rng.shuffle(rows)
            reworded[task.kind].append(rows.pop())
            training[task.kind].extend(rows)
        else:
            held_out[task.kind].extend(rows)
    for share in (training, reworded, held_out):
        for rows in share.values():
            rng.shuffle(rows)
    return Shares(training, reworded, held_out)


def spread_evenly(rows: list[tuple[str, Task]], count: int) -> list[tuple[str, Task]]:
    """Take `count` rows, as equally many from each task as there are.

    Tasks are the unit of every interval (`stages/evaluation/statistics.py`), so the more tasks
    there are, the narrower it is.

    Args:
        rows: (prompt, task) pairs; earlier rows of a task are taken first.
        count: The number of rows to take, at most `len(rows)`.

    Returns:
        The rows taken, the first rows of all tasks before all second ones.
    """
    seen: dict[Task, int] = {}
    rounds = []
    for position, (_, task) in enumerate(rows):
        seen[task] = seen.get(task, 0) + 1
        rounds.append((seen[task], position))
    return [rows[position] for _, position in sorted(rounds)[:count]]


def _cells(task: Task) -> set[tuple]:
    """Return the (kind, row, column) cells of a task: a cell is held out in every combination.

    A request for two facts has the cell of each, so it is held out as soon as one of them is.
    """
    if task.kind == "fact":
        return {("fact", attribute, task.entity) for attribute in task.attributes}
    row = {"story": task.mood, "list": task.category, "harm": task.act}[task.kind]
    return {(task.kind, row, task.number if task.kind == "list" else task.entity)}


def _held_out_cells(tasks: Iterable[Task], rng: random.Random) -> set[tuple]:
    """Choose one cell in HELD_OUT_SHARE of each row, at least one.

    Rows are attributes, moods, categories and acts, so training also sees each of these.

    Args:
        tasks: All tasks.
        rng: The generator that the choice is drawn from.
    """
    rows: dict[tuple, dict[tuple, None]] = {}
    for task in tasks:
        for cell in _cells(task):
            rows.setdefault(cell[:2], {})[cell] = None
    chosen: set[tuple] = set()
    for row in sorted(rows):
        cells = sorted(rows[row])
        chosen.update(rng.sample(cells, max(1, len(cells) // HELD_OUT_SHARE)))
    return chosen
