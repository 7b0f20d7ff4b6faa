"""Read the input and the evaluation prompts of a config onto the spool."""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from glob import has_magic, iglob
from pathlib import Path
from typing import Any

from data.check.command import is_local, same_file
from data.check.config import RANKED, source_of, sources_of
from data.check.inspect_file import guess_kind
from data.error_lines import shorten
from data.prepare.spool import PROTECTED, UNREAD, Spool
from data.progress import Watch, unwatched
from data.row_reader import REPEATED, records
from data.source import Loaded, Source
from pipeline.errors import UserError

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
FILE_ENDING = re.compile(r"\.(jsonl|ndjson|json|parquet|arrow|csv|tsv|txt|md|gz|xz|bz2|zst|ya?ml)$")


@dataclass(frozen=True)
class Input:
    """Name a source and the kind of its rows."""

    kind: str
    """The kind."""
    source: Source
    """Where the rows are, and how they are read."""


def inputs_of(names: list[str], kind: str | None, configured: dict[str, Source]) -> list[Input]:
    """Return the input in the order of its names, whatever the order on the command line.

    A source that the config names is read as the config says. Other sources are read with the
    settings of the config's source of their kind, but whole.

    Args:
        names: Files, folders, globs and ids of data sets on the Hub.
        kind: The kind of all of them; None: what the config or their keys say.
        configured: Kind → source in the config.

    Raises:
        UserError: There is no such file, it is named twice, or its kind is not known.
    """
    inputs, problems = [], []
    for name in sorted(set(names)):
        source = source_of(name)
        if source.hub is not None and (not HUB_ID.fullmatch(name) or FILE_ENDING.search(name)):
            problems.append(f"{name}: no such file; give a file, a folder, a glob or the Hub id org/name")
            continue
        if names.count(name) > 1:
            problems.append(f"{name}: is named {names.count(name)} times; name it once")
            continue
        named = [(own, other) for own, other in configured.items() if is_same(source, other)]
        if named and kind in (None, *(own for own, _ in named)):
            inputs += [Input(own, other) for own, other in named if kind in (None, own)]
            continue
        guessed = kind or guess_kind(source)
        if guessed is None:
            problems.append(f"{name}: the kind of its rows is not known; run rlhf data check on it, or give --kind")
            continue
        inputs.append(Input(guessed, read_like(source, configured.get(guessed))))
    if problems:
        raise UserError(problems)
    return inputs


def is_same(source: Source, other: Source) -> bool:
    """Return whether a source of the command line is one of the config's."""
    if other.parts:
        return False
    if source.hub is not None or other.hub is not None:
        return source.hub == other.hub
    return same_file(source, other) or str(source.path) == str(other.path)


def read_like(source: Source, other: Source | None) -> Source:
    """Return a source that is read, whole, as another one is.

    Args:
        source: The source.
        other: The config's source of its kind; None, or a mixture: as a file without settings.
    """
    if other is None or other.parts:
        return source
    return replace(other, path=source.path, hub=source.hub, skip=0, limit=None, weight=None, sha256=None)


def protected_sources(configured: dict[str, Source], inputs: list[Input]) -> list[Source]:
    """Return the config's evaluation prompts, unless they are among the input themselves.

    Args:
        configured: Kind → source in the config.
        inputs: The input.
    """
    source = configured.get("evaluation_prompts")
    if source is None or any(item.kind == "evaluation_prompts" and item.source == source for item in inputs):
        return []
    return list(source.parts or (source,))


def configured_sources(experiment: Any, home: Path) -> dict[str, Source]:
    """Return {kind: source} of a config, without the world's files that are not written yet.

    Args:
        experiment: The validated config, or None.
        home: The folder of the experiment's artifacts.
    """
    if experiment is None:
        return {}
    sources = sources_of(experiment, home)
    for kind in list(sources):
        if getattr(experiment.data, kind) in ("world", RANKED) and not is_local(sources[kind]):
            del sources[kind]
    return sources


def fill(spool: Spool, inputs: list[Input], protected: list[Source], watch: Watch = unwatched) -> None:
    """Read everything onto the spool, what is protected first.

    Args:
        spool: Gets the rows.
        inputs: The input.
        protected: Evaluation prompts that training must not hold.
        watch: Shows how far reading is.

    Raises:
        UserError: With the error lines of all sources.
    """
    errors: list[str] = []
    for source in protected:
        with watch(f"{source.name}: reading") as note:
            loaded = Loaded(note=note)
            for place, record in records("evaluation_prompts", source, loaded):
                spool.add(PROTECTED, place, record)
        errors += loaded.errors
    for item in inputs:
        for source in item.source.parts or (item.source,):
            with watch(f"{source.name}: reading") as note:
                loaded = Loaded(tell=teller(spool), note=note)
                for place, record in records(item.kind, source, loaded):
                    spool.add(item.kind, place, record)
            errors += loaded.errors
    if errors:
        raise UserError(shorten(errors))


def teller(spool: Spool) -> Callable[[str, str, str], None]:
    """Return the function that puts rows of which reading makes no record onto the spool."""

    def tell(place: str, reason: str, detail: str) -> None:
        key = "copy_of" if reason == REPEATED else "detail"
        spool.add(UNREAD, place, {"reason": reason, key: detail or None})

    return tell


def digests_of(source: Source) -> dict[str, str]:
    """Return {file: SHA-256} of the files of a source, {} for a data set on the Hub.

    Args:
        source: The source.
    """
    digests = {}
    for part in source.parts or (source,):
        if part.path is None:
            continue
        path = Path(part.path)
        files = [path]
        if path.is_dir():
            files = [file for file in path.rglob("*") if file.is_file()]
        elif has_magic(str(path)) and not path.exists():
            files = [Path(name) for name in iglob(str(path), recursive=True) if Path(name).is_file()]
        for file in sorted(files):
            with file.open("rb") as handle:
                digests[str(file)] = hashlib.file_digest(handle, "sha256").hexdigest()
    return digests
