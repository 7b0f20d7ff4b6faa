"""Read what several experiments published, to compare them.

Nothing is loaded that the manifests do not vouch for: a manifest or a journal that differs from its
digest is an error. Models are neither read nor checked.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.store import integrity
from pipeline.store.artifacts import ArtifactStore
from stages.page.curves import Journal
from stages.page.manifests import Manifest
from stages.page.numbers import listed
from stages.page.results import complete
from stages.settings.report import STAGES

Row = dict[str, Any]


@dataclass(frozen=True)
class Side:
    """Hold what one experiment published."""

    name: str
    """Its name."""
    label: str
    """Its name without what all names on the page have in common."""
    manifests: dict[str, Manifest]
    """Stage → its manifest, of the stages that are finished."""
    journals: dict[str, Journal]
    """Stage → what it logged."""
    results: Row | None
    """results.json, completed; None if evaluate is not finished."""
    responses: list[Row]
    """Rows of responses.jsonl; empty if evaluate is not finished."""
    notes: list[str]
    """What a reader must know of its artifacts, one sentence each."""

    @property
    def policies(self) -> dict[str, Row]:
        """Return what was measured of each policy."""
        return {} if self.results is None else self.results["policies"]

    @property
    def seed(self) -> str:
        """Return its seed; several, joined, if its stages were made with different ones."""
        return ", ".join(sorted({str(manifest["seed"]) for manifest in self.manifests.values()}))


def read_sides(names: Sequence[str], root: Path) -> list[Side]:
    """Read experiments.

    Args:
        names: Names of experiments below the folder of artifacts, or folders of experiments.
        root: The folder of artifacts.

    Raises:
        UserError: If one is not there, has no finished stage, is damaged or is named twice.
    """
    folders = [find(name, root) for name in names]
    lines = [f"compare: {name}: is named twice; name each experiment once"
             for i, name in enumerate(names) if folders[i].resolve() in [f.resolve() for f in folders[:i]]]  # fmt: skip
    if lines:
        raise UserError(lines)
    plain = [folder.resolve().name for folder in folders]
    unique = plain if len(set(plain)) == len(plain) else [str(folder) for folder in folders]
    return [read_side(folder, *both) for folder, *both in zip(folders, unique, labels_of(unique), strict=True)]


def find(name: str, root: Path) -> Path:
    """Return the folder of an experiment."""
    for folder in (root / name, Path(name).expanduser()):
        if name and any(folder.glob("*/manifest.json")):
            return folder
    present = sorted({path.parents[1].name for path in root.glob("*/*/manifest.json")})
    remedy = f"there are: {', '.join(present)}" if present else "give the folder with --artifacts"
    raise UserError(f"compare: {name}: no experiment with a finished stage in {root}; {remedy}")


def labels_of(names: Sequence[str]) -> list[str]:
    """Return the names of a sweep's variants without the parts that all of them have.

    Args:
        names: The names, such as `tiny--ppo.kl_coef-0.1--seed-3`.
    """
    parts = [name.split("--") for name in names]
    shared = set(parts[0]).intersection(*parts[1:])
    labels = ["--".join(part for part in own if part not in shared) for own in parts]
    return labels if all(labels) and len(set(labels)) == len(labels) else list(names)


def read_side(folder: Path, name: str, label: str) -> Side:
    """Read one experiment."""
    notes: list[str] = []
    folders, manifests = artifacts_of(folder, notes)
    if not manifests:
        raise UserError(f"compare: {folder}: has no finished stage that can be compared; run one first")
    notes += replaced_inputs(manifests)
    journals, results, responses = {}, None, []
    for stage in manifests:
        if stage == "evaluate":
            results = json.loads(text_of(folders[stage], manifests[stage], "results.json"))
            responses = rows_of(folders[stage], manifests[stage], "responses.jsonl")
        else:
            kinds = [rows_of(folders[stage], manifests[stage], f"{kind}.jsonl") for kind in ("metrics", "evaluations")]
            journals[stage] = Journal(*kinds, [])
    return Side(name, label, manifests, journals, None if results is None else complete(results), responses, notes)


def artifacts_of(folder: Path, notes: list[str]) -> tuple[dict[str, Path], dict[str, Manifest]]:
    """Return the folder and the manifest of each finished stage, also of those taken from others.

    Args:
        folder: The experiment's folder.
        notes: Receives a sentence for each stage that was taken and is no longer there.
    """
    store = ArtifactStore(folder.parent, folder.name)
    own = {stage: manifest for stage in STAGES if (manifest := store.manifest(stage)) is not None}
    folders = {stage: folder / stage for stage in own}
    manifests = dict(own)
    for manifest in own.values():
        for stage, entry in (manifest["config"].get("from") or {}).items():
            place = (folder / entry["folder"]).resolve()
            there = manifest_in(place)
            if there is None or there["digest"] != manifest["inputs"].get(stage):
                what = "is gone" if there is None else "was made again since"
                notes.append(f"{stage} was taken from {entry['experiment']}, where it {what}: it is left out")
                folders.pop(stage, None)
                manifests.pop(stage, None)
            else:
                folders[stage], manifests[stage] = place, there
    add_inputs_of_taken(folders, manifests, own)
    return folders, {stage: manifests[stage] for stage in STAGES if stage in manifests}


def add_inputs_of_taken(folders: dict[str, Path], manifests: dict[str, Manifest], own: dict[str, Manifest]) -> None:
    """Add the stages that taken ones were made from, where they are still what they were.

    A manifest names only what its stage needs itself: PPO that takes sft does not name base.
    """
    for stage in reversed(STAGES):
        if stage not in manifests or (stage in own and manifests[stage] is own[stage]):
            continue
        for need, digest in manifests[stage]["inputs"].items():
            place = folders[stage].parent / need
            if need in STAGES and need not in manifests:
                there = manifest_in(place)
                if there is not None and there["digest"] == digest:
                    folders[need], manifests[need] = place, there


def manifest_in(folder: Path) -> Manifest | None:
    """Return the manifest of a stage's folder; None if the stage is not finished."""
    return ArtifactStore(folder.parents[1], folder.parent.name).manifest(folder.name)


def replaced_inputs(manifests: dict[str, Manifest]) -> list[str]:
    """Return a sentence for each stage whose inputs were made again after it."""
    notes = []
    for stage, manifest in manifests.items():
        newer = [need for need, digest in manifest["inputs"].items()
                 if need in manifests and manifests[need]["digest"] != digest]  # fmt: skip
        if newer:
            were = "was" if len(newer) == 1 else "were"
            notes.append(f"{listed(newer)} {were} made again after {stage}, which shows the earlier state")
    return notes


def text_of(folder: Path, manifest: Manifest, name: str) -> str:
    """Return a published file after checking its digest.

    Raises:
        UserError: If it is missing or damaged.
    """
    expected = {name: manifest["outputs"][name]} if name in manifest["outputs"] else {}
    if not expected:
        raise UserError(f"{folder / name}: is not in the manifest; run the stage again with --force")
    if problems := integrity.check_files(folder, expected):
        raise UserError([f"{line}; --force rebuilds the stage" for line in problems])
    return (folder / name).read_text(encoding="utf-8")


def rows_of(folder: Path, manifest: Manifest, name: str) -> list[Row]:
    """Return the rows of a published JSON Lines file; none if the stage published no such file."""
    if name not in manifest["outputs"]:
        return []
    return [json.loads(line) for line in text_of(folder, manifest, name).splitlines()]
