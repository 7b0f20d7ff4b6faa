"""Take finished stages of another experiment by reference: the section `from` of a config.

A stage that is taken is read where the other experiment keeps it. It is never locked, written or
removed from here, and it counts as done only if it is what this experiment would make: the same
fingerprint, and intact files. An artifact of the same stage in this experiment's own folder is left
alone and not used.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.config.sections import Common
from pipeline.errors import UserError
from pipeline.fingerprints import all_needs
from pipeline.stage import Stage
from pipeline.store.artifacts import ArtifactStore


def taken_from(experiment: Common) -> dict[str, str]:
    """Return each stage that is taken, with the name of the experiment that made it."""
    return {stage: entry.experiment for entry in experiment.taken for stage in entry.stages}


def taken_stores(experiment: Common, root: Path) -> dict[str, ArtifactStore]:
    """Return each stage that is taken, with the artifacts to read it from.

    Args:
        experiment: The validated experiment.
        root: The folder of all experiments (`--artifacts`).
    """
    stores = {}
    for entry in experiment.taken:
        folder = root if entry.artifacts is None else Path(entry.artifacts).expanduser()
        for stage in entry.stages:
            stores[stage] = ArtifactStore(folder, entry.experiment, is_foreign=True)
    return stores


def problems(experiment: Common, stages: Mapping[str, Stage]) -> list[str]:
    """Return a line for each mistake in the section `from`.

    Args:
        experiment: The validated experiment.
        stages: All stages by name, in order.
    """
    lines: list[str] = []
    seen: set[str] = set()
    for entry in experiment.taken:
        if entry.experiment == experiment.name and entry.artifacts is None:
            lines.append(f"from.experiment: {entry.experiment} is this experiment; name another one")
        if entry.artifacts is not None:
            lines += folder_problems(entry.artifacts)
        if not entry.stages:
            lines.append("from.stages: is empty; name the stages to take, or leave `from` out")
        for stage in entry.stages:
            if stage not in stages:
                lines.append(f"from.stages: {stage!r} is not a stage; choose from {', '.join(stages)}")
            elif stage in seen:
                lines.append(f"from.stages: {stage} is named twice; take it from one experiment")
            seen.add(stage)
    if lines:
        return lines
    if (last := list(stages)[-1]) in seen and len(stages) > 1:
        lines.append(f"from.stages: {last} shows this experiment, so it is made here; leave it out")
    for stage in [name for name in stages if name in seen]:
        if missing := [need for need in all_needs(stages[stage], experiment) if need not in seen]:
            named = ", ".join(missing)
            lines.append(f"from.stages: {stage} is made from {named}, which would be made here; take {named} too")
    return lines


def folder_problems(text: str) -> list[str]:
    """Return a line if `from.artifacts` is not a folder of this machine."""
    if "://" in text:
        return [f"from.artifacts: {text} is an address; give a folder of this machine"]
    if "\0" in text or not Path(text).expanduser().is_dir():
        return [f"from.artifacts: no such folder: {text}; give the folder that was --artifacts, or leave it out"]
    return []


def origin_there(store: ArtifactStore, stage: str, stages: Iterable[str]) -> str:
    """Return the experiment that another experiment takes a stage from itself; "" if it does not.

    Args:
        store: The other experiment's artifacts, whose manifests say what they were made from.
        stage: The stage.
        stages: The names of all stages.
    """
    for name in stages:
        try:
            manifest = store.manifest(name)
        except UserError:
            continue  # damaged: says nothing
        taken = {} if manifest is None else manifest["config"].get("from") or {}
        if stage in taken:
            return taken[stage]["experiment"]
    return ""


def record(experiment: Common, store: ArtifactStore, needs: Iterable[str]) -> dict[str, Any]:
    """Return what manifests record of the stages that a stage needs and that are taken.

    Args:
        experiment: The validated experiment.
        store: Its artifacts.
        needs: The stages that the stage needs.

    Returns:
        `{"from": {stage: {experiment, folder}}}`, the folder relative to the experiment's own; {}
        if none of them is taken.
    """
    names = taken_from(experiment)
    taken = {need: {"experiment": names[need], "folder": store.relative(need)} for need in needs if need in store.taken}
    return {"from": taken} if taken else {}
