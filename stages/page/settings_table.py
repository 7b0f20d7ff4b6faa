"""List the settings of a run that differ from their defaults."""

from typing import Any

from stages.page.manifests import Manifest, ordered, section, shown
from stages.page.table import Cell, Table
from stages.settings.changed import changed
from stages.settings.report import STAGES

COMMON = ("model", "tracking", "checkpoints", "launch")
"""The sections that every manifest records beside its stage's own."""
MANY = 12
"""Rows above which the table is folded."""


def settings_table(manifests: dict[str, Manifest], defaults: dict[str, Any]) -> Table | None:
    """List every setting that differs from its default.

    Args:
        manifests: Stage → its manifest, which records its own section and those that all share.
        defaults: Dotted key → default.

    Returns:
        The table, or None where every setting has its default.
    """
    stages_of: dict[tuple[str, str], list[str]] = {}  # (key, value as text) → stages that ran with it
    overridden: dict[str, list[Any]] = {}
    for stage, manifest in ordered(manifests):
        for key, value in changed_in(stage, manifest, defaults).items():
            stages_of.setdefault((key, shown(value)), []).append(stage)
        overridden |= (manifest.get("config") or {}).get("overridden") or {}
    keys = [key for key, _ in stages_of]
    rows = []
    for (key, value), stages in sorted(stages_of.items(), key=lambda item: order_of(item[0][0])):
        remarks = []
        if keys.count(key) > 1:
            remarks.append(f"in {', '.join(stages)}")
        if key in overridden:
            remarks.append(f"changed during the run: {' → '.join(map(shown, overridden[key]))}")
        default = Cell(shown(defaults.get(key)), code=True)
        rows.append((Cell(key, code=True), Cell(value, "; ".join(remarks), code=True), default))
    if not rows:
        return None
    label = "Settings that differ from their default"
    folded = f"{label}: {len(rows)}" if len(rows) > MANY else ""
    return Table(label, ("setting", "value", "default"), tuple(rows), frozenset({0, 1, 2}), folded)


def changed_in(stage: str, manifest: Manifest, defaults: dict[str, Any]) -> dict[str, Any]:
    """Return dotted key → value of the settings that a stage ran with and that are not defaults."""
    differing: dict[str, Any] = {}
    for name in (stage, *COMMON):
        differing |= changed(section(manifest, name), defaults, name)
    key, fraction = "data.validation_fraction", section(manifest, "data").get("validation_fraction")
    if fraction is not None and fraction != defaults.get(key):
        differing[key] = fraction
    return differing


def order_of(key: str) -> tuple[int, str]:
    """Return a setting's sort key: model and data first, then stage by stage, then by name."""
    sections = ("model", "data", *STAGES, "checkpoints", "launch", "tracking")
    name = key.split(".")[0]
    return (sections.index(name) if name in sections else len(sections), key)
