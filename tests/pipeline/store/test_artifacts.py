"""Test artifacts: atomic publication, detection of damage, and the lock."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.store import artifacts, files, integrity
from pipeline.store.artifacts import ArtifactStore

ROOT = Path(__file__).resolve().parents[3]


class Crash(BaseException):
    """Stand for a kill: nothing in the code under test catches it."""


def record(run_id, fingerprint="f"):
    return {
        "stage": "sft",
        "run_id": run_id,
        "fingerprint": fingerprint,
        "config": {},
        "inputs": {},
        "metrics": {},
        "finished_at": "2026-11-23T00:00:00+00:00",
    }


OLD = {"model/weights": "old", "model/gone": "old", "value_model/weights": "old", "metrics.jsonl": "old\n"}
NEW = {"model/weights": "new", "model/extra/deep": "new", "report.txt": "new", "metrics.jsonl": "new\n"}


def publish(store, contents, run_id):
    """Perform one run as the pipeline does, from `begin` to publication."""
    with store.lock("sft"):
        store.begin("sft", {"run_id": run_id, "stage": "sft"})
        for name, text in contents.items():
            path = store.work_folder("sft") if name == "metrics.jsonl" else store.folder("sft") / ".tmp-publish"
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text(text)
        step = store.work_folder("sft") / "checkpoints" / "step-00000001"
        step.mkdir(parents=True, exist_ok=True)
        (step / "run").write_text(run_id)
        return store.publish("sft", store.folder("sft") / ".tmp-publish", record(run_id))


def published(store):
    """Return {name: text} of everything in the manifest, verified."""
    manifest = store.verify("sft")
    return {name: (store.folder("sft") / name).read_text() for name in manifest["outputs"]}


def strange(folder):
    """Return the temporary files that an idle stage folder must not contain."""
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(".") and path.name != ".lock")


def crash_at(monkeypatch, count):
    """Make the count-th change of the disk from now on raise Crash before it happens.

    Returns:
        A list with one number, the changes so far.
    """
    made = [0]

    def counted(function):
        def call(*arguments, **named):
            made[0] += 1
            if made[0] == count:
                raise Crash()
            return function(*arguments, **named)

        return call

    for name in ("rename", "replace", "fsync", "unlink", "rmdir", "mkdir"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    monkeypatch.setattr(shutil, "copyfile", counted(shutil.copyfile))
    return made


@pytest.mark.parametrize("redo", [False, True])
def test_a_crash_during_publication_leaves_the_old_or_the_new_artifact(tmp_path, monkeypatch, redo):
    at, seen = 0, set()
    while True:
        at += 1
        store = ArtifactStore(tmp_path / str(at), "small")
        if redo:
            publish(store, OLD, "old")
            (store.folder("sft") / "notes.txt").write_text("a person's own")
        with monkeypatch.context() as patch:
            made = crash_at(patch, at)
            with contextlib.suppress(Crash):
                publish(store, NEW, "new")
        if made[0] < at:
            break
        store = ArtifactStore(tmp_path / str(at), "small")
        store.recover_if_idle("sft")
        folder = store.folder("sft")
        manifest = store.manifest("sft") if folder.exists() else None
        if manifest is None:
            assert not redo and not (folder / "model").exists()
            seen.add("none")
        else:
            assert published(store) == (NEW if manifest["run_id"] == "new" else OLD)
            assert (folder / "checkpoints" / "step-00000001" / "run").read_text() == manifest["run_id"]
            seen.add(manifest["run_id"])
            assert not (folder / ".old").exists() and not (folder / ".publish").exists()
            gone = ("report.txt", "model/extra") if manifest["run_id"] == "old" else ("value_model", "model/gone")
            assert not any((folder / name).exists() for name in gone)
            if redo:
                assert (folder / "notes.txt").read_text() == "a person's own"
        if folder.exists():
            left = strange(folder)
            assert left in ([], [".redo"]), (at, left)
            if manifest is not None and manifest["run_id"] == "new":
                assert left == [] and store.run("sft") is None
        # the next run succeeds as if nothing had happened
        publish(store, {**NEW, "model/weights": "newer"}, "newer")
        assert published(store)["model/weights"] == "newer" and strange(folder) == []
    assert at > 30 and seen == ({"old", "new"} if redo else {"none", "new"})


def test_a_redo_keeps_the_old_artifact_until_the_new_one_is_complete(tmp_path):
    store = ArtifactStore(tmp_path, "small")
    publish(store, OLD, "old")
    with store.lock("sft"):
        store.begin("sft", {"run_id": "new", "stage": "sft"})
        assert store.work_folder("sft").name == ".redo" and published(store) == OLD
        (store.work_folder("sft") / "metrics.jsonl").write_text("half\n")
    assert published(store) == OLD and store.run("sft")["run_id"] == "new"
    with store.lock("sft"):
        store.drop_run("sft")
    assert published(store) == OLD and store.run("sft") is None and strange(store.folder("sft")) == []


def test_metrics_of_a_first_run_are_dropped_with_it(tmp_path):
    store = ArtifactStore(tmp_path, "small")
    with store.lock("sft"):
        store.begin("sft", {"run_id": "a", "stage": "sft"})
        (store.work_folder("sft") / "metrics.jsonl").write_text("half\n")
        store.drop_run("sft")
    assert not (store.folder("sft") / "metrics.jsonl").exists()


def damaged(store):
    with pytest.raises(UserError) as caught:
        store.verify("sft")
    return caught.value.lines


@pytest.mark.parametrize("name", ["model/weights", "metrics.jsonl"])
def test_damage_is_reported_by_file_name(tmp_path, name):
    store = ArtifactStore(tmp_path, "small")
    publish(store, OLD, "old")
    path = store.folder("sft") / name
    good = path.read_bytes()
    for offset in range(len(good)):
        for bit in (0, 7):
            bad = bytearray(good)
            bad[offset] ^= 1 << bit
            path.write_bytes(bad)
            (line,) = damaged(store)
            assert line.startswith(f"{path}: sha256 is ") and "`rlhf run sft -c CONFIG --force` rebuilds it" in line
    path.write_bytes(good[:-1])
    assert damaged(store)[0].startswith(f"{path}: has {len(good) - 1} bytes and should have {len(good)}")
    path.unlink()
    assert damaged(store)[0].startswith(f"{path}: is missing")
    path.symlink_to("/etc/hostname")
    assert any(f"{path}: is a symbolic link" in line for line in damaged(store))


def test_damage_of_the_manifest_is_detected(tmp_path):
    store = ArtifactStore(tmp_path, "small")
    publish(store, OLD, "old")
    path = store.folder("sft") / "manifest.json"
    good = path.read_bytes()
    for offset in range(0, len(good), 3):
        bad = bytearray(good)
        bad[offset] ^= 1
        path.write_bytes(bad)
        try:  # whitespace may change without changing the object
            same = store.manifest("sft") == integrity.read_sealed(path)
        except UserError as error:
            same = str(path) in str(error)
        assert same
    path.write_bytes(good[: len(good) // 2])
    assert "damaged" in damaged(store)[0]


def test_a_stray_file_is_damage_only_in_a_model_folder(tmp_path):
    store = ArtifactStore(tmp_path, "small")
    publish(store, OLD, "old")
    (store.folder("sft") / "notes.txt").write_text("mine")
    store.verify("sft")
    stray = store.folder("sft") / "model" / "pytorch_model.bin"
    stray.write_text("code")
    assert damaged(store) == [f"{stray}: is not in the manifest; `rlhf run sft -c CONFIG --force` rebuilds it"]


@pytest.mark.parametrize("name", ["../../escape", "/etc/hostname", "model/../../../escape"])
def test_a_manifest_cannot_name_files_outside(tmp_path, name):
    store = ArtifactStore(tmp_path, "small")
    publish(store, OLD, "old")
    path = store.folder("sft") / "manifest.json"
    manifest = integrity.read_sealed(path)
    manifest["outputs"][name] = {"sha256": "0", "bytes": 0}
    files.write_json(path, integrity.seal(manifest))
    assert any("leaves the folder" in line for line in damaged(store))


def test_a_link_cannot_be_published(tmp_path):
    store = ArtifactStore(tmp_path, "small")
    with store.lock("sft"):
        content = store.folder("sft") / ".tmp-publish"
        content.mkdir()
        (content / "model").symlink_to("/tmp")
        with pytest.raises(UserError, match="is a link"):
            store.publish("sft", content, record("a"))


def test_one_process_has_the_lock_and_a_kill_releases_it(tmp_path):
    code = (
        "import sys, time; from pipeline.store.artifacts import ArtifactStore\n"
        f"with ArtifactStore({str(tmp_path)!r}, 'small').lock('sft'):\n"
        "    print('held', flush=True); time.sleep(60)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert other.stdout.readline() == "held\n"
        store = ArtifactStore(tmp_path, "small")
        assert store.is_held("sft")
        with (
            pytest.raises(UserError, match=rf"process {other.pid} on .* works on it; wait for it or stop it"),
            store.lock("sft"),
        ):
            pass
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert not store.is_held("sft")
        with store.lock("sft"):
            assert not store.is_held("sft")  # that is: by no other process
    finally:
        other.kill()
        other.wait()
        other.stdout.close()


def test_a_lock_in_a_folder_that_was_removed_is_refused(tmp_path, monkeypatch):
    take = artifacts.try_lock

    def late(handle, patience):
        (tmp_path / "small").rename(tmp_path / "doomed")
        return take(handle, patience)

    monkeypatch.setattr(artifacts, "try_lock", late)
    removed = pytest.raises(UserError, match="sft: was removed just now; run again")
    with removed, ArtifactStore(tmp_path, "small").lock("sft"):
        pass


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "small").write_text("a file where a folder should be")
    with pytest.raises(UserError, match="cannot be written"), ArtifactStore(tmp_path, "small").lock("sft"):
        pass


def test_too_little_space_is_reported_in_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 5))
    with pytest.raises(UserError, match=r"needs 2,000,000 bytes and 5 are free"):
        files.require_space(tmp_path, 2_000_000)


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_files_have_the_permissions_of_the_umask(tmp_path, umask, mode):
    """safetensors writes files that only their owner can read."""
    import torch
    from safetensors.torch import save_file

    from pipeline.store.cache import Cache
    from pipeline.store.checkpoints import CheckpointStore

    before = os.umask(umask)
    try:
        store = ArtifactStore(tmp_path, "modes")
        content = store.folder("sft") / ".tmp-publish"
        with store.lock("sft"):
            store.begin("sft", {"run_id": "1", "stage": "sft"})
            (content / "model" / "adapter").mkdir(parents=True)
            for name in ("model/model.safetensors", "model/adapter/adapter_model.safetensors"):
                save_file({"x": torch.zeros(1)}, content / name)
            (content / "model" / "config.json").write_text("{}")
            saved = CheckpointStore(store.work_folder("sft") / "checkpoints", every=1, keep=1, run_id="1")
            saved.save(1, {"model": {"x": torch.zeros(1)}}, {}, 1)
            store.publish("sft", content, record("1"))
        Cache(store.folder("sft") / ".cache").remember("logps", "", {"x": torch.zeros(1)})
    finally:
        os.umask(before)
    found = {path: path.stat().st_mode & 0o777 for path in store.folder("sft").rglob("*") if path.is_file()}
    assert {name.name for name in found} >= {"adapter_model.safetensors", "logps.safetensors", "manifest.json"}
    assert {path: bits for path, bits in found.items() if bits != mode and path.name != ".lock"} == {}


def test_times_are_published_outside_the_digest(tmp_path):
    """Times differ between runs, so the digest does not cover them.

    A redo publishes its own times, or removes the old ones if it has none.
    """
    store = ArtifactStore(tmp_path, "small")
    times = store.folder("sft") / "timing.jsonl"
    for number, text in enumerate(("one", "two", None)):
        with store.lock("sft"):
            store.begin("sft", {"run_id": str(number)})
            if text is not None:
                (store.work_folder("sft") / "timing.jsonl").write_text(text)
            content = store.folder("sft") / ".tmp-publish"
            content.mkdir()
            (content / "weights").write_text("w")
            manifest = store.publish("sft", content, record(str(number)))
        assert set(manifest["outputs"]) == {"weights"} and strange(store.folder("sft")) == []
        assert (times.read_text() if times.exists() else None) == text
    with store.lock("sft"):
        times.write_text("of an interrupted run")
        os.unlink(store.folder("sft") / "manifest.json")
        store.drop_run("sft")
    assert not times.exists()
