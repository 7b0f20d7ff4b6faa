"""Describe a row as plain values, and compute its finding from what was measured on each seed."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from sweeps.estimates import over_seeds

from claims_rows.verdicts import NOT_RUN, Rule, combined, in_words, verdict_of
from pipeline.config.yaml_tree import read_tree
from pipeline.stage import StopFlag
from stages.page.plot import Plot

Observed = dict[int, dict]
"""Seed → what a measurement found on it, as JSON values."""
Read = Callable[[dict], float | None]
"""What was found on a seed → a number; None where it is not defined."""
Draw = Callable[[Observed], list[Plot]]
"""What was found → pictures of it, with every seed."""


@dataclass(frozen=True)
class Place:
    """Say with which config a measurement runs, and where its files go."""

    name: str
    """Name of the experiment in the config."""
    config: str
    """The config, a YAML file."""
    artifacts: str
    """Folder of finished stages."""
    lines: Path
    """Folder of the benchmarks' JSON lines; each seed has its own, as several may run at a time."""
    stop: StopFlag
    """Set by a signal."""

    def words(self, seed: int) -> list[str]:
        """Return the command line that all benchmarks have, for one seed."""
        where = ["-c", self.config, "--artifacts", self.artifacts, "--results", str(self.lines / f"seed{seed}")]
        return [*where, "--seeds", str(seed)]


def derived(place: Place, name: str, overrides: Sequence[str]) -> Place:
    """Write a config that differs from a place's own in its name and some settings.

    Args:
        place: Where the config comes from.
        name: Name of the new experiment.
        overrides: Settings as `key=value`.

    Returns:
        The same place with the new config, in the folder `configs` of the artifacts.
    """
    values = {**read_tree(place.config, list(overrides)).values, "name": name}
    path = Path(place.artifacts) / "configs" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")  # another process may be reading the file
    temporary.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    os.replace(temporary, path)
    return replace(place, name=name, config=str(path))


@dataclass(frozen=True)
class Measurement:
    """Describe what is run for one or several rows."""

    key: str
    """Its name in files."""
    what: str
    """What it runs, in a few words."""
    run: Callable[[Place, int, dict], dict]
    """(place, seed, settings) → what was found on the seed, as JSON values."""
    settings: dict[str, dict]
    """Size of `make claims` → the measurement's own settings, as JSON values."""
    config: str | None = None
    """A config of its own (from the checkout's root), in every size; None: that of the size."""
    seeds: int | None = None
    """How many of the size's seeds are enough, where each takes long; None: all."""
    micro: tuple[str, ...] | None = None
    """Settings, as `key=value`, with which the size micro runs on its config in place of the
    measurement's own, which has a real model; None: on the measurement's own."""
    version: int = 1
    """Raised where a change of the code changes what is found: kept results are then not used."""


@dataclass(frozen=True)
class Figure:
    """Describe a number that a claim is judged by."""

    name: str
    """What it is."""
    read: Read
    """What was found on a seed → the number."""
    rule: Rule
    """When the claim holds."""
    digits: int = 3
    """Decimal places."""
    share: bool = False
    """Whether it lies in [0, 1]."""


@dataclass(frozen=True)
class Row:
    """Describe a claim of a paper, and how it is measured here."""

    key: str
    """Its name on the command line."""
    part: str
    """Heading that it stands under."""
    claim: str
    """What is claimed, as a sentence."""
    source: str
    """The paper, with figure or section."""
    paper: str
    """What the paper found, in words."""
    measurement: Measurement
    """What is run for it."""
    figures: tuple[Figure, ...]
    """What it is judged by, the main figure first."""
    plots: Draw
    """What was found → its pictures."""
    note: str = ""
    """How our setting differs from the paper's, and what else must be known."""


def finding_of(row: Row, observed: Observed) -> dict[str, Any]:
    """Return what was found for a row.

    Args:
        row: The row.
        observed: What its measurement found on each seed; {} if it has not run.

    Returns:
        {"verdict", "seeds", "figures": [{"name", "value", "ci95", "by_seed", "verdict", "rule",
        "digits"}, …]}; value and ci95 are None where they cannot be computed.
    """
    figures = []
    for figure in row.figures:
        by_seed = {seed: figure.read(found) for seed, found in observed.items()}
        is_known = bool(by_seed) and None not in by_seed.values()
        found = over_seeds(list(by_seed.values()), figure.share) if is_known else {"value": None, "ci95": None}
        if figure.rule.direction == "exactly":  # no interval: one seed could refute it
            found = found | {"ci95": None}
        verdict = verdict_of(found["value"], found["ci95"], figure.rule) if observed else NOT_RUN
        figures.append(
            {
                "name": figure.name,
                "value": found["value"],
                "ci95": found["ci95"],
                "by_seed": by_seed,
                "verdict": verdict,
                "rule": in_words(figure.rule, figure.digits),
                "digits": figure.digits,
            }
        )
    main, *others = [figure["verdict"] for figure in figures]
    return {"verdict": combined(main, others), "seeds": sorted(observed), "figures": figures}


def reader(*path: Any) -> Read:
    """Return a function that reads a value by its path of keys; None where a part is missing."""

    def read(found: dict) -> float | None:
        value: Any = found
        for key in path:
            value = None if value is None else value.get(key)
        return value

    return read


def minus(ours: Read, theirs: Read) -> Read:
    """Return a function that reads the difference of two values of a seed."""

    def read(found: dict) -> float | None:
        a, b = ours(found), theirs(found)
        return None if a is None or b is None else a - b

    return read


def as_json(values: Any) -> Any:
    """Return values as they are read again from a file of JSON."""
    return json.loads(json.dumps(values))
