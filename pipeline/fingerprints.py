"""Describe what a stage is made of: its settings and the digests of everything that it reads.

If the fingerprint of that description is the recorded one, there is nothing to do. Manifests (and
run.json, while a run is not finished) record the description too, so that people can read which key
has changed (`changes.py`).
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.sections import RANKED, DataSource, is_hub_id
from pipeline.stage import Source, Stage
from pipeline.store import integrity
from pipeline.store.digests import Digests
from pipeline.store.hub import Hub, HubName, RecordedCommit

# Keys of a recorded config for a name on the Hub: the commit, and the revision that was asked for.
COMMIT_KEYS = ("revision", "asked_revision")


@dataclass(frozen=True)
class Today:
    """Describe the settings and inputs that a stage would run with now."""

    fingerprint: str
    """Digest of the stage's settings and inputs."""
    config: dict[str, Any]
    """The settings that the manifest would record."""
    inputs: dict[str, str]
    """Digest of each input (a stage, `data:KIND`, `folder:SETTING`) or commit (`hub:SETTING`)."""
    waiting: frozenset[str] = frozenset()
    """Stages that it needs and that have no artifact yet, so no digest."""
    fixed: tuple[str | tuple[str, ...], ...] = ()
    """The settings that an interrupted run must keep: see pipeline/stage.py."""
    problems: tuple[str, ...] = ()
    """An error line for each name that the Hub does not know: with any, the stage cannot run."""


def all_needs(stage: Stage, experiment: Any) -> list[str]:
    """Return the stages that a stage needs: those it names, and `world` if that writes its data."""
    needs = list(stage.needs(experiment))
    from_world = any(getattr(experiment.data, kind) == "world" for kind in stage.reads(experiment))
    return ["world", *needs] if from_world and "world" not in needs else needs


def describe_today(
    name: str,
    stage: Stage,
    experiment: Any,
    manifests: dict[str, dict[str, Any] | None],
    digests: Digests,
    hub: Hub,
    records: list[dict[str, Any]],
    from_scratch: bool = False,
    shown: dict[str, str] | None = None,
) -> Today:
    """Describe what a stage would be made of now.

    Args:
        name: the stage.
        stage: its declaration.
        experiment: the validated config.
        manifests: of the stages that it needs; None if there is none yet.
        digests: of files and folders, as far as this command has computed them.
        hub: commits of names on the Hub, as far as this command has looked them up.
        records: run.json and manifests of the stage, then of others. If the Hub cannot be reached,
            their commits are used. A name whose commit they do not contain, because they are of an
            older version, keeps none.
        from_scratch: the stage will start from the beginning, and such a name gets its commit now.
        shown: digests of the artifacts that it reads although it does not need them.
    """
    everything = stage.view(experiment).model_dump(mode="json")
    if stage.section:
        everything[name] = everything[stage.section]
    needs = all_needs(stage, experiment)
    inputs = {need: manifest["digest"] for need in needs if (manifest := manifests[need]) is not None}
    inputs |= shown or {}
    data: dict[str, Any] = {}
    problems: list[str] = []
    for kind, source in sources(stage, experiment).items():
        described = []
        for part in source.parts or (source,):
            commit, problem = None, ""
            if part.hub is not None:
                hub_name = HubName("dataset", part.hub, part.revision)
                commit, problem = _resolve_commit(hub, hub_name, records, from_scratch)
            if problem:
                problems.append(f"data.{kind}: {problem}")
            described.append(_describe_source(part, commit, digests))
            described[-1][0].update(aside_digests(part, digests))
        if source.parts:
            parts = {str(number): record | {"sha256": digest} for number, (record, digest) in enumerate(described, 1)}
            data[kind] = {"path": " + ".join(record["path"] for record, _ in described), "parts": parts}
            inputs[f"data:{kind}"] = integrity.sha256_json([digest for _, digest in described])
        else:
            data[kind], digest = described[0]
            if digest is not None:
                inputs[f"data:{kind}"] = digest
    for key, folder in stage.folders(experiment).items():
        inputs[f"folder:{key}"] = digests.facts(folder).sha256
    if data:
        data["validation_fraction"] = everything["data"]["validation_fraction"]
    # what follows the seed is recorded, but is no reason to redo anything
    recorded_keys = (name, "model", "seed", "name", "tracking", "checkpoints", "launch")
    config = {key: everything[key] for key in recorded_keys if key in everything} | {"data": data}
    if everything.get("round") is not None:
        config["round"] = everything["round"]
    model = config.get("model", {})
    revision = model.pop("revision", None)
    if (key_and_name := stage.hub_model(experiment)) is not None:
        key, repository = key_and_name
        commit, problem = _resolve_commit(hub, HubName("model", repository, revision), records, from_scratch)
        if problem:
            problems.append(f"{key}: {problem}")
        model |= {"revision": commit, "asked_revision": revision}
        if commit is not None:
            inputs[f"hub:{key}"] = commit
    fingerprint = integrity.sha256_json({"stage": name, **fingerprinted_settings(name, config), "inputs": inputs})
    waiting, fixed = frozenset(needs) - inputs.keys(), stage.fixed
    return Today(fingerprint, config, inputs, waiting, fixed, tuple(problems))


def _describe_source(source: Source, commit: str | None, digests: Digests) -> tuple[dict[str, Any], str | None]:
    """Describe a single source: return its record for the manifest and its content digest.

    Args:
        source: the source.
        commit: its commit on the Hub; None if it is unknown or not on the Hub.
        digests: of files and folders, as far as this command has computed them.

    Returns:
        The record, and the digest; None for data that the stage `world` writes.
    """
    record: dict[str, Any] = {
        "split": source.split,
        "subset": source.subset,
        "skip": source.skip,
        "limit": source.limit,
    }
    record |= source.reading
    record["path"] = str(source.path) if source.path else source.hub or "world"
    if source.path is not None:
        facts = digests.facts(source.path)
        return record | {"rows": facts.rows}, facts.sha256
    if source.hub is not None:
        digest = hashlib.sha256(f"{source.hub}@{commit or 'main'}".encode()).hexdigest()
        return record | {"revision": commit, "asked_revision": source.revision}, digest
    return record, None


def aside_digests(source: Source, digests: Digests) -> dict[str, str]:
    """Return the digests of the files that a source names beside its own, by the reader's names.

    Args:
        source: The source; not a mixture.
        digests: Of files, as far as this command has computed them.
    """
    return {f"{name}_sha256": digests.facts(path).sha256 for name, path in files_beside(source).items()}


def files_beside(source: Source) -> dict[str, Path]:
    """Return the files that a source names beside its own: `wordings` and `shots`.

    Args:
        source: The source; not a mixture.
    """
    named = {"wordings": source.reading.get("wordings"), "shots": source.reading.get("shots_from")}
    return {name: Path(text).expanduser() for name, text in named.items() if text is not None}


def _resolve_commit(
    hub: Hub, name: HubName, records: list[dict[str, Any]], from_scratch: bool
) -> tuple[str | None, str]:
    """Resolve a name on the Hub with the help of earlier records.

    Returns:
        As `Hub.commit`; (None, "") if the first record of the name is of an older version, without
        a commit.
    """
    known = []
    for record in records:
        commits = _recorded_commits(record["config"], name.kind)
        known += [commit for commit in commits if commit.name == name.name]
    # without this exception, a new version of this program would make such stages stale
    if known and known[0].commit is None and name.revision is None and not from_scratch:
        return None, ""
    return hub.commit(name, known)


def _recorded_commits(config: dict[str, Any], kind: str) -> list[RecordedCommit]:
    """Return the data sets or models in a recorded config, with their commits."""
    if kind == "model":
        entries, key = [config.get("model")], "name_or_path"
    else:
        entries, key = [], "path"
        for entry in config.get("data", {}).values():
            entries += list(entry.get("parts", {}).values()) or [entry] if isinstance(entry, dict) else []
    return [
        RecordedCommit(entry[key], entry.get("asked_revision"), entry.get("revision"))
        for entry in entries
        if isinstance(entry, dict) and isinstance(entry.get(key), str)
    ]


def sources(stage: Stage, experiment: Any) -> dict[str, Source]:
    """Return the source of each kind of data that a stage reads.

    For data of the embedded world it is an empty Source: the stage `world` writes the files.
    """
    by_kind = {}
    for kind in stage.reads(experiment):
        if kind == "rankings" and experiment.waits_for_people:
            continue  # `missing_data` reports this, too
        if (value := getattr(experiment.data, kind)) is not None:  # `missing_data` reports it
            by_kind[kind] = source_of(value, experiment.ranked if kind == "rankings" else None)
    return by_kind


def missing_data(stage: Stage, experiment: Any) -> list[str]:
    """Return an error line for each kind of data that a stage reads and the config lacks."""
    ways = stage.without
    if "rankings" in stage.reads(experiment) and experiment.waits_for_people:
        return ["data.rankings: ranked, but nobody has ranked anything yet; `rlhf rank -c CONFIG` opens the page"]
    return [
        f"data.{kind}: none is given, and {stage.name} reads it; give a file or a Hub id"
        + (f", or {ways[kind]}" if kind in ways else "")
        for kind in stage.reads(experiment)
        if getattr(experiment.data, kind) is None
    ]


def source_of(value: str | DataSource | list[str | DataSource], ranked: Path | None = None) -> Source:
    """Return the source that a key of the config's section `data` names.

    Args:
        value: The key's value.
        ranked: The snapshot that the path "ranked" means; None: it means a file.
    """
    if isinstance(value, list):
        return Source(parts=tuple(source_of(part, ranked) for part in value))
    if value == "world":
        return Source()
    given = DataSource(path=value) if isinstance(value, str) else value
    own = ("split", "subset", "revision", "skip", "limit")
    plain = {name: getattr(given, name) for name in own}
    reading = {
        name: item
        for name, item in given.model_dump(mode="json").items()
        if name not in (*own, "path") and item != DataSource.model_fields[name].get_default(call_default_factory=True)
    }
    if given.path == RANKED and ranked is not None:
        # People judge texts as they are, so a chat template in one is a part of it.
        return Source(path=ranked, **plain, reading={"templated": "keep"} | reading)
    if is_hub_id(given.path):
        return Source(hub=given.path, **plain, reading=reading)
    return Source(path=Path(given.path).expanduser(), **plain, reading=reading)


def fingerprinted_settings(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a recorded config that the fingerprint covers.

    A setting that is null counts as missing, so that an optional setting that a later version
    introduces does not make finished stages stale. Commits are left out here because they are
    inputs.

    Args:
        name: the stage.
        config: the recorded config.
    """
    covered = {key: config[key] for key in (name, "model", "seed") if key in config}
    if "model" in covered:
        covered["model"] = {key: item for key, item in covered["model"].items() if key not in COMMIT_KEYS}
    return _without_nulls(covered | {"data": _without_locations(config.get("data", {}))})


def _without_nulls(value: Any) -> Any:
    """Return nested mappings without the keys whose value is None."""
    if not isinstance(value, dict):
        return value
    return {key: _without_nulls(item) for key, item in value.items() if item is not None}


def _without_locations(data: dict[str, Any]) -> dict[str, Any]:
    """Return a recorded `data` section without paths, row counts and commits.

    What counts is what the files contain, and the digests among the inputs cover that.
    """
    locations = ("path", "rows", "sha256", "wordings", "shots_from", *COMMIT_KEYS)
    stripped = {}
    for key, value in data.items():
        if isinstance(value, dict):
            value = {name: item for name, item in value.items() if name not in locations}
            if "parts" in value:
                value["parts"] = _without_locations(value["parts"])
        stripped[key] = value
    return stripped
