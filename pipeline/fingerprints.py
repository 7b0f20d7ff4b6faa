"""What a stage is made of: its settings and the digests of what it reads; and what of that changed since, in
words.

The same fingerprint = nothing to do. A manifest (and run.json, while a run is not finished) records what the
fingerprint was taken of, so that a person reads which key changed and not that a hash did.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.sections import DataSource, is_hub_id
from pipeline.stage import Source
from pipeline.store import files
from pipeline.store.digests import Digests
from pipeline.store.hub import Hub, Named, Recorded

COMMITS = ("revision", "asked_revision")  # of a name on the Hub, in a recorded config: what it was, what was asked for


@dataclass(frozen=True)
class Change:
    """One difference between what a run began with and today. Settings can be overridden, inputs cannot, nor can the
    settings that decide which rows come next (is_fixed)."""

    text: str
    is_setting: bool
    key: str = ""
    old: Any = None
    new: Any = None
    is_fixed: bool = False


@dataclass(frozen=True)
class Today:
    """What a stage would be made of now."""

    fingerprint: str
    config: dict[str, Any]
    inputs: dict[str, str]
    waiting: frozenset[str] = frozenset()  # needs that have no artifact yet, so no digest
    fixed: tuple[str | tuple[str, ...], ...] = ()  # the stage's FIXED: see pipeline/stage.py
    problems: tuple[str, ...] = ()  # names that the Hub does not know: why the stage cannot run


def all_needs(module: Any, experiment: Any) -> list[str]:
    """The upstream stages of a stage: those it names, and `world` where that writes its data."""
    needs = list(module.needs(experiment))
    from_world = any(getattr(experiment.data, kind) == "world" for kind in module.reads(experiment))
    return ["world", *needs] if from_world and "world" not in needs else needs


def describe_today(
    name: str,
    module: Any,
    experiment: Any,
    manifests: dict[str, dict[str, Any] | None],
    digests: Digests,
    hub: Hub,
    before: list[dict[str, Any]],
    anew: bool = False,
) -> Today:
    """What the stage would be made of now.

    Args:
        manifests: of the stages it needs, None where there is none yet.
        digests, hub: what this command knows of files, folders and names on the Hub.
        before: records (run.json, manifests) of the stage, then of others: where the Hub cannot be asked, the commits
            that they name stand. A name whose commit they do not hold, of an older version, stands as it is.
        anew: the stage will begin from the beginning, and such a name gets its commit.
    """
    everything = experiment.model_dump(mode="json")
    needs = all_needs(module, experiment)
    inputs = {need: manifest["digest"] for need in needs if (manifest := manifests[need]) is not None}
    data: dict[str, Any] = {}
    problems: list[str] = []
    for kind, source in sources(module, experiment).items():
        data[kind] = {"split": source.split, "subset": source.subset, "skip": source.skip, "limit": source.limit}
        data[kind]["path"] = str(source.path) if source.path else source.hub or "world"
        if source.path is not None:
            facts = digests.facts(source.path)
            inputs[f"data:{kind}"] = facts.sha256
            data[kind]["rows"] = facts.rows
        elif source.hub is not None:
            commit, problem = _commit(hub, Named("dataset", source.hub, source.revision), before, anew)
            problems += [f"data.{kind}: {problem}"] * bool(problem)
            inputs[f"data:{kind}"] = hashlib.sha256(f"{source.hub}@{commit or 'main'}".encode()).hexdigest()
            data[kind] |= {"revision": commit, "asked_revision": source.revision}
    for key, folder in folders(module, experiment).items():
        inputs[f"folder:{key}"] = digests.facts(folder).sha256
    if data:
        data["validation_fraction"] = everything["data"]["validation_fraction"]
    # the last four are recorded, and never a reason to do anything again
    recorded_keys = (name, "model", "seed", "name", "tracking", "checkpoints", "launch")
    config = {key: everything[key] for key in recorded_keys if key in everything} | {"data": data}
    model = config.get("model", {})
    asked = model.pop("revision", None)
    if (key_and_name := hub_model(module, experiment)) is not None:
        key, repository = key_and_name
        commit, problem = _commit(hub, Named("model", repository, asked), before, anew)
        problems += [f"{key}: {problem}"] * bool(problem)
        model |= {"revision": commit, "asked_revision": asked}
        if commit is not None:
            inputs[f"hub:{key}"] = commit
    fingerprint = files.sha256_json({"stage": name, **_settings(name, config), "inputs": inputs})
    waiting, fixed = frozenset(needs) - inputs.keys(), module.fixed
    return Today(fingerprint, config, inputs, waiting, fixed, tuple(problems))


def _commit(hub: Hub, thing: Named, before: list[dict[str, Any]], anew: bool) -> tuple[str | None, str]:
    """As `Hub.commit`, with what records say; (None, "") where the first that has the name has no commit."""
    known = [found for record in before for found in _recorded(record["config"], thing.kind)]
    known = [found for found in known if found.name == thing.name]
    if known and known[0].commit is None and thing.revision is None and not anew:
        return None, ""
    return hub.commit(thing, known)


def _recorded(config: dict[str, Any], kind: str) -> list[Recorded]:
    """The data sets or models, and their commits, that a recorded config names."""
    model, data = [config.get("model")], config.get("data", {}).values()
    parts, name = (model, "name_or_path") if kind == "model" else (data, "path")
    parts = [part for part in parts if isinstance(part, dict) and isinstance(part.get(name), str)]
    return [Recorded(part[name], part.get("asked_revision"), part.get("revision")) for part in parts]


def hub_model(module: Any, experiment: Any) -> tuple[str, str] | None:
    """(key, name) of the model on the Hub that a stage starts from; None where it starts from none."""
    return module.hub_model(experiment)


def sources(module: Any, experiment: Any) -> dict[str, Source]:
    """Where each kind of data that a stage reads lies. World data: a Source without a place (the artifact has
    it)."""
    found = {}
    for kind in module.reads(experiment):
        if (value := getattr(experiment.data, kind)) is not None:  # `lacking` says it where the stage is asked for
            found[kind] = source_of(value)
    return found


def lacking(module: Any, experiment: Any) -> list[str]:
    """Return a line for each kind of data that a stage reads and that the config gives none of."""
    ways = module.without
    return [
        f"data.{kind}: none is given, and {module.name} reads it; give a file or a Hub id"
        + (f", or {ways[kind]}" if kind in ways else "")
        for kind in module.reads(experiment)
        if getattr(experiment.data, kind) is None
    ]


def source_of(value: str | DataSource) -> Source:
    """What a key of `data:` names."""
    if value == "world":
        return Source()
    fields = value.model_dump() if isinstance(value, DataSource) else {"path": value}
    text = fields.pop("path")
    place = {"hub": text} if is_hub_id(text) else {"path": Path(text).expanduser()}
    return Source(**place, **fields)


def folders(module: Any, experiment: Any) -> dict[str, Path]:
    """Model folders from outside that a stage reads, by the key that names each."""
    return module.folders(experiment)


def compare(name: str, record: dict[str, Any], today: Today) -> list[Change]:
    """What differs between a manifest or run.json and today, in words. Empty if and only if the fingerprints
    are the same (inputs that are not there yet do not count)."""
    if record["fingerprint"] == today.fingerprint:
        return []
    kinds = _other_places(record["config"], today.config)
    changes = [Change(f"data.{kind} {a} → {b}", False, f"data.{kind}") for kind, (a, b) in kinds.items()]
    said = {f"data.{kind}" for kind in kinds}  # with the keys in them
    if not (_kinds(record["config"]) and _kinds(today.config)):
        said |= {"data", "data.validation_fraction"}
    old, new = (_flatten(_settings(name, config)) for config in (record["config"], today.config))
    fixed = _changed_fixed_settings(today.fixed, old, new)
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if before != after and key not in said and key.rpartition(".")[0] not in said - {"data"}:
            text = f"{key} {_short(before)} → {_short(after)}"
            changes.append(Change(text, True, key, before, after, key in fixed))
    for key in sorted(record["inputs"].keys() | today.inputs.keys()):
        before, after = record["inputs"].get(key), today.inputs.get(key)
        if before == after or key in today.waiting or key.removeprefix("data:") in kinds:
            continue
        if key == "world" and None in (before, after) and any("world" in places for places in kinds.values()):
            continue  # the change of place has said it
        digests = f"{(before or 'none')[:6]} → {(after or 'none')[:6]}"
        if key.startswith("data:"):
            kind = key.removeprefix("data:")
            facts = [config["data"].get(kind, {}) for config in (record["config"], today.config)]
            rows, commits = ([fact.get(name) for fact in facts] for name in ("rows", "revision"))
            if None not in commits:
                digests = f"commit {commits[0][:7]} → {commits[1][:7]}"
            counted = f", rows {rows[0]} → {rows[1]}" if None not in rows else ""
            text = f"data.{kind} changed ({facts[1].get('path')}, {digests}{counted})"
            changes.append(Change(text, False, f"data.{kind}"))
        elif key.startswith("folder:"):
            name = key.removeprefix("folder:")
            if name not in {change.key for change in changes}:  # else another folder is named, and that is said
                changes.append(Change(f"what lies in {name} changed ({digests})", False))
        elif key.startswith("hub:"):
            name = key.removeprefix("hub:")
            if name not in {change.key for change in changes}:  # else another model is named, and that is said
                model, *commits = today.config["model"].get("name_or_path"), before or "not known", after or "not known"
                moved = " → ".join(commit[:7] if " " not in commit else commit for commit in commits)
                changes.append(Change(f"{name} changed ({model}, commit {moved})", False))
        else:
            changes.append(Change(f"{key} artifact changed ({digests})", False))
    if not changes and not today.waiting:
        changes.append(Change("what its fingerprint is made of changed", False))
    return changes


def _changed_fixed_settings(
    fixed: tuple[str | tuple[str, ...], ...], old: dict[str, Any], new: dict[str, Any]
) -> set[str]:
    """Return the changed keys that an interrupted run cannot take over: rows would come again, or never.

    Args:
        fixed: a stage's FIXED; of several keys in a tuple only the product counts.
        old, new: the settings before and today, by dotted key.
    """
    changed = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
    found = {key for key in changed if key == "seed" or key.startswith("data.")}
    for entry in fixed:
        keys = (entry,) if isinstance(entry, str) else entry
        before, after = ([settings.get(key) for key in keys] for settings in (old, new))
        same = None not in before + after and len(keys) > 1 and math.prod(before) == math.prod(after)
        if not same:
            found |= changed & set(keys)
    return found


def _kinds(config: dict[str, Any]) -> dict[str, str]:
    """Kind of data → its path, Hub id or "world", of a recorded config."""
    facts = config.get("data", {})
    return {kind: fact.get("path") for kind, fact in facts.items() if isinstance(fact, dict)}


def _other_places(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Kinds of data that are now read and were not, or the other way, or that moved into the world or out of it."""
    before, after = _kinds(old), _kinds(new)
    pairs = {k: (before.get(k, "not read"), after.get(k, "not read")) for k in sorted(before.keys() | after.keys())}
    return {k: p for k, p in pairs.items() if p[0] != p[1] and {"world", "not read"} & set(p)}


def _settings(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """The part of a recorded config that a fingerprint is taken of. Null is as if it were not there: an optional
    setting that a later version brings leaves what is finished as it is."""
    own = {key: config[key] for key in (name, "model", "seed") if key in config}
    if "model" in own:  # commits are inputs
        own["model"] = {key: item for key, item in own["model"].items() if key not in COMMITS}
    return _without_nulls(own | {"data": _without_places(config.get("data", {}))})


def _without_nulls(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without_nulls(item) for key, item in value.items() if item is not None}


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value} if prefix else {}
    return {
        key: item
        for name, inner in value.items()
        for key, item in _flatten(inner, f"{prefix}.{name}" if prefix else name).items()
    }


def _without_places(data: dict[str, Any]) -> dict[str, Any]:
    """`data` of a recorded config without paths, row counts and commits: what counts is what the files hold (their
    digests)."""

    def kept(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: item for name, item in value.items() if name not in ("path", "rows", *COMMITS)}

    return {key: kept(value) for key, value in data.items()}


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "…"
