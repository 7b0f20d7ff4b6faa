"""Remove the artifacts of an experiment: the command `rlhf clean`.

What people said (`people/`) cost them hours and cannot be made again: it stays unless it is named.
"""

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline import api
from pipeline.api import Location
from pipeline.errors import UserError
from pipeline.store import files
from pipeline.store.locks import try_lock
from pipeline.trackers.names import FOLDERS as TRACKER_FOLDERS

PEOPLE = "people"
"""Folder of what people said, below an experiment's."""
ROUND = "round"
"""Folder of what an earlier round's people gave to this one (`rlhf round next`)."""


def clean_command(arguments: argparse.Namespace) -> int:
    """Run `rlhf clean`: remove artifacts/NAME, after a person at the terminal or --yes agrees.

    What people said stays, unless --with-labels asks for that too.

    It refuses if a process works there, or if the folder contains anything else.
    """
    from pipeline.config.validation import read_name
    from pipeline.config.yaml_tree import read_tree
    from pipeline.stage import StopFlag
    from pipeline.store.artifacts import ArtifactStore
    from pipeline.terminal import ask, at_terminal

    name = read_name(read_tree(arguments.config, arguments.overrides))
    store = ArtifactStore(Location.of(arguments.artifacts).folder, name)
    doomed = store.base.with_name(f".tmp-{store.base.name}")
    files.remove(doomed)  # left by a clean that was killed
    if not store.base.is_dir():
        print(f"{store.base}: nothing there")
        return 0
    present = sorted(path.name for path in store.base.iterdir())
    kept = [name for name in (PEOPLE, ROUND) if name in present and not arguments.with_labels]
    if kept:
        present = [name for name in present if name not in kept]
        if not present:
            print(f"{store.base}: nothing but what people said; --with-labels removes that")
            return 0
    stages = [name for name in (*api.STAGES, *api.OPTIONAL, *api.TESTS) if name in present]
    refuse_to_clean(store, present, stages)
    with ExitStack() as locks:
        for name in stages:  # a process may have started meanwhile
            locks.enter_context(store.hold(name))
        if PEOPLE in present:
            locks.enter_context(no_server(store.base / PEOPLE))
        size = files.human_bytes(sum(store.size(name) for name in present))
        what = f"{store.base} ({size}): {' '.join(present) or 'empty'}"
        if PEOPLE in present:
            what += "; what people said goes with it, and nothing can make it again"
        elif kept:
            what += f"; {'/ and '.join(kept)}/ {'stay' if len(kept) > 1 else 'stays'}: what people said (--with-labels "
            what += f"removes {'them' if len(kept) > 1 else 'it'} too)"
        if takers := experiments_that_take(store):
            what += f"; stages of it are taken by {', '.join(takers)}, which cannot run again without them"
        if not arguments.yes:
            if not at_terminal():
                raise UserError(f"{what}; there is no terminal to confirm this on: --yes (make: YES=1) removes it")
            if not ask(f"{what}\nRemove it?", StopFlag()):
                print("nothing removed")
                return 0
        print(f"removing {what}")
        # Renamed now, and removed when no lock file is open any more: NFS would keep an open file.
        if kept:
            doomed.mkdir()
            for name in present:
                os.rename(store.base / name, doomed / name)
        else:
            os.rename(store.base, doomed)
    files.remove(doomed)
    return 0


@contextmanager
def no_server(folder: Path) -> Iterator[None]:
    """Hold the locks of the servers that write what people said.

    Raises:
        UserError: One of them is running.
    """
    with ExitStack() as handles:
        for path in sorted(folder.glob("*.lock")):
            file = handles.enter_context(path.open("r+b"))
            if not try_lock(file.fileno(), patience=0.3):
                raise UserError(f"{folder}: a server writes there ({path.name} says which); stop it, then clean")
        yield


def experiments_that_take(store: Any) -> list[str]:
    """Return the experiments beside this one whose finished stages were made from its artifacts."""
    names, base = set(), store.base.resolve()
    for path in store.root.glob("*/*/manifest.json"):
        with suppress(OSError, ValueError, AttributeError, TypeError, KeyError):
            taken = json.loads(path.read_text(encoding="utf-8"))["config"].get("from", {})
            folders = [(path.parents[1] / entry["folder"]).resolve() for entry in taken.values()]
            if any(folder.parent == base for folder in folders):
                names.add(path.parents[1].name)
    return sorted(names - {store.base.name})


def refuse_to_clean(store: Any, present: list[str], stages: list[str]) -> None:
    """Raise UserError with a line for each reason not to remove an experiment's folder.

    Args:
        store: Its artifacts.
        present: Names in its folder.
        stages: Those of them that are stages.
    """
    lines = []
    for name in present:
        if name not in (
            *api.STAGES,
            *api.OPTIONAL,
            *api.TESTS,
            *TRACKER_FOLDERS,
            "slurm",
            PEOPLE,
            ROUND,
        ) and not name.startswith("."):
            lines.append(f"{store.base / name}: does not belong to any stage; move it away, then clean")
    for name in stages:
        if store.is_held(name):
            lines.append(f"{store.folder(name)}: {store.holder(name)} works on it; wait for it or stop it")
    if lines:
        raise UserError(lines)
