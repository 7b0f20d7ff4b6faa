"""Save and load checkpoints: the state from which an interrupted stage resumes.

A checkpoint is a folder `step-00000120/`. It is complete only if its manifest is there and every
file matches its digest. Only safetensors and JSON are loaded, so that a checkpoint cannot carry
code; what the transformers Trainer writes is kept in `trainer/`. Where processes hold shares of a
model, each writes its own while training goes on (`begin_shares`, `write_shares`).
"""

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.store import files, integrity
from pipeline.store.shares import Share, StoredTensor, has_group, open_group
from pipeline.store.together import SharedSave

if TYPE_CHECKING:  # torch is imported late: signal handlers and environment variables come before it
    from torch import Tensor

STEP_FOLDER = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint."""

    step: int
    """Steps that were done when it was saved."""
    path: Path
    """Its folder, which contains `trainer/` if `CheckpointStore.adopt` saved it."""
    state: dict[str, Any]
    """The JSON state as it was saved."""
    fingerprint: str = ""
    """The fingerprint of the settings and inputs that it was trained with."""

    def tensors(self, name: str) -> dict[str, "Tensor"]:
        """Load a named group of tensors to the CPU, whole."""
        return {key: stored.read() for key, stored in self.stored(name).items()}

    def stored(self, name: str) -> dict[str, StoredTensor]:
        """Open a named group of tensors, of which any part can then be read."""
        return open_group(self.path, name)

    def has(self, name: str) -> bool:
        """Return whether there is such a group of tensors."""
        return has_group(self.path, name)


@dataclass
class CheckpointStore:
    """The checkpoints of one run of one stage."""

    folder: Path
    """Where the `step-…` folders are."""
    every: int
    """Steps between two saves; 0 for none."""
    keep: int
    """How many checkpoints to keep; at least one is kept."""
    run_id: str
    """The run that they belong to; checkpoints of other runs are not loaded."""
    fingerprint: str = ""
    """Recorded in every checkpoint."""
    say: Callable[[str], None] = print
    """Prints a line."""
    before_save: Callable[[], None] = lambda: None
    """Called before each save: forces to disk the journals whose rows a resume relies on."""
    max_share: float | None = None
    """The largest share of the run's time that saves may take; None for no limit."""
    writes: bool = True
    """False on every rank but 0: nothing is saved, and rank 0's checkpoint is loaded."""
    resume_step: int | None = None
    """On these ranks: the step that rank 0 resumes from; None if from the beginning."""
    _verified: Checkpoint | None = None
    """What `newest` returned, until the next save."""
    _began: float = field(default_factory=lambda: time.monotonic())
    """When the run began or resumed (all times: monotonic clock, seconds)."""
    _saving_since: float | None = None
    """When the save in progress began; None outside a save."""
    _last: float = 0.0
    """Seconds that the last save took."""
    _seconds: float = 0.0
    """Seconds that all saves of this process took, not counting what threads wrote meanwhile."""
    shared: SharedSave | None = None
    """This process's part in a save that processes write together, until all have agreed on it."""
    _last_shared: int | None = None
    """The step of the last such save."""

    def due(self, step: int) -> bool:
        """Return whether to save now: at multiples of `every`, as far as `max_share` allows."""
        if not self.writes or self.every == 0 or step % self.every:
            return False
        cost = self._seconds + self._last  # the next save probably takes as long as the last one
        return self.max_share is None or cost <= self.max_share * (time.monotonic() - self._began)

    def start_clock(self) -> None:
        """Count the time of the save that begins from here, unless it is counted already."""
        if self._saving_since is None:
            self._saving_since = time.monotonic()

    def require_space(self, needed: int) -> None:
        """Check that a checkpoint fits on the disk.

        Call this first when another writer produces the files for `adopt`: the time of the save
        counts from here.

        Args:
            needed: bytes.

        Raises:
            UserError: the disk has less free space.
        """
        self.start_clock()
        self.folder.mkdir(parents=True, exist_ok=True)
        files.require_space(self.folder, needed)

    def save(
        self, step: int, tensors: dict[str, dict[str, "Tensor"]], state: dict[str, Any], total: int | None = None
    ) -> Path:
        """Save a checkpoint.

        Args:
            step: steps done so far.
            tensors: named groups; each becomes one safetensors file.
            state: everything else, as JSON values.
            total: steps of the whole run, shown by `rlhf status`.

        Returns:
            The checkpoint's folder.

        Raises:
            UserError: the disk has too little free space.
            OSError: the disk failed; earlier checkpoints are still there.
        """
        return self._write(step, total, tensors, state, None)

    def adopt(
        self,
        folder: Path,
        step: int,
        total: int | None = None,
        extra_state: dict[str, Any] | None = None,
        tensors: dict[str, dict[str, "Tensor"]] | None = None,
    ) -> Path:
        """Save a checkpoint whose main part another writer (the transformers Trainer) has written.

        Args:
            folder: what it wrote; the folder is moved into the checkpoint as `trainer/`.
            step: steps done so far.
            total: steps of the whole run.
            extra_state: our own state, as JSON values.
            tensors: our own named groups of tensors.

        Returns:
            The checkpoint's folder.

        Raises:
            UserError, OSError: as `save`.
        """
        return self._write(step, total, tensors or {}, extra_state or {}, Path(folder))

    def _write(
        self,
        step: int,
        total: int | None,
        tensors: dict[str, dict[str, "Tensor"]],
        state: dict[str, Any],
        trainer: Path | None,
    ) -> Path:
        """Write a checkpoint under a temporary name, force it to disk and rename it into place."""
        final = self.folder / f"step-{step:08d}"
        if not self.writes:
            return final
        if final.is_dir() and not self._problems(final):
            # saved before: a signal arrived right after a regular save
            if trainer is not None:
                files.remove(trainer)
            self._saving_since = None
            return final
        self.require_space(sum(tensor.nbytes for group in tensors.values() for tensor in group.values()))
        staged = self._new_folder(step)
        for name, group in tensors.items():
            _save_tensors(group, staged / f"{name}.safetensors")
        with files.name_in_errors(staged / "state.json"):
            (staged / "state.json").write_text(json.dumps(state), encoding="utf-8")
        if trainer is not None:
            os.rename(trainer, staged / "trainer")
        self._complete(staged, step, total, integrity.describe_files(staged, integrity.list_files(staged)))
        self._count_seconds()
        return final

    def _new_folder(self, step: int) -> Path:
        """Make the folder that a checkpoint is written to."""
        self.before_save()
        self._remove_leftovers()
        staged = self.staged(step)
        staged.mkdir()
        return staged

    def _complete(self, staged: Path, step: int, total: int | None, described: dict[str, dict[str, Any]]) -> None:
        """Write the manifest of a checkpoint, force all of it to disk and rename it into place.

        Args:
            staged: The folder, with all files but the manifest.
            step: As in `save`.
            total: As in `save`.
            described: What the manifest says of the files.
        """
        final = self.folder / f"step-{step:08d}"
        manifest = {
            "step": step,
            "total": total,
            "run_id": self.run_id,
            "fingerprint": self.fingerprint,
            "files": described,
            "versions": _versions(),
        }
        files.set_default_modes(staged)
        # The order matters: first the files are on disk, then the manifest that vouches for them,
        # then the name.
        files.fsync_tree(staged)
        files.write_json(staged / "manifest.json", integrity.seal(manifest))
        if final.exists():  # a damaged one, or one of another run, under the same number
            os.rename(final, self.folder / f".tmp-replaced-{final.name}")
        os.rename(staged, final)
        files.fsync_folder(self.folder)
        self._verified = None
        self.prune()

    def _count_seconds(self) -> None:
        """Count the time since a save began."""
        assert self._saving_since is not None  # since `require_space`
        self._last = time.monotonic() - self._saving_since
        self._seconds, self._saving_since = self._seconds + self._last, None

    def staged(self, step: int) -> Path:
        """Return where the checkpoint of a step is written, before it is renamed into place."""
        return self.folder / f".tmp-step-{step:08d}"

    def begin_shares(self, step: int, needed: int, trainer: Path | None = None) -> bool:
        """Prepare a save that several processes write together; for rank 0 alone.

        Args:
            step: Steps done so far.
            needed: Bytes that all processes will write.
            trainer: What the transformers Trainer has written; the folder is moved into the
                checkpoint.

        Returns:
            Whether to save; not if this step was saved, or resumed from, before a signal came.

        Raises:
            UserError, OSError: As `save`.
        """
        assert self.shared is None, "the save before is not over"
        if step == self._last_shared or (self._verified is not None and self._verified.step == step):
            self._saving_since = None
            if trainer is not None:
                files.remove(trainer)
            return False
        self.require_space(needed)
        staged = self._new_folder(step)
        if trainer is not None:
            os.rename(trainer, staged / "trainer")
        return True

    def write_shares(
        self,
        step: int,
        groups: dict[str, dict[str, Share]],
        state: dict[str, Any],
        total: int | None,
        place: tuple[int, int],
    ) -> None:
        """Start to write this process's share of a checkpoint, in a thread.

        All processes call it, with the same names of groups. A process that fails says so in
        `shared.problem`.

        Args:
            step: Steps done so far.
            groups: Named groups: what this process writes of each tensor.
            state: Everything else, as JSON values; rank 0's is written.
            total: Steps of the whole run.
            place: (rank, number of processes).
        """
        staged, self._last_shared = self.staged(step), step
        if place[0]:
            self.shared = SharedSave(staged, place, groups, {}, [], None)
            return
        trainer = staged / "trainer"
        present = [f"trainer/{name}" for name in integrity.list_files(trainer)] if trainer.is_dir() else []
        texts = {"state.json": json.dumps(state)}
        complete = partial(self._complete, staged, step, total)
        self.shared = SharedSave(staged, place, groups, texts, present, complete)
        self._count_seconds()

    def settle(self, peers_are_lost: bool = False) -> None:
        """Wait, at the end of a run that failed, for what can still be saved, and say what cannot.

        Args:
            peers_are_lost: Whether to take only what the other processes have written already.
        """
        if self.shared is None:
            return
        if peers_are_lost:
            self.shared.give_up()
        else:
            self.shared.join_if_alive()
        if self.writes and self.shared.problem is not None:
            self.say(f"the checkpoint of step {self._last_shared} is not saved: {self.shared.problem}")
        self.shared = None

    def newest(self) -> Checkpoint | None:
        """Return the newest valid checkpoint of this run, or None if there is none.

        Newer ones that are damaged or of another run are renamed to `.damaged-…`, and a line says
        so.
        """
        assert self.shared is None, "a save is under way"
        if self._verified is not None:
            return self._verified
        if not self.writes:
            return self._checkpoint_of_rank_zero()
        set_aside = 0
        for folder in reversed(step_folders(self.folder)):
            problems = self._problems(folder)
            if not problems:
                state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
                fingerprint = integrity.read_sealed(folder / "manifest.json").get("fingerprint", "")
                self._verified = Checkpoint(_step(folder), folder, state, fingerprint)
                return self._verified
            aside = folder.with_name(f".damaged-{folder.name}")
            files.remove(aside)
            os.rename(folder, aside)
            set_aside += 1
            self.say(f"checkpoint {folder} set aside as {aside.name}: {problems[0]}")
        if set_aside:
            self.say(f"no valid checkpoint in {self.folder}: starting from the beginning")
        return None

    def _checkpoint_of_rank_zero(self) -> Checkpoint | None:
        """Return the checkpoint that rank 0 has verified and resumes from, if any."""
        if self.resume_step is None:
            return None
        folder = self.folder / f"step-{self.resume_step:08d}"
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        self._verified = Checkpoint(self.resume_step, folder, state)
        return self._verified

    def prune(self) -> None:
        """Remove all but the `keep` newest checkpoints.

        The newest is the one of the highest step: file times change when a folder is copied.
        """
        for folder in step_folders(self.folder)[: -max(self.keep, 1)]:
            doomed = folder.with_name(f".tmp-pruned-{folder.name}")
            files.remove(doomed)
            # renamed first: a kill during the removal must not leave half a checkpoint under a
            # valid name
            os.rename(folder, doomed)
            files.remove(doomed)
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        """Remove what a crash left half written or half removed.

        Other `.tmp-…` folders belong to the stage and stay.
        """
        for kind in ("step", "pruned", "replaced"):
            for leftover in self.folder.glob(f".tmp-{kind}-*"):
                files.remove(leftover)

    def _problems(self, folder: Path) -> list[str]:
        """Return why a checkpoint cannot be used; empty if it can."""
        try:
            manifest = integrity.read_sealed(folder / "manifest.json")
            if manifest.get("run_id") != self.run_id:
                return [f"it belongs to another run ({manifest.get('run_id')})"]
            if manifest.get("step") != _step(folder):
                return [f"its manifest is for step {manifest.get('step')}"]
            expected = manifest.get("files", {})
            if "state.json" not in expected:
                return ["its manifest names no state.json"]
            strays = set(integrity.list_files(folder)) - set(expected) - {"manifest.json"}
            if strays:
                return [f"{folder / min(strays)}: is not in the manifest"]
            return integrity.check_files(folder, expected)
        except UserError as error:
            return error.lines


def step_folders(folder: Path) -> list[Path]:
    """Return the folders `step-…` below `folder`, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if STEP_FOLDER.fullmatch(path.name)), key=_step)


def progress(folder: Path) -> tuple[int, int | None] | None:
    """Return the newest checkpoint's step and total without verifying its files, for `rlhf status`.

    Returns:
        (step, total of steps or None if it is unknown), or None if nothing was saved.
    """
    folders = step_folders(folder)
    if not folders:
        return None
    try:
        return _step(folders[-1]), integrity.read_sealed(folders[-1] / "manifest.json").get("total")
    except UserError:
        return _step(folders[-1]), None


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _save_tensors(group: dict[str, "Tensor"], path: Path) -> None:
    """Write a group of tensors to a safetensors file.

    safetensors refuses tensors that share memory, as tied embeddings do: the second one is copied.
    """
    from safetensors.torch import save_file

    seen, separate = set(), {}
    for name, tensor in group.items():
        tensor = tensor.detach().cpu()
        memory = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.contiguous().clone() if memory in seen or not tensor.is_contiguous() else tensor
        seen.add(memory)
    with files.name_in_errors(path):
        save_file(separate, path)


def _versions() -> dict[str, str]:
    """Return the versions of the libraries that wrote the tensors."""
    import safetensors
    import torch

    return {"torch": torch.__version__, "safetensors": safetensors.__version__}
