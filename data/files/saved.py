"""Find the Arrow files of a folder that `save_to_disk` of `datasets` wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data.files.paths import split_in


def saved_folder(folder: Path, split: str | None) -> Path | None:
    """Return the folder of a saved data set, or of one of its splits.

    Args:
        folder: The folder that a path names.
        split: The split that is wanted of several; None: there may be only one.

    Returns:
        None if the folder was not written by `save_to_disk`.

    Raises:
        ValueError: There are several splits, and none is named, or one that is not there.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = read_object(folder / "dataset_dict.json").get("splits")
        if not isinstance(splits, list) or not splits:
            raise ValueError("dataset_dict.json names no splits; save the data set again")
        chosen = splits[0] if len(splits) == 1 and split is None else split
        if chosen not in splits:
            ways = ", ".join(str(folder / str(name)) for name in splits)
            raise ValueError(f"holds the splits {', '.join(map(str, splits))}; give one as the path: {ways}")
        return folder / str(chosen)
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        own = read_object(folder / "state.json").get("_split") or split_in(folder.name)
        if split is not None and split != own:
            raise ValueError(f"is {f'the split {own}' if own else 'no split'}, and not {split}; leave split out")
        return folder
    return None


def saved_files(folder: Path) -> list[Path]:
    """Return the Arrow files of a saved data set in their order.

    Args:
        folder: As of `saved_folder`.

    Raises:
        ValueError: The folder is damaged, or an old one that needs an index.
    """
    state = read_object(folder / "state.json")
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise ValueError("was saved with indices by an old version of datasets; load it and save it again")
    entries = state.get("_data_files")
    names: list[Any] = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries or []]
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ValueError("state.json names no data files; save the data set again")
    missing = next((name for name in names if not (folder / name).is_file()), None)
    if missing is not None:
        raise ValueError(f"{missing} is missing; save the data set again")
    return [folder / name for name in names]


def read_object(path: Path) -> dict[str, Any]:
    """Read a file of JSON that holds an object.

    Raises:
        ValueError: It does not.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} is damaged; save the data set again")
    return value
