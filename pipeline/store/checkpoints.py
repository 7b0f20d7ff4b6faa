"""Resumable state inside a stage: tensors and JSON in, a folder `step-00000120/` out, and back again.

A checkpoint is complete if and only if its manifest stands and every file holds the digest named there. Only
safetensors and JSON are read back, so a checkpoint cannot carry code (what transformers' Trainer wrote lies
in `trainer/`).
"""

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.store import files

if TYPE_CHECKING:  # torch is imported late: signal handlers and environment variables come before it
    from torch import Tensor
    from torch.optim import Optimizer

STEP_FOLDER = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. `state` is JSON as it was saved; `path` may hold `trainer/` (see `adopt`); `fingerprint`:
    of the settings and inputs that it was made with."""

    step: int
    path: Path
    state: dict[str, Any]
    fingerprint: str = ""

    def tensors(self, name: str) -> dict[str, "Tensor"]:
        from safetensors.torch import load_file

        return load_file(self.path / f"{name}.safetensors")


@dataclass
class CheckpointStore:
    """The checkpoints of one run of one stage. `every`: steps between saves, 0 = none; `keep`: how many
    stay; `most`: the share of the time that saving may take, None = any."""

    folder: Path
    every: int
    keep: int
    run_id: str
    fingerprint: str = ""
    say: Callable[[str], None] = print
    before_save: Callable[[], None] = lambda: None  # makes the journals durable that a checkpoint stands on
    most: float | None = None
    writes: bool = True  # False in a process that helps another one: nothing is saved, that one's checkpoints are read
    at: int | None = None  # then the step of the checkpoint to begin from, as the other one says
    _verified: Checkpoint | None = None
    _began: float = field(default_factory=lambda: time.monotonic())
    _saving_since: float | None = None  # where a save has begun before its files came here
    _last: float = 0.0  # seconds of the last save
    _seconds: float = 0.0  # of all saves

    def due(self, step: int) -> bool:
        """Whether to save after this step: every `every` steps, but for saves that would take too much of the time."""
        if not self.writes or self.every == 0 or step % self.every:
            return False
        cost = self._seconds + self._last
        return self.most is None or cost <= self.most * (time.monotonic() - self._began)

    def require_space(self, needed: int) -> None:
        """UserError where a checkpoint of so many bytes has no room. A save begins with it, also one whose files
        another writer makes before `adopt`."""
        if self._saving_since is None:
            self._saving_since = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        files.require_space(self.folder, needed)

    def save(
        self, step: int, tensors: dict[str, dict[str, "Tensor"]], state: dict[str, Any], total: int | None = None
    ) -> Path:
        """Saves named groups of tensors and a JSON state after `step` steps of `total`; returns the
        checkpoint's folder."""
        needed = sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
        return self._write(step, total, tensors, state, needed, None)

    def adopt(
        self,
        folder: Path,
        step: int,
        total: int | None = None,
        extra_state: dict[str, Any] | None = None,
        tensors: dict[str, dict[str, "Tensor"]] | None = None,
    ) -> Path:
        """The same for a folder that another writer (transformers' Trainer) filled: it is moved in as
        `trainer/`."""
        tensors = tensors or {}
        needed = sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
        return self._write(step, total, tensors, extra_state or {}, needed, Path(folder))

    def _write(self, step, total, tensors, state, needed, trainer: Path | None) -> Path:
        final = self.folder / f"step-{step:08d}"
        if not self.writes:
            return final
        if final.is_dir() and not self._problems(final):
            if trainer is not None:
                files.remove(trainer)
            self._saving_since = None
            return final  # saved before: a signal came right after a regular save
        self.require_space(needed)
        self.before_save()
        self._sweep()
        staged = self.folder / f".tmp-step-{step:08d}"
        staged.mkdir()
        for name, group in tensors.items():
            _save_tensors(group, staged / f"{name}.safetensors")
        with files.naming(staged / "state.json"):
            (staged / "state.json").write_text(json.dumps(state), encoding="utf-8")
        if trainer is not None:
            os.rename(trainer, staged / "trainer")
        contents = files.describe_files(staged, files.list_files(staged))
        manifest = {"step": step, "total": total, "run_id": self.run_id, "fingerprint": self.fingerprint}
        manifest |= {"files": contents, "versions": _versions()}
        files.give_usual_modes(staged)
        files.fsync_tree(staged)
        files.write_json(staged / "manifest.json", files.seal(manifest))
        if final.exists():  # a damaged or foreign one under the same number makes way
            os.rename(final, self.folder / f".tmp-replaced-{final.name}")
        os.rename(staged, final)
        files.fsync_folder(self.folder)
        self._verified = None
        self.prune()
        self._last = time.monotonic() - self._saving_since
        self._seconds, self._saving_since = self._seconds + self._last, None
        return final

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint of this run that holds, by step. What does not hold is set aside, and a line
        says so."""
        if self._verified is not None:
            return self._verified
        if not self.writes:
            return self._given()
        set_aside = 0
        for folder in reversed(step_folders(self.folder)):
            problems = self._problems(folder)
            if not problems:
                state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
                fingerprint = files.read_sealed(folder / "manifest.json").get("fingerprint", "")
                self._verified = Checkpoint(_step(folder), folder, state, fingerprint)
                return self._verified
            aside = folder.with_name(f".damaged-{folder.name}")
            files.remove(aside)
            os.rename(folder, aside)
            set_aside += 1
            self.say(f"checkpoint {folder} set aside as {aside.name}: {problems[0]}")
        if set_aside:
            self.say(f"no checkpoint in {self.folder} holds: starting from the beginning")
        return None

    def _given(self) -> Checkpoint | None:
        """The checkpoint that the writer found to hold, and began from."""
        if self.at is None:
            return None
        folder = self.folder / f"step-{self.at:08d}"
        self._verified = Checkpoint(self.at, folder, json.loads((folder / "state.json").read_text(encoding="utf-8")))
        return self._verified

    def prune(self) -> None:
        """Keeps the `keep` newest by step (never by file time); at least one."""
        for folder in step_folders(self.folder)[: -max(self.keep, 1)]:
            doomed = folder.with_name(f".tmp-pruned-{folder.name}")
            files.remove(doomed)
            # renamed first: a kill in the middle of the removal leaves no half checkpoint under a good name
            os.rename(folder, doomed)
            files.remove(doomed)
        self._sweep()

    def _sweep(self) -> None:
        """Removes what a crash left half written or half removed (a stage's own scratch folders stay)."""
        for kind in ("step", "pruned", "replaced"):
            for leftover in self.folder.glob(f".tmp-{kind}-*"):
                files.remove(leftover)

    def _problems(self, folder: Path) -> list[str]:
        """Why a checkpoint cannot be used; empty when it can."""
        try:
            manifest = files.read_sealed(folder / "manifest.json")
            if manifest.get("run_id") != self.run_id:
                return [f"it belongs to another run ({manifest.get('run_id')})"]
            if manifest.get("step") != _step(folder):
                return [f"its manifest is of step {manifest.get('step')}"]
            expected = manifest.get("files", {})
            if "state.json" not in expected:
                return ["its manifest names no state.json"]
            strays = set(files.list_files(folder)) - set(expected) - {"manifest.json"}
            if strays:
                return [f"{folder / min(strays)}: is not in the manifest"]
            return files.check_files(folder, expected)
        except UserError as error:
            return error.lines


def step_folders(folder: Path) -> list[Path]:
    """The folders `step-…`, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if STEP_FOLDER.fullmatch(path.name)), key=_step)


def progress(folder: Path) -> tuple[int, int | None] | None:
    """Step and total of the newest checkpoint, without verifying it: for `status`. None = nothing was
    saved."""
    folders = step_folders(folder)
    if not folders:
        return None
    try:
        return _step(folders[-1]), files.read_sealed(folders[-1] / "manifest.json").get("total")
    except UserError:
        return _step(folders[-1]), None


def optimizer_tensors(optimizer: "Optimizer") -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """An optimizer's state as tensors for safetensors and a rest for JSON; `load_optimizer` takes both back,
    exactly."""
    import torch

    state = optimizer.state_dict()
    tensors, scalars = {}, {}
    for index, values in state["state"].items():
        for name, value in values.items():
            if torch.is_tensor(value):
                tensors[f"{index}.{name}"] = value
            else:
                scalars[f"{index}.{name}"] = value
    groups = []
    for group in state["param_groups"]:
        bad = [name for name, value in group.items() if torch.is_tensor(value)]
        assert not bad, f"optimizer options held as tensors are not saved: {bad}"
        groups.append(dict(group))
    return tensors, {"scalars": scalars, "param_groups": groups}


def load_optimizer(optimizer: "Optimizer", tensors: dict[str, "Tensor"], saved: dict[str, Any]) -> None:
    """Puts back what `optimizer_tensors` gave. UserError, before it changes anything, where shapes do not fit."""
    misfit = lambda what: UserError(f"checkpoint: {what}; start again with --restart")  # noqa: E731
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    today = optimizer.state_dict()["param_groups"]
    sizes, saved_sizes = ([len(group["params"]) for group in groups] for groups in (today, saved["param_groups"]))
    if sizes != saved_sizes:
        raise misfit(f"the optimizer's groups hold {sizes} parameters, the checkpoint's {saved_sizes}")
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *saved["scalars"].items()]:
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        shape = getattr(value, "shape", ())
        if len(shape) > 0 and shape != parameter.shape:
            raise misfit(f"optimizer state {key} is {tuple(shape)}, its parameter {tuple(parameter.shape)}")
        state.setdefault(int(index), {})[name] = value
    groups = []
    for group, saved_group in zip(today, saved["param_groups"], strict=True):
        if set(group) != set(saved_group):
            raise misfit(f"optimizer options differ: {sorted(set(group) ^ set(saved_group))}")
        # JSON has no tuples: betas come back as a list
        groups.append(
            {name: tuple(value) if isinstance(group[name], tuple) else value for name, value in saved_group.items()}
        )
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _save_tensors(group: dict[str, "Tensor"], path: Path) -> None:
    """safetensors refuses tensors that share memory (tied embeddings): each name gets memory of its own."""
    from safetensors.torch import save_file

    seen, plain = set(), {}
    for name, tensor in group.items():
        tensor = tensor.detach().cpu()
        memory = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.contiguous().clone() if memory in seen or not tensor.is_contiguous() else tensor
        seen.add(memory)
    with files.naming(path):
        save_file(plain, path)


def _versions() -> dict[str, str]:
    import safetensors
    import torch

    return {"torch": torch.__version__, "safetensors": safetensors.__version__}
