"""Say in words how a recorded source was read, for model cards and the report."""

from glob import has_magic
from pathlib import PurePath
from typing import Any


def short_name(path: str) -> str:
    """Return the last part of a path; of a glob as `shards/*.jsonl` also the folder before it."""
    parts = PurePath(path).parts
    return "/".join(parts[-2:]) if parts and has_magic(parts[-1]) else PurePath(path).name or path


def parts_of(recorded: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what is recorded of each part of a mixture; of any other source, the record itself."""
    return list(recorded["parts"].values()) if recorded.get("parts") else [recorded]


def recorded_rows(recorded: dict[str, Any]) -> int | None:
    """Return how many rows the files of a source have; None if that is not known of all."""
    counts = [part.get("rows") for part in parts_of(recorded)]
    return None if None in counts else sum(counts)


def reading_words(recorded: dict[str, Any]) -> list[str]:
    """Return how the rows of a source were read, where that was not the default.

    Args:
        recorded: What a manifest records of the source; not of a mixture.
    """
    words = []
    if recorded.get("data_dir"):
        words.append(f"folder {recorded['data_dir']}")
    if recorded.get("data_files"):
        words.append(f"files {recorded['data_files']}")
    if recorded.get("where"):
        words.append(f"where {pairs(recorded['where'])}")
    if recorded.get("columns"):
        words.append(f"columns {pairs(recorded['columns'])}")
    if recorded.get("ignore"):
        words.append(f"without the keys {', '.join(recorded['ignore'])}")
    if recorded.get("templated"):
        words.append({"strip": "chat templates in texts stripped", "keep": "chat templates in texts kept"}[
            recorded["templated"]
        ])  # fmt: skip
    if recorded.get("by"):
        words.append(f"judged by {recorded['by']}")
    if recorded.get("tie_within"):
        words.append(f"scores within {recorded['tie_within']:g} tied")
    if recorded.get("min_score_ratio"):
        words.append(f"scores at least {recorded['min_score_ratio']:g} to 1")
    if recorded.get("tiers"):
        words.append(f"tiers {' > '.join(recorded['tiers'])}")
    if recorded.get("on_bad_row") == "drop":
        words.append("bad rows dropped")
    if recorded.get("weight"):
        words.append(f"weight {recorded['weight']:g}")
    return words


def pairs(mapping: dict[str, Any]) -> str:
    """Return a mapping as "key: value, key: value"."""
    return ", ".join(f"{key}: {value}" for key, value in mapping.items())
