"""Compare what a stage was made of with what it would be made of now, in words."""

import json
import math
from dataclasses import dataclass
from typing import Any

from pipeline.fingerprints import Today, fingerprinted_settings


@dataclass(frozen=True)
class Change:
    """One difference between a recorded run and now."""

    text: str
    """The difference in words: "ppo.kl_coef 0.05 → 0.1"."""
    is_setting: bool
    """Whether it is a setting, which can be overridden; inputs cannot."""
    key: str = ""
    """The setting, or the kind of data as `data.KIND`; "" for other inputs."""
    old: Any = None
    """The recorded value of a setting."""
    new: Any = None
    """The value of the setting now."""
    is_fixed: bool = False
    """Whether it decides which rows come next, so that an interrupted run must keep it."""


def compare(name: str, record: dict[str, Any], today: Today) -> list[Change]:
    """List the differences between a manifest or run.json and now.

    Args:
        name: the stage.
        record: its manifest or run.json.
        today: what the stage would be made of now.

    Returns:
        The differences. The list is empty if the fingerprints are the same, or if they differ only
        by inputs that do not exist yet.
    """
    if record["fingerprint"] == today.fingerprint:
        return []
    moved = _moved_data(record["config"], today.config)
    changes = [Change(f"data.{kind} {old} → {new}", False, f"data.{kind}") for kind, (old, new) in moved.items()]
    changes += _setting_changes(name, record["config"], today, set(moved))
    changed_keys = {change.key for change in changes}
    for key in sorted(record["inputs"].keys() | today.inputs.keys()):
        before, after = record["inputs"].get(key), today.inputs.get(key)
        if before == after or key in today.waiting or key.removeprefix("data:") in moved:
            continue
        world_came_or_went = key == "world" and None in (before, after)
        if world_came_or_went and any("world" in locations for locations in moved.values()):
            continue  # follows from the data that moved, which is in the list
        change = _input_change(key, (before, after), record["config"], today.config, changed_keys)
        if change is not None:
            changes.append(change)
    if not changes and not today.waiting:
        changes.append(Change("its fingerprint changed", False))
    return changes


def _setting_changes(name: str, recorded_config: dict[str, Any], today: Today, moved: set[str]) -> list[Change]:
    """List the settings that changed.

    Args:
        name: the stage.
        recorded_config: the config in the manifest or run.json.
        today: what the stage would be made of now.
        moved: the kinds of data whose change of location is reported, which covers their other
            settings.
    """
    reported = {f"data.{kind}" for kind in moved}
    skipped = set(reported)
    if not (_locations(recorded_config) and _locations(today.config)):
        # one of the two reads no data at all: that validation_fraction came or went follows from it
        skipped |= {"data", "data.validation_fraction"}
    old = _flatten(fingerprinted_settings(name, recorded_config))
    new = _flatten(fingerprinted_settings(name, today.config))
    fixed = _changed_fixed_settings(today.fixed, old, new)
    changes = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if before == after or key in skipped or any(key.startswith(f"{data}.") for data in reported):
            continue
        text = f"{key} {_short(before)} → {_short(after)}"
        changes.append(Change(text, True, key, before, after, key in fixed))
    return changes


def _input_change(
    key: str,
    digests: tuple[str | None, str | None],
    old_config: dict[str, Any],
    new_config: dict[str, Any],
    changed_keys: set[str],
) -> Change | None:
    """Describe an input whose digest changed.

    Args:
        key: the input: a stage, `data:KIND`, `folder:SETTING` or `hub:SETTING`.
        digests: its recorded digest (for `hub:`, commit) and the one now; None if it was, or is,
            not an input.
        old_config: the recorded config.
        new_config: the config now.
        changed_keys: the settings that are reported as changed.

    Returns:
        The change, or None if it follows from a setting that is reported.
    """
    before, after = digests
    in_short = f"{(before or 'none')[:6]} → {(after or 'none')[:6]}"
    kind, _, name = key.partition(":")
    if kind == "data":
        old_facts, new_facts = old_config["data"].get(name, {}), new_config["data"].get(name, {})
        if "parts" in old_facts and "parts" in new_facts:
            changed = _changed_parts(old_facts["parts"], new_facts["parts"])
            return Change(f"data.{name} changed ({'; '.join(changed) or in_short})", False, f"data.{name}")
        if old_facts.get("revision") is not None and new_facts.get("revision") is not None:
            in_short = f"commit {old_facts['revision'][:7]} → {new_facts['revision'][:7]}"
        if old_facts.get("rows") is not None and new_facts.get("rows") is not None:
            in_short += f", rows {old_facts['rows']} → {new_facts['rows']}"
        return Change(f"data.{name} changed ({new_facts.get('path')}, {in_short})", False, f"data.{name}")
    if kind in ("folder", "hub") and name in changed_keys:
        return None  # another folder or model is named
    if kind == "folder":
        return Change(f"the contents of {name} changed ({in_short})", False)
    if kind == "hub":
        model = new_config["model"].get("name_or_path")
        commits = " → ".join("unknown" if commit is None else commit[:7] for commit in digests)
        return Change(f"{name} changed ({model}, commit {commits})", False)
    return Change(f"{key} artifact changed ({in_short})", False)


def _changed_parts(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return in words which parts of a mixture hold something else.

    Args:
        old, new: What was recorded of the parts, and what would be now, by number.
    """
    words = []
    for number, after in new.items():
        before = old.get(number, {})
        if before.get("sha256") == after.get("sha256"):
            continue
        digests = [before.get("revision") or before.get("sha256"), after.get("revision") or after.get("sha256")]
        text = f"{after['path']}, {' → '.join((digest or 'none')[:6] for digest in digests)}"
        if before.get("rows") is not None and after.get("rows") is not None:
            text += f", rows {before['rows']} → {after['rows']}"
        words.append(text)
    return words


def _changed_fixed_settings(
    fixed: tuple[str | tuple[str, ...], ...], old: dict[str, Any], new: dict[str, Any]
) -> set[str]:
    """Return the changed settings with which an interrupted run would repeat rows or miss some.

    Args:
        fixed: what the stage declares; only the product counts of several settings in a tuple.
        old, new: the settings before and now, by dotted key.
    """
    changed = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
    fixed_keys = {key for key in changed if key == "seed" or key.startswith("data.")}
    for entry in fixed:
        keys = (entry,) if isinstance(entry, str) else entry
        before: list[Any] = [old.get(key) for key in keys]
        after: list[Any] = [new.get(key) for key in keys]
        is_product = len(keys) > 1 and None not in before + after
        if not (is_product and math.prod(before) == math.prod(after)):
            fixed_keys |= changed & set(keys)
    return fixed_keys


def _locations(config: dict[str, Any]) -> dict[str, Any]:
    """Return the path, Hub id or "world" of each kind of data in a recorded config."""
    return {kind: facts.get("path") for kind, facts in config.get("data", {}).items() if isinstance(facts, dict)}


def _moved_data(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Return the kinds of data that came or went, or moved into the embedded world or out of it.

    A mixture with more parts, or fewer, counts too.

    Args:
        old, new: the config before and now.

    Returns:
        The location before and now of each, "not read" if there was none. Other changes of location
        do not
        count: only what the files contain does.
    """
    before, after = _locations(old), _locations(new)
    moved = {}
    for kind in sorted(before.keys() | after.keys()):
        locations = (before.get(kind, "not read"), after.get(kind, "not read"))
        parts = [config.get("data", {}).get(kind, {}).get("parts", {}).keys() for config in (old, new)]
        if locations[0] != locations[1] and ({"world", "not read"} & set(locations) or parts[0] != parts[1]):
            moved[kind] = locations
    return moved


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one with dotted keys; an empty mapping is a value."""
    if not isinstance(value, dict) or not value:
        return {prefix: value} if prefix else {}
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        flat |= _flatten(inner, f"{prefix}.{name}" if prefix else name)
    return flat


def _short(value: Any) -> str:
    """Format a setting in at most 40 characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "…"
