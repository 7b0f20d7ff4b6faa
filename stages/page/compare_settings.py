"""Find the settings in which experiments differ, and the experiments that differ only by seed."""

import json
from collections.abc import Sequence
from typing import Any

from stages.page.compare_read import Side
from stages.page.manifests import commit_of, section, shown
from stages.page.numbers import NONE
from stages.page.settings_table import order_of
from stages.page.table import Cell, Table
from stages.settings.changed import flat

MANY = 16
"""Rows above which a table is folded."""
LOCATIONS = ("path", "rows", "sha256", "revision", "asked_revision")
"""What a manifest records of data and what does not say what is in them: the digest does."""


def settings_of(side: Side, defaults: dict[str, Any]) -> dict[str, str]:
    """Return dotted key → value as text of everything that an experiment was made with.

    Args:
        side: The experiment.
        defaults: Dotted key → default, for settings that an older version did not record.
    """
    found: dict[str, dict[str, list[str]]] = {}  # key → value → the stages that ran with it
    for stage, manifest in side.manifests.items():
        values: dict[str, Any] = {"seed": manifest["seed"]}
        known = {key: value for key, value in defaults.items() if key.startswith(f"{stage}.")}
        values |= known | flat(section(manifest, stage), stage) | flat(section(manifest, "model"), "model")
        for kind, recorded in section(manifest, "data").items():
            kept = recorded
            if isinstance(recorded, dict):
                kept = {key: item for key, item in recorded.items() if key not in LOCATIONS and item is not None}
            values |= flat(kept, f"data.{kind}")
            digest = manifest["inputs"].get(f"data:{kind}")
            if digest:
                values[f"data.{kind} (content)"] = digest[:12]
        values.pop(stage, None)  # a section without settings
        for key, value in values.items():
            found.setdefault(key, {}).setdefault(shown(value), []).append(stage)
    return {key: merged(by_value) for key, by_value in found.items()}


def merged(by_value: dict[str, list[str]]) -> str:
    """Return a setting's value; if stages ran with several, each with its stages."""
    if len(by_value) == 1:
        return next(iter(by_value))
    return "; ".join(f"{value} in {', '.join(stages)}" for value, stages in by_value.items())


def differing(settings: Sequence[dict[str, str]]) -> list[str]:
    """Return the keys whose values differ between the experiments that have them."""
    keys = sorted({key for own in settings for key in own}, key=order_of)
    return [key for key in keys if len({own[key] for own in settings if key in own}) > 1]


def settings_table(sides: Sequence[Side], settings: Sequence[dict[str, str]]) -> Table | None:
    """Return the settings that differ; None if none does.

    Of settings and experiments, the more numerous are the rows.
    """
    keys, label = differing(settings), "Settings that differ"
    if not keys:
        return None
    if len(keys) < len(sides):
        by_side = tuple(
            (Cell(side.label), *(Cell(own.get(key, NONE), code=True) for key in keys))
            for side, own in zip(sides, settings, strict=True)
        )
        return Table(label, ("experiment", *keys), by_side, frozenset(range(len(keys) + 1)))
    by_key = tuple((Cell(key, code=True), *(Cell(own.get(key, NONE), code=True) for own in settings)) for key in keys)
    return table_of(label, sides, by_key, "setting")


def surroundings_table(sides: Sequence[Side]) -> Table | None:
    """Return the code, the libraries and the machines, where they differ; None if none does."""
    facts = [surroundings(side) for side in sides]
    keys = [key for key in dict.fromkeys(key for own in facts for key in own)
            if len({own.get(key, NONE) for own in facts}) > 1]  # fmt: skip
    rows = tuple((Cell(key), *(Cell(own.get(key, NONE)) for own in facts)) for key in keys)
    return table_of("Code, libraries and machines that differ", sides, rows, "") if rows else None


def surroundings(side: Side) -> dict[str, str]:
    """Return what an experiment ran with besides its settings."""
    found: dict[str, list[str]] = {}
    for manifest in side.manifests.values():
        own = {"code": commit_of(manifest, 7).removeprefix("git ")} | dict(manifest["versions"])
        own |= {key: str(manifest.get(key)) for key in ("device", "world_size", "strategy") if manifest.get(key)}
        overridden = (manifest.get("config") or {}).get("overridden") or {}
        own |= {f"{key}, changed during the run": " → ".join(map(shown, pair)) for key, pair in overridden.items()}
        for key, value in own.items():
            if value and value not in found.setdefault(key, []):
                found[key].append(value)
    return {key: ", ".join(values) for key, values in found.items() if values}


def stages_table(sides: Sequence[Side]) -> Table:
    """Return which artifact each experiment has of each stage."""
    stages = list(dict.fromkeys(stage for side in sides for stage in side.manifests))
    rows = []
    for stage in stages:
        digests = [side.manifests[stage]["digest"] if stage in side.manifests else None for side in sides]
        firsts = {digest: sides[digests.index(digest)] for digest in digests if digest is not None}
        cells = []
        for side, digest in zip(sides, digests, strict=True):
            first = firsts.get(digest) if digest is not None else None
            same = "" if first is None or first is side else f"the same as {first.label}"
            cells.append(Cell(NONE if digest is None else digest[:12], same, code=digest is not None))
        rows.append((Cell(stage), *cells))
    return table_of("Finished stages, by digest", sides, tuple(rows), "stage")


def table_of(label: str, sides: Sequence[Side], rows: tuple[tuple[Cell, ...], ...], first: str) -> Table:
    """Return a table with a column for each experiment, folded if it is long."""
    folded = f"{label}: {len(rows)}" if len(rows) > MANY else ""
    columns = (first, *(side.label for side in sides))
    return Table(label, columns, rows, frozenset(range(len(columns))), folded)


def groups_of(settings: Sequence[dict[str, str]]) -> list[list[int]]:
    """Return the experiments that differ by nothing but the seed, as lists of indices.

    Args:
        settings: What `settings_of` returns, of each experiment.
    """
    groups: dict[tuple[str, int], list[int]] = {}
    seen: list[tuple[str, str]] = []
    for index, own in enumerate(settings):
        rest = json.dumps({key: value for key, value in own.items() if key != "seed"}, sort_keys=True)
        repeated = seen.count((rest, own["seed"]))  # a second run of one seed is no further seed
        seen.append((rest, own["seed"]))
        groups.setdefault((rest, repeated), []).append(index)
    return list(groups.values())
