"""Test a checkpoint that several processes write: who may still touch the folder, and when."""

import os

import torch

from pipeline.store.checkpoints import CheckpointStore, step_folders
from pipeline.store.shares import Share
from pipeline.store.together import SharedSave


def share_of(rank):
    """Return the half of a vector of four that a process holds."""
    return {"model": {"weight": Share((4,), [((2 * rank,), torch.full((2,), float(rank)))])}}


def test_a_process_leaves_the_folder_alone_once_it_has_reported(tmp_path, monkeypatch):
    """Rank 0 may complete the checkpoint, and rename its folder, at that very instant."""
    staged = tmp_path / ".tmp-step-00000004"
    staged.mkdir()
    replace = os.replace

    def replace_and_complete(source, target):
        replace(source, target)
        os.rename(staged, tmp_path / "step-00000004")

    monkeypatch.setattr(os, "replace", replace_and_complete)
    save = SharedSave(staged, (1, 2), share_of(1), {}, [], None)
    save.join()
    assert save.problem is None and (tmp_path / "step-00000004" / "share-00001.json").is_file()


def test_two_processes_complete_a_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path, every=4, keep=2, run_id="run")
    store.start_clock()
    assert store.begin_shares(4, 100)
    other = SharedSave(store.staged(4), (1, 2), share_of(1), {}, [], None)
    store.write_shares(4, share_of(0), {"step": 4}, 8, (0, 2))
    other.join()
    store.shared.join()
    assert (other.problem, store.shared.problem) == (None, None)
    [folder] = step_folders(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json", "model-00000-of-00002.safetensors", "model-00001-of-00002.safetensors", "state.json",
    ]  # fmt: skip
