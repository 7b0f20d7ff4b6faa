"""Numbers that are dear to compute and belong to no artifact: tensors under a digest of all that they are made of.

One safetensors file a name, written atomically. What does not fit (another digest, a damaged file) is not there.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError
from pipeline.store import files

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Cache:
    """The cache of a stage. Runs that redo the stage with other settings share it."""

    folder: Path
    writes: bool = True  # False in a process that helps another one, which writes

    def remember(self, name: str, made_of: str, tensors: dict[str, "Tensor"]) -> None:
        """Keep tensors, in the place of what was kept under this name; nothing where the disk is too full for it."""
        from safetensors.torch import save_file

        if not self.writes:
            return
        self.folder.mkdir(exist_ok=True)
        try:
            files.require_space(self.folder, sum(tensor.nbytes for tensor in tensors.values()))
        except UserError:
            return
        staged = self.folder / f".tmp-{name}.safetensors"
        with files.naming(staged):
            save_file(tensors, staged, {"made_of": made_of, "content": _content(tensors)})
        os.chmod(staged, files.usual_mode(self.folder))
        files.fsync_file(staged)
        os.replace(staged, self._path(name))
        files.fsync_folder(self.folder)

    def recall(self, name: str, made_of: str) -> dict[str, "Tensor"] | None:
        """What was kept under this name, if it was made of the same."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._path(name), "pt") as file:
                says = file.metadata() or {}
                if says.get("made_of") != made_of:
                    return None
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError):
            return None
        return tensors if _content(tensors) == says.get("content") else None

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def _content(tensors: dict[str, "Tensor"]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
