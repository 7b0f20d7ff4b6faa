"""Test checkpoints: exact round trips, crashes, and choice of the newest valid one."""

import contextlib
import json
import os

import pytest
import torch

from pipeline.errors import UserError
from pipeline.store import files
from pipeline.store.checkpoints import CheckpointStore, progress, step_folders
from pipeline.store.optimizer_state import load_optimizer, optimizer_tensors
from tests.pipeline.store.test_artifacts import Crash, crash_at


class Said(list):
    def __call__(self, line):
        self.append(line)


def make(tmp_path, run_id="run", keep=2, every=10):
    return CheckpointStore(tmp_path / "checkpoints", every, keep, run_id, "print", say=Said())


def save(store, step, **state):
    return store.save(step, {"model": {"w": torch.full((3,), float(step))}}, {"n": step, **state}, 100)


def test_round_trip_of_tensors_and_state(tmp_path):
    store = make(tmp_path)
    w = torch.randn(3, 4)
    group = {
        "w": w, "tied": w, "turned": w.t(), "half": w.bfloat16(), "bytes": torch.get_rng_state(),
        "count": torch.tensor(7), "flag": torch.tensor([True]), "none": torch.zeros(0, 3), "row": w[1],
    }  # fmt: skip
    state = {"loss": 0.1 + 0.2, "big": 2**70, "list": [1, None, "é"], "nan": float("inf")}
    store.save(5, {"model": group, "other": {}}, state, None)
    found = make(tmp_path).newest()
    assert found.step == 5 and found.state == state and found.tensors("other") == {}
    back = found.tensors("model")
    assert set(back) == set(group)
    for name, tensor in group.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name


def parts():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    bias, rest = [model[0].bias, model[2].bias], [model[0].weight, model[2].weight]
    groups = [{"params": rest}, {"params": bias, "weight_decay": 0.0, "lr": 1e-2}]
    return model, torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))


def train(model, optimizer, start, stop):
    for step in range(start, stop):
        batch = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()


def test_resumed_training_gives_the_same_bytes(tmp_path):
    straight, optimizer = parts()
    train(straight, optimizer, 0, 12)
    model, optimizer = parts()
    train(model, optimizer, 0, 5)
    tensors, state = optimizer_tensors(optimizer)
    make(tmp_path).save(5, {"model": model.state_dict(), "optimizer": tensors}, {"optimizer": state})
    found = make(tmp_path).newest()
    again, optimizer = parts()
    again.load_state_dict(found.tensors("model"))
    load_optimizer(optimizer, found.tensors("optimizer"), found.state["optimizer"])
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95) and optimizer.param_groups[1]["lr"] == 1e-2
    train(again, optimizer, 5, 12)
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def test_an_optimizer_of_another_shape_is_refused_unchanged():
    model, optimizer = parts()
    train(model, optimizer, 0, 2)
    tensors, state = optimizer_tensors(optimizer)
    other = torch.optim.AdamW([{"params": [torch.zeros(3)]}, {"params": [torch.zeros(2)]}])
    with pytest.raises(UserError, match=r"groups have .*; start again with --restart$"):
        load_optimizer(other, tensors, state)
    wide = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Linear(8, 1))
    groups = [{"params": [wide[0].weight, wide[1].weight]}, {"params": [wide[0].bias, wide[1].bias]}]
    other = torch.optim.AdamW(groups)
    misfit = r"optimizer state 0.exp_avg is \(8, 4\), its parameter \(8, 5\); start again with --restart$"
    with pytest.raises(UserError, match=misfit):
        load_optimizer(other, tensors, state)
    other = torch.optim.SGD([{"params": group["params"]} for group in optimizer.param_groups])
    with pytest.raises(UserError, match=r"optimizer options differ: .*; start again with --restart$"):
        load_optimizer(other, tensors, state)
    assert other.state_dict()["state"] == {}


@pytest.mark.parametrize("harm", ["flip", "cut", "delete", "stray", "link", "empty", "renumber", "state"])
def test_the_newest_valid_checkpoint_is_loaded_and_damage_reported(tmp_path, harm):
    store = make(tmp_path)
    save(store, 10)
    newest = save(store, 20)
    path = newest / "model.safetensors"
    if harm == "flip":
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    elif harm == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif harm == "delete":
        path.unlink()
    elif harm == "stray":
        (newest / "optimizer.pt").write_text("x")
    elif harm == "link":
        path.rename(tmp_path / "away")
        path.symlink_to(tmp_path / "away")
    elif harm == "empty":
        for file in newest.iterdir():
            file.unlink()
    elif harm == "renumber":
        newest.rename(newest.with_name("step-00000030"))
    elif harm == "state":
        (newest / "state.json").write_text('{"n": 99}')
    store = make(tmp_path)
    assert store.newest().step == 10 and store.newest().state == {"n": 10}
    assert len(store.say) == 1 and "set aside as .damaged-step-" in store.say[0]
    assert [path.name for path in step_folders(store.folder)] == ["step-00000010"]


def test_no_valid_checkpoint_is_reported(tmp_path):
    store = make(tmp_path)
    (save(store, 10) / "state.json").unlink()
    store = make(tmp_path)
    assert store.newest() is None
    assert len(store.say) == 2 and "starting from the beginning" in store.say[1]
    empty = make(tmp_path / "other")
    assert empty.newest() is None and empty.say == []


def test_checkpoints_of_another_run_are_not_loaded(tmp_path):
    save(make(tmp_path, "a"), 10)
    store = make(tmp_path, "b")
    assert store.newest() is None and "belongs to another run" in store.say[0]


def test_prune_goes_by_step_not_by_file_time(tmp_path):
    store = make(tmp_path, keep=2)
    for step in (10, 20):
        save(store, step)
    os.utime(store.folder / "step-00000020", (0, 0))
    save(store, 30)
    assert [path.name for path in step_folders(store.folder)] == ["step-00000020", "step-00000030"]
    assert progress(store.folder) == (30, 100)


def test_due():
    assert [step for step in range(1, 31) if make(files.Path("x")).due(step)] == [10, 20, 30]
    assert not make(files.Path("x"), every=0).due(10)


def test_saves_are_limited_to_a_share_of_the_time(tmp_path, monkeypatch):
    """Steps of 1 s, saves of 2 s and a share of 5 % make one save in 40 s, not in 10."""
    clock = [0.0]
    monkeypatch.setattr("pipeline.store.checkpoints.time.monotonic", lambda: clock[0])
    store = make(tmp_path)
    store.max_share = 0.05

    def slow_save(step):
        store.require_space(0)
        clock[0] += 2
        save(store, step)

    saved = []
    for step in range(1, 201):
        clock[0] += 1
        if store.due(step):
            slow_save(step)
            saved.append(step)
    assert saved[0] == 10 and all(step % 10 == 0 for step in saved)
    assert 2 * len(saved) <= 0.05 * clock[0] and len(saved) == 5


def test_saving_a_step_twice_keeps_the_first(tmp_path):
    store = make(tmp_path)
    before = (save(store, 10) / "manifest.json").read_bytes()
    save(store, 10)
    assert (store.folder / "step-00000010" / "manifest.json").read_bytes() == before
    (store.folder / "step-00000010" / "state.json").write_text("{}")  # only if it is damaged is it written again
    save(store, 10)
    assert make(tmp_path).newest().step == 10


def test_adopt_moves_the_trainers_folder(tmp_path):
    store = make(tmp_path)
    written = store.folder / ".tmp-trainer" / "checkpoint-10"
    written.mkdir(parents=True)
    (written / "trainer_state.json").write_text("{}")
    path = store.adopt(written, 10, 50, {"best": 1.5}, {"best": {"w": torch.ones(2)}})
    assert not written.exists()
    found = make(tmp_path).newest()
    assert found.path == path and (path / "trainer" / "trainer_state.json").exists()
    assert found.state == {"best": 1.5} and torch.equal(found.tensors("best")["w"], torch.ones(2))
    (path / "trainer" / "trainer_state.json").write_text("[]")
    assert make(tmp_path).newest() is None


@pytest.mark.parametrize("keep", [1, 2])
def test_a_crash_during_a_save_leaves_a_valid_checkpoint(tmp_path, monkeypatch, keep):
    at, seen = 0, set()
    while True:
        at += 1
        folder = tmp_path / str(at)
        for step in (10, 20):
            save(make(folder, keep=keep), step)
        with monkeypatch.context() as patch:
            made = crash_at(patch, at)
            with contextlib.suppress(Crash):
                save(make(folder, keep=keep), 30)
        if made[0] < at:
            break
        store = make(folder, keep=keep)
        seen.add(store.newest().step)
        assert store.say == []  # nothing that was there is damaged
        save(store, 40)
        assert make(folder, keep=keep).newest().step == 40
        left = sorted(path.name for path in store.folder.iterdir())
        assert len(left) == keep and not any(name.startswith(".") for name in left)
    assert seen == {20, 30} and at > 10


def test_the_manifest_has_the_fields_of_the_contract(tmp_path):
    manifest = json.loads((save(make(tmp_path), 10) / "manifest.json").read_text())
    assert manifest.keys() == {"step", "total", "run_id", "fingerprint", "files", "versions", "digest"}
    assert set(manifest["files"]) == {"model.safetensors", "state.json"}
