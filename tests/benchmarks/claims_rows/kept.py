"""Keep what was measured on each seed, so that nothing finished is measured again."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from sweeps.points import commit_of

from claims_rows.row import Measurement, Place, as_json
from pipeline.config.yaml_tree import read_tree
from pipeline.errors import Interrupted, TrainingStopped, UserError
from pipeline.record import git_state
from pipeline.store import integrity

OUTSIDE = ("launch", "tracking", "checkpoints")
"""Sections of a config that change no result."""


@dataclass(frozen=True)
class Kept:
    """Hold the file of a measurement on one seed."""

    file: Path
    """Its path."""
    digest: str
    """Digest of the settings that the file must have been made with."""

    def read(self) -> dict[str, Any] | None:
        """Return the record; None if there is none with these settings."""
        if not self.file.is_file():
            return None
        record = json.loads(self.file.read_text(encoding="utf-8"))
        return record if record["digest"] == self.digest else None

    def finished(self) -> dict[str, Any] | None:
        """Return the record if it is that of a finished measurement."""
        record = self.read()
        return record if record and record["found"] is not None else None

    def write(self, record: dict[str, Any]) -> None:
        """Write the record; a kill leaves the old file or the new one."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.file.with_name(f".tmp-{self.file.name}")
        temporary.write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.file)


def kept_of(folder: Path, measurement: Measurement, place: Place, seed: int, settings: dict) -> Kept:
    """Return the file of a measurement on a seed.

    Args:
        folder: Folder of these files.
        measurement: The measurement.
        place: Its config.
        seed: The seed.
        settings: The measurement's own settings.
    """
    what = settings_of(measurement, place, seed, settings)
    files = {str(file): integrity.sha256_file(file) for file in local_files(what["config"].get("data"))}
    digest = integrity.sha256_json(what | ({"files": files} if files else {}))
    return Kept(folder / f"{measurement.key}-seed{seed}.json", digest)


def settings_of(measurement: Measurement, place: Place, seed: int, settings: dict) -> dict[str, Any]:
    """Return the settings that decide what is found on a seed, as JSON, without the data's content.

    Args:
        measurement: The measurement.
        place: Its config.
        seed: The seed.
        settings: The measurement's own settings.
    """
    values = {key: value for key, value in read_tree(place.config, []).values.items() if key not in OUTSIDE}
    what = {"measurement": measurement.key, "version": measurement.version, "seed": seed, "settings": settings}
    return as_json(what | {"config": values})


def local_files(value: Any) -> list[Path]:
    """Return the files that the section `data` of a config names, whose content decides results."""
    if isinstance(value, dict):
        return [file for one in value.values() for file in local_files(one)]
    if isinstance(value, list):
        return [file for one in value for file in local_files(one)]
    return [Path(value)] if isinstance(value, str) and Path(value).is_file() else []


def measure(kept: Kept, run: Callable[[], dict]) -> dict[str, Any]:
    """Measure unless it is finished, and return the record.

    Args:
        kept: The file.
        run: Measures; what is finished in the artifacts is not run again.

    Returns:
        {"digest", "found", "failed", "seconds", "commit", "date"}. The seconds are those of all
        attempts with these settings; an attempt that was killed without a word does not count.

    Raises:
        Exception: It cannot be measured; "failed" of the record in the file says why.
    """
    record = kept.finished()
    if record is not None:
        return record
    with _timed(kept) as record:
        record["found"] = as_json(run())
    return record


@contextmanager
def _timed(kept: Kept) -> Iterator[dict[str, Any]]:
    """Yield a new record; write it at the end, also of an attempt that fails."""
    earlier, began, commit = kept.read(), time.monotonic(), commit_of(git_state())
    record = {"digest": kept.digest, "found": None, "failed": "", "commit": commit, "date": date.today().isoformat()}
    try:
        yield record
    except Interrupted:
        raise
    except Exception as error:
        kind = "" if isinstance(error, (UserError, TrainingStopped)) else f"{type(error).__name__}: "
        record["failed"] = kind + " ".join(str(error).split("\n"))
        raise
    finally:
        record["seconds"] = round((earlier["seconds"] if earlier else 0) + time.monotonic() - began, 1)
        kept.write(record)
