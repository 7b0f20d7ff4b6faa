"""Damage checkpoints, files and disks, and see whether the checks notice."""

import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fault_worker import Call

Spoil = Callable[[Path], None]


def file_names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def flip(file: Path, bit: int | None = None) -> None:
    """Flip one bit of a file: the given one, or one a third of the way in."""
    data = bytearray(file.read_bytes())
    bit = len(data) * 8 // 3 if bit is None else bit
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def cut(share: float) -> Spoil:
    """Truncate a file to a share of its size, by at least two bytes: one may be a newline."""
    return lambda file: os.truncate(file, max(0, min(int(file.stat().st_size * share), file.stat().st_size - 2)))


def within(name: str, spoil: Spoil) -> Spoil:
    """Apply a kind of damage to a file of a folder."""
    return lambda folder: spoil(folder / name)


def cuts(checkpoint: Path) -> Iterator[tuple[str, Spoil]]:
    for name in file_names(checkpoint):
        for share in (0.0, 0.01, 0.5, 0.999):
            yield f"{name}.{share}", within(name, cut(share))


def flips(checkpoint: Path) -> Iterator[tuple[str, Spoil]]:
    for name in file_names(checkpoint):
        yield name, within(name, flip)


def misfits(checkpoint: Path) -> Iterator[tuple[str, Spoil]]:
    for name in file_names(checkpoint):
        yield f"{name}.gone", within(name, Path.unlink)
        yield f"{name}.link", within(name, _as_link)
    yield "stray", lambda folder: (folder / "stray.bin").write_bytes(b"x")
    yield "empty", lambda folder: (shutil.rmtree(folder), folder.mkdir())


def _as_link(file: Path) -> None:
    """Replace a file by a symbolic link to the same bytes."""
    there = file.parent.parent.parent / f"elsewhere-{file.name}"
    shutil.move(file, there)
    file.symlink_to(there)


def problems(checkpoint: Path) -> list[str]:
    """Return what the store's own check says of a checkpoint, whichever run it belongs to."""
    from pipeline.store.checkpoints import CheckpointStore

    try:
        run_id = json.loads((checkpoint / "manifest.json").read_text()).get("run_id", "")
    except (OSError, ValueError, AttributeError):
        run_id = ""
    return CheckpointStore(checkpoint.parent, every=1, keep=1, run_id=run_id)._problems(checkpoint)


def missed_flips(checkpoint: Path, name: str, count: int) -> list[int]:
    """Flip `count` bits of a file at random positions, and return those that the check misses."""
    file = checkpoint / name
    whole = file.read_bytes()
    assert not problems(checkpoint), problems(checkpoint)
    missed = []
    for bit in random.Random(name).sample(range(len(whole) * 8), min(count, len(whole) * 8)):
        flip(file, bit)
        if not problems(checkpoint):
            missed.append(bit)
        file.write_bytes(whole)
    return missed


@contextmanager
def small_disk(folder: Path, size: int, names: int, not_here: type[Exception]) -> Iterator[Callable[[], None]]:
    """Move a folder to a small disk of its own.

    Args:
        folder: the folder; its contents are copied to the disk.
        size: bytes that the disk has room for.
        names: how many files it has room for.
        not_here: the exception to raise where nothing can be mounted.

    Yields:
        A function that makes the disk large.
    """
    kept = folder.with_name(f"{folder.name}-kept")
    folder.rename(kept)
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size},nr_inodes={names}", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        raise not_here(done.stderr.strip() or "mount is refused")
    try:
        shutil.copytree(kept, folder, dirs_exist_ok=True)
        large = "remount,size=1g,nr_inodes=100000"
        yield lambda: subprocess.run(["mount", "-o", large, str(folder)], check=True)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def not_synced(calls: tuple[Call, ...]) -> list[str]:
    """Return the renames of a traced run that a power cut could undo or expose.

    What was written must be synced before the rename, and the folder after it. Names that begin
    with a dot are not in place yet, or no longer.
    """
    wrong: list[str] = []
    written: set[str] = set()
    waiting: dict[str, str] = {}  # folder → what was renamed into it
    for call in calls:
        if call.failed or not call.paths:
            continue
        first = call.paths[0]
        if call.name in ("write", "pwrite64", "writev", "ftruncate", "sendfile"):
            written.add(first)
        elif call.name == "copy_file_range":
            written.add(call.paths[-1])
        elif call.name in ("fsync", "fdatasync"):
            written.discard(first)
            waiting.pop(first, None)
        elif call.name.startswith("unlink"):
            written.discard(first)
        elif call.name.startswith("rename") and len(call.paths) > 1:
            source, target = call.paths[0], call.paths[-1]
            if "/." not in target:
                dirty = [path for path in written if path == source or path.startswith(source + "/")]
                wrong += [f"{path} is renamed to {target} and was not synced" for path in dirty]
                waiting[os.path.dirname(target)] = target
            moved = {path for path in written if path == source or path.startswith(source + "/")}
            written = (written - moved) | {target + path[len(source) :] for path in moved}
    return wrong + [f"{target} stands, and {folder} was not synced" for folder, target in waiting.items()]
