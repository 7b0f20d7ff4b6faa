"""Finished products between stages: what a stage wrote goes in, a folder with a manifest comes out, whole or
not at all.

A stage folder in its states:

    manifest.json + what it names   done (the manifest is renamed in last)
    run.json                        a run began and is not published; nobody holds the lock: it was interrupted
    checkpoints/                    of the run that was published, or of a first one under way
    .lock                           held (flock) while a process works on the stage; a kill frees it
    .redo/                          journals and checkpoints of a run that redoes a finished stage; the artifact's
                                    own checkpoints stay until the new manifest stands, and these take their place
    .tmp-*                          unfinished, worthless
    .cache/                         numbers that a later run of the stage need not compute again
    .publish/                       complete, with its manifest: renamed into place now, or by the next open after
                                    a crash
    .old/                           what `.publish` replaces; removed after the new manifest stands
"""

import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.origin import Origin
from pipeline.store import checkpoints, files
from pipeline.tracking import JOURNALS, TIMING

RESERVED = {"manifest.json", "run.json", "checkpoints"}
FIELDS = {"fingerprint", "config", "inputs", "outputs", "metrics", "finished_at", "run_id"}


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class ArtifactStore:
    """The artifacts of one experiment, one folder a stage, below `root/experiment`. origin: the config file that this
    command was given, where it may make stages."""

    def __init__(self, root: str | Path, experiment: str, origin: Origin | None = None):
        self.root = Path(root)
        self.base = self.root / experiment
        self.origin = origin
        self._held: set[str] = set()

    def folder(self, stage: str) -> Path:
        return self.base / stage

    # -- reading -----------------------------------------------------------------------------------------

    def manifest(self, stage: str) -> dict[str, Any] | None:
        """The manifest of a finished stage, or None. UserError when it stands and does not hold."""
        path = self.folder(stage) / "manifest.json"
        if not os.path.lexists(path):
            return None
        try:
            manifest = files.read_sealed(path)
        except UserError as error:
            raise UserError(
                [f"{line}; `rlhf run {stage} -c CONFIG --force` makes it anew" for line in error.lines]
            ) from None
        if what := problem(manifest, stage):
            raise UserError(f"{path}: {what}; `rlhf run {stage} -c CONFIG --force` makes it anew")
        return manifest

    def verify(self, stage: str) -> dict[str, Any]:
        """The manifest, after every file it names was hashed and held, and no other file lies among them."""
        folder = self.folder(stage)
        manifest = self.manifest(stage)
        if manifest is None:
            raise UserError(f"{folder}: is missing; `rlhf run {stage} -c CONFIG` makes it")
        problems = files.check_files(folder, manifest["outputs"])
        for name in sorted({name.split("/")[0] for name in manifest["outputs"] if "/" in name}):
            if (folder / name).is_dir() and not (folder / name).is_symlink():
                try:
                    found = {f"{name}/{inner}" for inner in files.list_files(folder / name)}
                    problems += [
                        f"{folder / stray}: is not in the manifest"
                        for stray in sorted(found - set(manifest["outputs"]))
                    ]
                except UserError as error:
                    problems += error.lines
        if problems:
            raise UserError(
                [f"{line}; `rlhf run {stage} -c CONFIG --force` makes it anew" for line in dict.fromkeys(problems)]
            )
        return manifest

    def run(self, stage: str) -> dict[str, Any] | None:
        """run.json of a run that is under way or was interrupted, or None."""
        path = self.folder(stage) / "run.json"
        if not path.exists():
            return None
        try:
            return files.read_sealed(path)
        except UserError as error:
            raise UserError(
                [f"{line}; `rlhf run {stage} -c CONFIG --restart` drops this run" for line in error.lines]
            ) from None

    def work_folder(self, stage: str) -> Path:
        """Where a run keeps its journals and checkpoints: not among the files of a finished artifact."""
        folder = self.folder(stage)
        return folder / ".redo" if os.path.lexists(folder / "manifest.json") else folder

    def size(self, stage: str) -> int:
        """Bytes on disk, checkpoints included."""
        return sum(
            os.lstat(Path(parent, name)).st_size for parent, _, names in os.walk(self.folder(stage)) for name in names
        )

    # -- one writer --------------------------------------------------------------------------------------

    @contextmanager
    def lock(self, stage: str) -> Iterator[None]:
        """Holds the stage; a second writer gets a UserError that names the first. What a crash left is put
        right first."""
        with self.hold(stage) as handle:
            started = {"host": socket.gethostname(), "pid": os.getpid(), "started_at": now()}
            with files.naming(self.folder(stage) / ".lock"):
                os.ftruncate(handle, 0)
                os.pwrite(handle, json.dumps(started).encode(), 0)
            self._recover(stage)
            yield

    @contextmanager
    def hold(self, stage: str) -> Iterator[int]:
        """The lock alone, its file left as it is: what removes a stage must not need room on the disk."""
        folder = self.folder(stage)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be written ({error.strerror}); choose another with --artifacts"
            ) from None
        try:
            if not _try_lock(handle, patience=0.3):
                raise UserError(f"{folder}: {self.holder(stage)} works on it; wait for it or stop it")
            if not _is_at(handle, folder / ".lock"):  # by who held it meanwhile
                raise UserError(f"{folder}: was removed just now; run again")
            self._held.add(stage)
            yield handle
        finally:
            self._held.discard(stage)
            os.close(handle)

    def is_held(self, stage: str) -> bool:
        """Whether a process (not this one) works on the stage."""
        path = self.folder(stage) / ".lock"
        if stage in self._held or not path.exists():
            return False
        with open(path, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def holder(self, stage: str) -> str:
        """Who holds the lock of a stage, in words."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            holder = json.loads((self.folder(stage) / ".lock").read_text())
            return f"process {holder['pid']} on {holder['host']} (since {holder['started_at']})"
        return "another process"

    # -- recovering and publishing -----------------------------------------------------------------------

    def settle(self, stage: str) -> None:
        """Puts right what a crash left, if anything, unless somebody works there or nothing may be
        written."""
        folder = self.folder(stage)
        if stage not in self._held and folder.is_dir() and self._needs_recovery(stage):
            with suppress(UserError, OSError), self.lock(stage):
                pass

    def _needs_recovery(self, stage: str) -> bool:
        folder = self.folder(stage)
        if any((folder / name).exists() for name in (".publish", ".old")) or any(folder.glob(".tmp-*")):
            return True
        return (folder / "run.json").exists() and (folder / "manifest.json").exists()

    def _recover(self, stage: str) -> None:
        """Under the lock: rolls a complete `.publish` forward, finishes a clean-up, removes unfinished
        files."""
        folder = self.folder(stage)
        for leftover in folder.glob(".tmp-*"):
            files.remove(leftover)
        staged = folder / ".publish"
        if (staged / "manifest.json").exists():
            try:
                files.read_sealed(staged / "manifest.json")
            except UserError:  # the disk lost it: the run's checkpoints are still there
                files.remove(staged)
            else:
                self._roll_forward(stage)
        self._clean_up(stage)

    def publish(self, stage: str, content: Path, record: dict[str, Any]) -> dict[str, Any]:
        """Makes the files in `content` (a folder `.tmp-publish` of the stage) the stage's artifact; `record`
        is the manifest without `outputs` and `digest`. Under the lock. Returns the manifest."""
        assert stage in self._held, "publish without the lock"
        folder, work = self.folder(stage), self.work_folder(stage)
        journals = [work / name for name in (*JOURNALS, TIMING)]
        journals = [path for path in journals if path.exists() and path.stat().st_size]
        files.require_space(folder, sum(path.stat().st_size for path in journals))
        for path in journals:
            shutil.copyfile(path, content / path.name)
        names = [name for name in files.list_files(content) if name != TIMING]  # another run's would be other bytes
        for name in names:
            assert is_publishable(name), f"{stage} may not publish {name}"
        manifest = files.seal(record | {"outputs": files.describe_files(content, names)})
        files.write_json(content / "manifest.json", manifest)
        self.install(stage, content)
        return manifest

    def install(self, stage: str, content: Path) -> None:
        """Makes a folder of the stage's, complete with its manifest, the stage's artifact. Under the lock."""
        folder = self.folder(stage)
        files.give_usual_modes(content)
        files.fsync_tree(content)
        if not (content / TIMING).exists():
            files.remove(folder / TIMING)  # of what is replaced: no manifest names it
        files.remove(folder / ".publish")
        os.rename(content, folder / ".publish")  # from here on the new artifact wins, whatever happens
        files.fsync_folder(folder)
        self._roll_forward(stage)
        self._clean_up(stage)

    def _roll_forward(self, stage: str) -> None:
        """Renames `.publish/*` into place, the manifest last. Safe to repeat from wherever a crash stopped
        it."""
        folder = self.folder(stage)
        staged, old = folder / ".publish", folder / ".old"
        new_manifest = files.read_sealed(staged / "manifest.json")
        old.mkdir(exist_ok=True)
        if (folder / "manifest.json").exists():
            # first of all: no manifest stands over files that change
            os.rename(folder / "manifest.json", old / "manifest.json")
            files.fsync_folder(folder)
        waiting = {path.name for path in staged.iterdir()} - {"manifest.json"}
        arrived = {name.split("/")[0] for name in new_manifest["outputs"]} - waiting
        for name in sorted((_top_names(old / "manifest.json") | waiting) - arrived):
            if os.path.lexists(folder / name):
                files.remove(old / name)
                os.rename(folder / name, old / name)
            if name in waiting:
                os.rename(staged / name, folder / name)
        files.fsync_folder(folder)
        os.rename(staged / "manifest.json", folder / "manifest.json")
        files.fsync_folder(folder)

    def _clean_up(self, stage: str) -> None:
        """After the manifest stands: removes what it replaced and the run it ended."""
        folder = self.folder(stage)
        if not (folder / "manifest.json").exists():
            return
        for name in (".publish", ".old"):
            files.remove(folder / name)
        with suppress(UserError):
            run, manifest = self.run(stage), self.manifest(stage)
            if run is not None and manifest is not None and run["run_id"] == manifest["run_id"]:
                saved = folder / ".redo" / "checkpoints"
                if saved.exists():  # a redo's (there, if perhaps empty, since it began) replace the old run's
                    _remove_whole(folder / "checkpoints")
                    os.rename(saved, folder / "checkpoints")
                    files.fsync_folder(folder)
                self._end_run(stage)
                for damaged in (folder / "checkpoints").glob(".damaged-*"):
                    files.remove(damaged)

    # -- runs --------------------------------------------------------------------------------------------

    def begin(self, stage: str, run: dict[str, Any]) -> None:
        """Starts a run: drops what an earlier one left (never a finished artifact) and writes run.json. Under
        the lock."""
        self.drop_run(stage)
        if (work := self.work_folder(stage)) != self.folder(stage):
            (work / "checkpoints").mkdir(parents=True)
        self.record_run(stage, run)

    def record_run(self, stage: str, run: dict[str, Any]) -> None:
        files.write_json(self.folder(stage) / "run.json", files.seal(run))

    def drop_run(self, stage: str) -> None:
        """Forgets an interrupted run with its checkpoints and journals; a finished artifact and its checkpoints
        stay. Under the lock."""
        assert stage in self._held, "a run is dropped under the lock"
        folder = self.folder(stage)
        self._end_run(stage)
        if not os.path.lexists(folder / "manifest.json"):
            _remove_whole(folder / "checkpoints")
            for name in (*JOURNALS, TIMING):
                files.remove(folder / name)

    def _end_run(self, stage: str) -> None:
        folder = self.folder(stage)
        _remove_whole(folder / ".redo")
        files.remove(folder / "run.json")
        files.fsync_folder(folder)

    def progress(self, stage: str) -> tuple[int | None, int | None]:
        """Step and total of an interrupted run, from its newest checkpoint; (None, None) without one."""
        return checkpoints.progress(self.work_folder(stage) / "checkpoints") or (None, None)


def problem(manifest: dict[str, Any], stage: str) -> str | None:
    """Why a manifest whose digest holds is not one of the stage's; None if it is."""
    if manifest.get("stage") != stage:
        return "is another stage's"
    if lost := FIELDS - manifest.keys():
        return f"has no {', '.join(sorted(lost))}"
    return None


def _remove_whole(folder: Path) -> None:
    """Removes a folder, renamed first: a kill in the middle leaves no half of it under a good name."""
    if folder.exists():
        doomed = folder.with_name(f".tmp-{folder.name.removeprefix('.')}")
        files.remove(doomed)
        os.rename(folder, doomed)
        files.remove(doomed)


def _top_names(manifest: Path) -> set[str]:
    """The top-level names that an old manifest's outputs had, as far as it can be read; a user's own files
    are not among them."""
    try:
        outputs = json.loads(manifest.read_text(encoding="utf-8"))["outputs"]
        return {name.split("/")[0] for name in outputs if files.is_inside(name) and is_publishable(name)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def is_publishable(name: str) -> bool:
    """Whether a stage may publish a file under this name: none of its own bookkeeping."""
    top = name.split("/")[0]
    return top not in RESERVED and not top.startswith(".")


def _is_at(handle: int, path: Path) -> bool:
    """Whether the open file is the one that has this name now."""
    with suppress(OSError):
        return os.path.samestat(os.fstat(handle), os.stat(path))
    return False


def _try_lock(handle: int, patience: float) -> bool:
    """Another process that only looks (`is_held`) has the lock for an instant: so, not at the first
    refusal."""
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
