"""Publish and read artifacts: one folder per stage, complete with a manifest or not there at all.

What a stage folder may contain:

    manifest.json + files   the finished artifact; the manifest is renamed into place last
    run.json                a run has begun and is not published: it was interrupted if nobody
                            holds the lock
    checkpoints/            of the published run, or of a first run that is not finished; beside
                            the steps there may be records that a resumed run reads (scores/)
    .lock                   held with flock while a process works on the stage; a kill releases it
    .redo/                  journals and checkpoints of a run that redoes a finished stage. The
                            artifact's own checkpoints stay until the new manifest is in place,
                            then these replace them
    .tmp-*                  unfinished files, worthless after a crash
    .cache/                 tensors that a later run of the stage need not compute again
    .publish/               a complete new artifact with its manifest. It is renamed into place
                            now, or after a crash by the next process that locks the stage
    .old/                   what `.publish` replaces, until the new manifest is in place

Beside the experiments' folders `.digests.json` remembers digests of files (`digest_memory.py`).
"""

import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.origin import Origin
from pipeline.store import checkpoints, files, integrity
from pipeline.store.digests import Digests, memory_below
from pipeline.store.locks import is_at, is_locked, try_lock
from pipeline.tracking import JOURNALS, TIMING

RESERVED = {"manifest.json", "run.json", "checkpoints"}
REQUIRED_FIELDS = {"fingerprint", "config", "inputs", "outputs", "metrics", "finished_at", "run_id"}


def now() -> str:
    """Return the current time, UTC, as manifests record it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class ArtifactStore:
    """The artifacts of one experiment: one folder per stage, below `root/experiment`."""

    def __init__(
        self,
        root: str | Path,
        experiment: str,
        origin: Origin | None = None,
        taken: Mapping[str, "ArtifactStore"] | None = None,
        is_foreign: bool = False,
    ):
        """Describe where the artifacts are; nothing is created yet.

        Args:
            root: the folder of all experiments (`--artifacts`).
            experiment: the experiment's name.
            origin: the config file of this command; None for commands that only read.
            taken: the stages that are taken from other experiments, each with the artifacts to
                read it from.
            is_foreign: whether another experiment takes stages from here: they are only read.
        """
        self.root = Path(root)
        self.base = self.root / experiment
        self.origin = origin
        self.taken = dict(taken or {})
        self.is_foreign = is_foreign
        self.digests = memory_below(self.root)
        self._held: set[str] = set()  # stages that this process has locked

    def folder(self, stage: str) -> Path:
        """Return the folder of a stage; of one that is taken, the other experiment's."""
        return self.taken.get(stage, self).base / stage

    def relative(self, stage: str) -> str:
        """Return the folder of a stage relative to this experiment's, so that both can move."""
        return os.path.relpath(os.path.realpath(self.folder(stage)), os.path.realpath(self.base))

    def is_beside(self, stage: str) -> bool:
        """Return whether a stage that is taken has an artifact of this experiment's own, too."""
        return stage in self.taken and os.path.lexists(self.base / stage / "manifest.json")

    # -- reading ----------------------------------------------------------------------------------

    def manifest(self, stage: str) -> dict[str, Any] | None:
        """Return the manifest of a finished stage, or None if the stage is not finished.

        Raises:
            UserError: the manifest is damaged or belongs to another stage.
        """
        if stage in self.taken:
            return self.taken[stage].manifest(stage)
        path = self.folder(stage) / "manifest.json"
        if not os.path.lexists(path):  # a dangling link counts as there: it is damage, not an unfinished stage
            return None
        try:
            manifest = integrity.read_sealed(path)
        except UserError as error:
            raise self._rebuild(stage, error.lines) from None
        if problem := manifest_problem(manifest, stage):
            raise self._rebuild(stage, [f"{path}: {problem}"])
        return manifest

    def verify(self, stage: str, trusting: bool = False, digests: Digests | None = None) -> dict[str, Any]:
        """Return the manifest of a finished stage after checking every file that it names.

        Args:
            stage: the stage.
            trusting: whether to believe what earlier commands remembered of files that look
                unchanged. Only for what does not use the files: a damaged disk changes no times.
            digests: what this command knows of files; None: of this store's.

        Raises:
            UserError: the stage is not finished, a file is missing or damaged, or a published
                folder contains a file that the manifest does not name.
        """
        digests = digests or self.digests
        if stage in self.taken:  # the memory of the other experiment may be in another folder, and stays as it is
            return self.taken[stage].verify(stage, trusting, digests)
        folder = self.folder(stage)
        manifest = self.manifest(stage)
        if manifest is None:
            raise UserError(f"{folder}: is missing; `rlhf run {stage} -c CONFIG` makes it")
        outputs = manifest["outputs"]
        problems = integrity.check_files(folder, outputs, partial(digests.matching, trusting=trusting))
        # Transformers loads whatever it finds in a model folder, so that a stray file there can
        # change the model.
        for name in sorted({name.split("/")[0] for name in outputs if "/" in name}):
            if (folder / name).is_dir() and not (folder / name).is_symlink():
                try:
                    present = {f"{name}/{inner}" for inner in integrity.list_files(folder / name)}
                except UserError as error:
                    problems += error.lines
                    continue
                problems += [f"{folder / stray}: is not in the manifest" for stray in sorted(present - set(outputs))]
        if problems:
            raise self._rebuild(stage, list(dict.fromkeys(problems)))
        return manifest

    def published(self, stage: str) -> list[Path]:
        """Return the files of a finished stage, as far as they are there; none if it is damaged."""
        with suppress(UserError):
            if (manifest := self.manifest(stage)) is not None:
                paths = [self.folder(stage) / name for name in manifest["outputs"] if integrity.is_inside(name)]
                return [path for path in paths if path.is_file()]
        return []

    def _rebuild(self, stage: str, lines: list[str]) -> UserError:
        """Return an error that tells how to rebuild a damaged artifact."""
        remedy = f"`rlhf run {stage} -c CONFIG --force` rebuilds it"
        if self.is_foreign:
            remedy = f"rebuild it with --force and the config of {self.base.name}"
        return UserError([f"{line}; {remedy}" for line in lines])

    def run(self, stage: str) -> dict[str, Any] | None:
        """Return run.json of a run that is in progress or was interrupted; None without one.

        Raises:
            UserError: it is damaged.
        """
        path = self.folder(stage) / "run.json"
        if stage in self.taken or not path.exists():
            return None
        try:
            return integrity.read_sealed(path)
        except UserError as error:
            raise UserError(
                [f"{line}; `rlhf run {stage} -c CONFIG --restart` drops this run" for line in error.lines]
            ) from None

    def work_folder(self, stage: str) -> Path:
        """Return the folder for a run's journals and checkpoints.

        It is apart from a finished artifact, which stays valid while a new run replaces it.
        """
        folder = self.folder(stage)
        return folder / ".redo" if os.path.lexists(folder / "manifest.json") else folder

    def size(self, stage: str) -> int:
        """Return the size of a stage's folder in bytes, checkpoints included."""
        total = 0
        for parent, _, names in os.walk(self.folder(stage)):
            total += sum(os.lstat(Path(parent, name)).st_size for name in names)
        return total

    # -- locking ----------------------------------------------------------------------------------

    @contextmanager
    def lock(self, stage: str) -> Iterator[None]:
        """Lock a stage for writing, after completing or removing what a crash left behind.

        Raises:
            UserError: another process has the lock (the message names it), or the folder cannot be
                written.
        """
        with self.hold(stage) as handle:
            holder = {"host": socket.gethostname(), "pid": os.getpid(), "started_at": now()}
            with files.name_in_errors(self.folder(stage) / ".lock"):
                os.ftruncate(handle, 0)
                os.pwrite(handle, json.dumps(holder).encode(), 0)
            self._recover(stage)
            yield

    @contextmanager
    def hold(self, stage: str) -> Iterator[int]:
        """Lock a stage without writing anything, so that one can be removed from a full disk.

        Yields:
            The file descriptor of the lock.

        Raises:
            UserError: as `lock`.
        """
        assert stage not in self.taken and not self.is_foreign, f"{stage} is another experiment's"
        folder = self.folder(stage)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be written ({error.strerror}); choose another folder with --artifacts"
            ) from None
        try:
            if not try_lock(handle, patience=0.3):
                raise UserError(f"{folder}: {self.holder(stage)} works on it; wait for it or stop it")
            # `rlhf clean` may have removed the folder after the file was opened: a lock on a
            # deleted file protects nothing, since the next process creates a new one.
            if not is_at(handle, folder / ".lock"):
                raise UserError(f"{folder}: was removed just now; run again")
            self._held.add(stage)
            yield handle
        finally:
            self._held.discard(stage)
            os.close(handle)

    def is_held(self, stage: str) -> bool:
        """Return whether another process works on the stage."""
        path = self.folder(stage) / ".lock"
        if stage in self._held or not path.exists():
            return False
        return is_locked(path)

    def holder(self, stage: str) -> str:
        """Describe the process that holds the lock of a stage."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            holder = json.loads((self.folder(stage) / ".lock").read_text())
            return f"process {holder['pid']} on {holder['host']} (since {holder['started_at']})"
        return "another process"

    # -- publishing -------------------------------------------------------------------------------
    #
    # An artifact consists of several files and folders, and no system call replaces them all at
    # once. Therefore:
    #
    # 1. All files and the manifest are written below `.tmp-publish` and forced to disk.
    # 2. One rename to `.publish` decides: before it the old artifact is valid, after it the new
    #    one.
    # 3. The old manifest moves to `.old` first, so that no manifest vouches for files that are
    #    changing.
    # 4. Each top-level name is exchanged, old one to `.old`, new one into place.
    # 5. The new manifest is renamed into place last, and `.old` is removed.
    #
    # Whoever locks the stage after a crash repeats steps 3 to 5 from wherever they stopped.

    def publish(self, stage: str, content: Path, record: dict[str, Any]) -> dict[str, Any]:
        """Make the files of a finished run the artifact of the stage. Needs the lock.

        Args:
            stage: the stage that ran.
            content: its folder `.tmp-publish`, with the files to publish. The run's journals are
                added.
            record: the manifest without `outputs` and `digest`.

        Returns:
            The complete manifest.
        """
        assert stage in self._held, "publish without the lock"
        folder, work = self.folder(stage), self.work_folder(stage)
        journals = [work / name for name in (*JOURNALS, TIMING)]
        journals = [path for path in journals if path.exists() and path.stat().st_size]
        files.require_space(folder, sum(path.stat().st_size for path in journals))
        for path in journals:
            shutil.copyfile(path, content / path.name)
        files.set_default_modes(content)  # before the files are read: it changes their ctime
        # times differ from run to run: in the manifest they would change the artifact's digest
        names = [name for name in integrity.list_files(content) if name != TIMING]
        for name in names:
            assert is_publishable(name), f"{stage} may not publish {name}"
        outputs = integrity.describe_files(content, names, self.digests.sha256)
        manifest = integrity.seal(record | {"outputs": outputs})
        files.write_json(content / "manifest.json", manifest)
        self.install(stage, content)
        return manifest

    def install(self, stage: str, content: Path) -> None:
        """Replace the artifact of a stage with a folder that has a manifest. Needs the lock.

        Args:
            stage: the stage.
            content: a folder inside the stage's own, so that it can be renamed.
        """
        folder = self.folder(stage)
        files.set_default_modes(content)
        files.fsync_tree(content)
        if not (content / TIMING).exists():
            files.remove(folder / TIMING)  # the old one is in no manifest, so nothing else would remove it
        files.remove(folder / ".publish")
        os.rename(content, folder / ".publish")  # from here on the new artifact is the valid one
        files.fsync_folder(folder)
        outputs = integrity.read_sealed(folder / ".publish" / "manifest.json")["outputs"]
        self._roll_forward(stage)
        self.digests.moved(content, folder, outputs)
        self._clean_up(stage)

    def _roll_forward(self, stage: str) -> None:
        """Rename the contents of `.publish` into place, the manifest last.

        It may be called again after a crash at any point: it then continues from there.
        """
        folder = self.folder(stage)
        staged, old = folder / ".publish", folder / ".old"
        new_manifest = integrity.read_sealed(staged / "manifest.json")
        old.mkdir(exist_ok=True)
        if (folder / "manifest.json").exists():
            os.rename(folder / "manifest.json", old / "manifest.json")
            # on disk before any file changes, or a power cut could bring the old manifest back over
            # new files
            files.fsync_folder(folder)
        waiting = {path.name for path in staged.iterdir()} - {"manifest.json"}
        # Names of the new artifact that are no longer in `.publish` were renamed before the crash.
        # They must not be taken for files of the old artifact and moved away.
        arrived = {name.split("/")[0] for name in new_manifest["outputs"]} - waiting
        for name in sorted((_top_level_names(old / "manifest.json") | waiting) - arrived):
            if os.path.lexists(folder / name):
                files.remove(old / name)
                os.rename(folder / name, old / name)
            if name in waiting:
                os.rename(staged / name, folder / name)
        files.fsync_folder(folder)
        os.rename(staged / "manifest.json", folder / "manifest.json")
        files.fsync_folder(folder)

    def _clean_up(self, stage: str) -> None:
        """Remove what a new artifact has replaced, and the record of the run that produced it."""
        folder = self.folder(stage)
        if not (folder / "manifest.json").exists():
            return
        for name in (".publish", ".old"):
            files.remove(folder / name)
        with suppress(UserError):  # a damaged file is reported when it is needed
            run, manifest = self.run(stage), self.manifest(stage)
            if run is not None and manifest is not None and run["run_id"] == manifest["run_id"]:
                new_checkpoints = folder / ".redo" / "checkpoints"
                # `begin` creates this folder for a redo. Even if it is empty, the old checkpoints
                # go: they are of a run whose artifact is gone.
                if new_checkpoints.exists():
                    _remove_atomically(folder / "checkpoints")
                    os.rename(new_checkpoints, folder / "checkpoints")
                    files.fsync_folder(folder)
                self._end_run(stage)
                for damaged in (folder / "checkpoints").glob(".damaged-*"):
                    files.remove(damaged)

    # -- recovery ---------------------------------------------------------------------------------

    def recover_if_idle(self, stage: str) -> None:
        """Complete or remove what a crash left behind, unless a process works on the stage.

        A folder that cannot be written is left as it is: `rlhf status` must work there too.
        """
        folder = self.folder(stage)
        if stage not in self._held and folder.is_dir() and self._needs_recovery(stage):
            with suppress(UserError, OSError), self.lock(stage):
                pass

    def _needs_recovery(self, stage: str) -> bool:
        """Return whether a crash left unfinished files or an unfinished publication."""
        folder = self.folder(stage)
        if any((folder / name).exists() for name in (".publish", ".old")) or any(folder.glob(".tmp-*")):
            return True
        return (folder / "run.json").exists() and (folder / "manifest.json").exists()

    def _recover(self, stage: str) -> None:
        """Complete an interrupted publication and remove unfinished files. Needs the lock."""
        folder = self.folder(stage)
        for leftover in folder.glob(".tmp-*"):
            files.remove(leftover)
        staged = folder / ".publish"
        if (staged / "manifest.json").exists():
            try:
                integrity.read_sealed(staged / "manifest.json")
            except UserError:  # the disk lost it; the run can publish again from its checkpoints
                files.remove(staged)
            else:
                self._roll_forward(stage)
        self._clean_up(stage)

    # -- runs -------------------------------------------------------------------------------------

    def begin(self, stage: str, run: dict[str, Any]) -> None:
        """Start a run: drop an earlier unfinished one, keep a finished artifact. Needs the lock.

        Args:
            stage: the stage that will run.
            run: the contents of run.json, without `digest`.
        """
        self.drop_run(stage)
        if (work := self.work_folder(stage)) != self.folder(stage):
            (work / "checkpoints").mkdir(parents=True)
        self.record_run(stage, run)

    def record_run(self, stage: str, run: dict[str, Any]) -> None:
        """Write run.json."""
        files.write_json(self.folder(stage) / "run.json", integrity.seal(run))

    def drop_run(self, stage: str) -> None:
        """Remove an unfinished run with its checkpoints and journals. Needs the lock.

        A finished artifact stays, with the checkpoints of its own run.
        """
        assert stage in self._held, "a run is dropped under the lock"
        folder = self.folder(stage)
        self._end_run(stage)
        if not os.path.lexists(folder / "manifest.json"):
            _remove_atomically(folder / "checkpoints")
            for name in (*JOURNALS, TIMING):
                files.remove(folder / name)

    def _end_run(self, stage: str) -> None:
        """Remove the traces of a run that was published or dropped."""
        folder = self.folder(stage)
        # run.json last: while it is there, a crash in between is noticed and repaired
        _remove_atomically(folder / ".redo")
        files.remove(folder / "run.json")
        files.fsync_folder(folder)

    def progress(self, stage: str) -> tuple[int | None, int | None]:
        """Return the newest checkpoint's step and the total of steps, or (None, None)."""
        return checkpoints.progress(self.work_folder(stage) / "checkpoints") or (None, None)


def manifest_problem(manifest: dict[str, Any], stage: str) -> str | None:
    """Return what is wrong with a manifest whose digest matches; None if it is valid."""
    if manifest.get("stage") != stage:
        return "belongs to another stage"
    if missing := REQUIRED_FIELDS - manifest.keys():
        return f"has no {', '.join(sorted(missing))}"
    return None


def is_publishable(name: str) -> bool:
    """Return whether a stage may publish a file under this name."""
    top = name.split("/")[0]
    return top not in RESERVED and not top.startswith(".")


def _remove_atomically(folder: Path) -> None:
    """Remove a folder, renaming it first: a kill must not leave half of it under a valid name."""
    if folder.exists():
        doomed = folder.with_name(f".tmp-{folder.name.removeprefix('.')}")
        files.remove(doomed)
        os.rename(folder, doomed)
        files.remove(doomed)


def _top_level_names(manifest: Path) -> set[str]:
    """Return the top-level names in an old manifest's outputs, as far as it can be read.

    Other files in the folder are the user's own and stay where they are.
    """
    try:
        outputs = json.loads(manifest.read_text(encoding="utf-8"))["outputs"]
        return {name.split("/")[0] for name in outputs if integrity.is_inside(name) and is_publishable(name)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()
