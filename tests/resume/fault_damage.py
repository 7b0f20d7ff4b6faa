"""What can be done to a checkpoint, a file or a disk, and whether the checks see it."""

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
    """Turns one bit; without a number, one a third of the way in."""
    data = bytearray(file.read_bytes())
    bit = len(data) * 8 // 3 if bit is None else bit
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def cut(share: float) -> Spoil:
    """Cuts a file to a share of its size, by two bytes at least: the last may be a line's end, which nobody misses."""
    return lambda file: os.truncate(file, max(0, min(int(file.stat().st_size * share), file.stat().st_size - 2)))


def within(name: str, spoil: Spoil) -> Spoil:
    """The same for a file of a folder."""
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
    """The same bytes, behind a symbolic link."""
    there = file.parent.parent.parent / f"elsewhere-{file.name}"
    shutil.move(file, there)
    file.symlink_to(there)


def problems(checkpoint: Path) -> list[str]:
    """What the store's own check says of a checkpoint, whoever's run it is of."""
    from pipeline.store.checkpoints import CheckpointStore

    try:
        run_id = json.loads((checkpoint / "manifest.json").read_text()).get("run_id", "")
    except (OSError, ValueError, AttributeError):
        run_id = ""
    return CheckpointStore(checkpoint.parent, every=1, keep=1, run_id=run_id)._problems(checkpoint)


def missed_flips(checkpoint: Path, name: str, count: int) -> list[int]:
    """Of `count` bits of a file, at random places, those whose turning the check does not see."""
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
    """`folder` with what it holds on a disk of its own of so many bytes and file names; yields a function that makes it
    large. Raises not_here(reason) where nothing may be mounted."""
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
    """Renames into place, of a traced run, before which something written was not synced, or after which the folder was
    not. Names that begin with a dot are not in place yet, or any more."""
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
