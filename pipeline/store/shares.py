"""Store tensors in shares: each process writes the blocks that it holds; any process reads slices.

A group of tensors is one safetensors file (`policy.safetensors`, whole tensors), or one file for
each process that saved it (`policy-00001-of-00004.safetensors`, blocks). A block is stored under
`NAME[OFFSET,…]`, the index of its first element in the tensor; the header of its file has the
tensor's shape.

torch.distributed.checkpoint is not used: its own format is pickle, which can carry code, and its
safetensors format needs collective operations and a process group of its own to save in the
background.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.store import files

if TYPE_CHECKING:  # torch is imported late: signal handlers and environment variables come before it
    import torch
    from torch import Tensor

KEY = re.compile(r"(.*)\[([\d,]*)\]", re.DOTALL)
FILE = re.compile(r"(.+)-(\d{5,})-of-(\d{5,})\.safetensors")

Runs = Sequence[Sequence[tuple[int, int]]]
"""For each dimension of a tensor, the ranges (start, stop) of indices that a process holds."""


@dataclass(frozen=True)
class Share:
    """Hold the blocks of a tensor that one process writes."""

    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    blocks: list[tuple[tuple[int, ...], "Tensor"]]
    """(index of the first element in the whole tensor, block), on the CPU and contiguous."""

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks."""
        return sum(block.nbytes for _, block in self.blocks)


def whole_runs(shape: Sequence[int]) -> Runs:
    """Return the ranges of a process that holds a tensor whole."""
    return [[(0, size)] for size in shape]


def split_runs(runs: Runs) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """Yield where each block of a share begins in the whole tensor, and its place in the share."""
    placed: list[list[tuple[int, slice]]] = []
    for ranges in runs:
        starts = [sum(stop - start for start, stop in ranges[:i]) for i in range(len(ranges))]
        placed.append([(start, slice(at, at + stop - start)) for (start, stop), at in zip(ranges, starts, strict=True)])
    for block in product(*placed):
        yield tuple(start for start, _ in block), tuple(part for _, part in block)


def file_name(group: str, rank: int, processes: int) -> str:
    """Return the name of the file that a process writes of a group of tensors."""
    return f"{group}-{rank:05d}-of-{processes:05d}.safetensors"


def write_shares(path: Path, shares: dict[str, Share]) -> None:
    """Write one process's share of a group of tensors.

    Args:
        path: The file.
        shares: By name of the tensor.
    """
    from safetensors.torch import save_file

    blocks: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, share in shares.items():
        for offset, block in share.blocks:
            blocks[f"{name}[{','.join(map(str, offset))}]"] = block
            shapes[name] = list(share.shape)
    with files.name_in_errors(path):
        save_file(blocks, path, {"shapes": json.dumps(shapes)})


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint, of which any part can be read."""

    shape: tuple[int, ...]
    """Its shape."""
    blocks: list[tuple[Any, str, tuple[int, ...], tuple[int, ...]]] = field(repr=False)
    """(open safetensors file, name in it, index of the first element, shape) of each block."""

    def dim(self) -> int:
        """Return the number of dimensions."""
        return len(self.shape)

    def read(self, runs: Runs | None = None) -> "Tensor":
        """Read the tensor, or the part of it that has the given indices, to the CPU.

        Args:
            runs: For each dimension, the ranges of indices; None: all.
        """
        import torch

        runs = whole_runs(self.shape) if runs is None else runs
        size = tuple(sum(stop - start for start, stop in ranges) for ranges in runs)
        if len(self.blocks) == 1 and size == self.shape:  # also of tensors without dimensions
            file, key, _, _ = self.blocks[0]
            return file.get_tensor(key)
        out = torch.empty(size, dtype=self.dtype())
        for wanted, place in split_runs(runs):
            target = out[place]
            for file, key, offset, shape in self.blocks:
                inside, into = _overlap(wanted, tuple(target.shape), offset, shape)
                if inside is not None:
                    target[into] = file.get_slice(key)[inside]
        return out

    def dtype(self) -> "torch.dtype":
        """Return its dtype."""
        file, key, _, shape = self.blocks[0]
        # of an empty slice: a file names dtypes in safetensors' words
        return (file.get_slice(key)[:0] if shape else file.get_tensor(key)).dtype


def _overlap(
    start: tuple[int, ...], size: tuple[int, ...], offset: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[tuple[slice, ...] | None, tuple[slice, ...]]:
    """Return which part of a stored block lies in a wanted one, and where there; None: no part."""
    inside: list[slice] = []
    into: list[slice] = []
    for a, n, b, m in zip(start, size, offset, shape, strict=True):
        first, last = max(a, b), min(a + n, b + m)
        if first >= last:
            return None, ()
        inside.append(slice(first - b, last - b))
        into.append(slice(first - a, last - a))
    return tuple(inside), tuple(into)


def has_group(folder: Path, group: str) -> bool:
    """Return whether a checkpoint has a group of tensors, whole or in shares."""
    return (folder / f"{group}.safetensors").is_file() or bool(_shares_of(folder, group))


def open_group(folder: Path, group: str) -> dict[str, StoredTensor]:
    """Open a group of tensors for reading; nothing is read but headers.

    Args:
        folder: The checkpoint, whose files have been verified.
        group: Name of the group.

    Raises:
        UserError: The shares do not add up to whole tensors.
    """
    from safetensors import safe_open

    paths = _shares_of(folder, group) or [folder / f"{group}.safetensors"]
    blocks: dict[str, list[tuple[Any, str, tuple[int, ...], tuple[int, ...]]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        file = safe_open(path, framework="pt")
        recorded = json.loads((file.metadata() or {}).get("shapes", "null"))
        for key in file.keys():  # noqa: SIM118 - not a dict
            shape = tuple(file.get_slice(key).get_shape())
            name, offset, whole = key, (0,) * len(shape), shape
            if recorded is not None:
                match = KEY.fullmatch(key)
                assert match is not None, f"{path}: {key} names no offset"
                name, offset = match[1], tuple(int(i) for i in match[2].split(",") if i)
                whole = tuple(recorded[name])
            shapes[name] = whole
            blocks.setdefault(name, []).append((file, key, offset, shape))
    for name, shape in shapes.items():
        stored = sum(math.prod(size) for *_, size in blocks[name])
        if stored != math.prod(shape):
            raise UserError(
                f"{folder}: the shares of {group}'s {name} have {stored} of its {math.prod(shape)} elements; remove "
                f"this checkpoint to go on from the one before, or --restart"
            )
    return {name: StoredTensor(shape, blocks[name]) for name, shape in shapes.items()}


def _shares_of(folder: Path, group: str) -> list[Path]:
    """Return the files of a group that was saved in shares, in the order of the processes."""
    found = []
    for path in folder.glob("*.safetensors"):
        match = FILE.fullmatch(path.name)
        if match and match[1] == group:
            found.append(path)
    return sorted(found)
