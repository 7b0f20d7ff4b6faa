"""Cache tensors that are expensive to compute and belong to no artifact.

There is one safetensors file per name, written atomically. An entry that was computed from other
inputs, or that is damaged, counts as missing.
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
    """The cache of one stage; runs that redo the stage with other settings share it."""

    folder: Path
    """Where the files are; it is created by the first write."""
    writes: bool = True
    """False on every rank but 0: only rank 0 writes."""

    def remember(self, name: str, digest: str, tensors: dict[str, "Tensor"]) -> None:
        """Store tensors under a name, replacing what was there; do nothing if the disk is too full.

        Args:
            name: the name of the entry.
            digest: of everything that the tensors were computed from.
            tensors: the values to store.
        """
        from safetensors.torch import save_file

        if not self.writes:
            return
        self.folder.mkdir(exist_ok=True)
        try:
            files.require_space(self.folder, sum(tensor.nbytes for tensor in tensors.values()))
        except UserError:
            return
        staged = self.folder / f".tmp-{name}.safetensors"
        with files.name_in_errors(staged):
            save_file(tensors, staged, {"made_of": digest, "content": _hash_tensors(tensors)})
        os.chmod(staged, files.default_mode(self.folder))
        files.fsync_file(staged)
        os.replace(staged, self._path(name))
        files.fsync_folder(self.folder)

    def recall(self, name: str, digest: str) -> dict[str, "Tensor"] | None:
        """Load the tensors under a name.

        Args:
            name: the name of the entry.
            digest: of everything that they should have been computed from.

        Returns:
            The tensors, or None if there are none, they have another digest or the file is damaged.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._path(name), "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("made_of") != digest:
                    return None
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError):
            return None
        return tensors if _hash_tensors(tensors) == metadata.get("content") else None

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def _hash_tensors(tensors: dict[str, "Tensor"]) -> str:
    """Return a digest of names, dtypes, shapes and values: safetensors has no checksum."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
