"""Read what the page says about a run out of its manifests."""

import json
from datetime import datetime
from typing import Any

from stages.settings.report import STAGES

Manifest = dict[str, Any]


def ordered(manifests: dict[str, Manifest]) -> list[tuple[str, Manifest]]:
    """Return (stage, manifest) in the order of the stages."""
    return [(stage, manifests[stage]) for stage in STAGES if stage in manifests]


def section(manifest: Manifest, name: str) -> dict[str, Any]:
    """Return a section of the settings that a manifest records; {} where it records none."""
    recorded = (manifest.get("config") or {}).get(name)
    return recorded if isinstance(recorded, dict) else {}


def metrics_of(manifests: dict[str, Manifest], stage: str) -> dict[str, Any]:
    """Return the metrics of a stage; {} where it did not run."""
    return manifests.get(stage, {}).get("metrics", {})


def seconds_of(manifest: Manifest) -> float:
    """Return the time from a stage's first start to its end, in seconds."""
    start, end = (datetime.fromisoformat(manifest[key]) for key in ("started_at", "finished_at"))
    return (end - start).total_seconds()


def commit_of(manifest: Manifest, digits: int = 40) -> str:
    """Return the git commit that ran, and whether files had changed; "" where none is recorded."""
    git = manifest.get("git")
    if not git:
        return ""
    changes = " + changes" if git["dirty"] else ""
    return f"git {git['commit'][:digits]}{changes}"


def common_versions(manifests: dict[str, Manifest]) -> dict[str, str]:
    """Return the library versions that all stages ran with."""
    first, *others = [manifest["versions"] for manifest in manifests.values()]
    return {name: version for name, version in first.items() if all(o.get(name) == version for o in others)}


def sha256_of(manifests: dict[str, Manifest], stage: str, file: str) -> str | None:
    """Return the digest of a file that a stage published; None where it did not."""
    return manifests.get(stage, {}).get("outputs", {}).get(file, {}).get("sha256")


def shown(value: Any) -> str:
    """Return a setting's value as YAML writes it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
