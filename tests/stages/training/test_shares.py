"""Test checkpoints of which each process writes its share: other layouts, full disks, kills."""

import contextlib
import errno
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.errors import UserError
from pipeline.launch import parallel
from pipeline.stage import StopFlag
from pipeline.store import shares
from pipeline.store import together as shared_saves
from pipeline.store.checkpoints import CheckpointStore, step_folders
from pipeline.store.shares import open_group, write_shares
from stages.models.layout import Layout
from stages.models.loading import prepare
from stages.models.sharding import gather_tensors, local_shard, shard, shard_like
from stages.models.shares import own_bytes, own_runs, own_share, read_like
from stages.training.checkpoint import TrainingState, load_checkpoint, read_weights, save_checkpoint
from stages.training.selection import Best
from stages.training.session import Session
from stages.training.trainee import Average, make_trainee, optimizer_step
from tests.together import together

CPU = torch.device("cpu")


def make():
    """A tiny model, the same in every process."""
    torch.manual_seed(0)
    return prepare(
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=61, hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1,
            )
        )
    )  # fmt: skip


def session_in(folder):
    """A run whose checkpoints all ranks save, as pipeline/running.py makes it for each."""
    rank, size = parallel.rank_and_world_size()
    store = CheckpointStore(folder, 1, 2, "run", say=lambda line: None, writes=rank == 0)
    if rank:
        newest = step_folders(folder)
        store.resume_step = int(newest[-1].name.removeprefix("step-")) if newest else None
    return Session("rm", 7, store, SimpleNamespace(), StopFlag(), collective=size > 1)


def training_of(layout=None, tensor=1, fsdp=True):
    """A tiny training with all that a checkpoint may hold."""
    size = parallel.rank_and_world_size()[1]
    if tensor > 1:
        parallel.arrange(tensor=tensor, fsdp=fsdp)
    model = make()
    if size > 1 and not (layout is not None and layout.splits_step):
        shard(model, CPU, layout=layout)
    options = {"learning_rate": 1e-2, "max_grad_norm": 0.5, "weight_decay": 0.01, "layout": layout}
    trainee = make_trainee("model", model, **options)
    return TrainingState([trainee], Best("best", None, False), Average(0.9))


def step(training, number):
    """Take a step down a made-up gradient, which is the same in every layout."""
    trainee = training.trainees[0]
    for i, p in enumerate(trainee.parameters.values()):
        whole = torch.sin(torch.arange(p.numel(), dtype=torch.float32) * (i + number)).view(p.shape)
        p.grad = shard_like(p, whole)
    optimizer_step(trainee, 1e-2, number)
    training.average.step(trainee)
    training.best.offer(-float(number), number, trainee)


def contents(training):
    """Return everything that a training holds, whole."""
    trainee = training.trainees[0]
    state = trainee.optimizer.state
    moments = {
        f"{i}.{name}": x
        for i, p in enumerate(p for group in trainee.optimizer.param_groups for p in group["params"])
        for name, x in state[p].items()
    }
    groups = {"weights": trainee.tensors(), "moments": moments, "best": training.best.tensors}
    groups["average"] = training.average.tensors
    whole = {}
    for name, group in groups.items():
        for key, x in group.items():
            whole[f"{name} {key}"] = (x.full_tensor() if isinstance(x, DTensor) else x).clone()
    return whole


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(found[name], x), name


@contextlib.contextmanager
def nothing_gathered():
    """Make gathering a tensor an error: a save needs only what each process holds."""

    def refuse(self, **options):
        raise AssertionError("a tensor is gathered")

    full_tensor, redistribute = DTensor.full_tensor, DTensor.redistribute
    DTensor.full_tensor = DTensor.redistribute = refuse
    try:
        yield
    finally:
        DTensor.full_tensor, DTensor.redistribute = full_tensor, redistribute


LAYOUTS = {
    "fsdp2": ({}, 2),
    "four": ({}, 4),
    "optimizer": ({"layout": Layout(splits_step=True)}, 2),
    "offloaded": ({"layout": Layout(offload="all")}, 2),
    "tensor": ({"tensor": 2, "fsdp": False}, 2),
    "tensor beside fsdp2": ({"tensor": 2}, 4),
    "tensor in groups": ({"tensor": 2, "fsdp": False}, 4),
}


def resume_and_save(folder, file, options, last):
    """Resume, compare with what was held, take a step, save it, and record what is held now."""
    session, training = session_in(folder), training_of(**options)
    done, state = load_checkpoint(session, training, 9)
    if done:
        assert state["n"] == done
        assert_same(contents(training), load_file(file))
    for number in range(done + 1, last + 1):
        step(training, number)
        with nothing_gathered():
            save_checkpoint(session, number, 9, training, {"n": number})
    now = contents(training)
    step(training, 8)  # training goes on while threads write
    session.finish_saves()
    if parallel.is_rank_zero():
        save_file(now, file)
        assert not list(folder.glob(".tmp-*"))


@pytest.mark.parametrize("chain", [
    ["fsdp2", "four", "whole", "fsdp2"],
    ["tensor beside fsdp2", "optimizer", "tensor"],
    pytest.param(["tensor in groups", "offloaded", "whole"], marks=pytest.mark.slow),
])  # fmt: skip
def test_any_layout_goes_on(chain, tmp_path):
    """What is resumed is bit for bit what was held: weights, moments, best weights, average."""
    for number, name in enumerate(chain, 1):
        options, size = LAYOUTS.get(name, ({}, 1))
        together(size, resume_and_save, tmp_path / "checkpoints", tmp_path / "held.safetensors", options, 2 * number)


def check_one_resumes_from_its_own_file(folder):
    """Each process reads about its share, and holds the best weights in shares, too."""
    session, training = session_in(folder), training_of()
    step(training, 1)
    save_checkpoint(session, 1, 9, training, {})
    session.finish_saves()
    read = []
    real = shares.StoredTensor.read

    def counting(self, runs=None):
        x = real(self, runs)
        read.append(x.nbytes)
        return x

    shares.StoredTensor.read = counting
    session = session_in(folder)
    again = training_of()
    load_checkpoint(session, again, 9)
    held = sum(local_shard(x).nbytes for x in again.trainees[0].tensors().values())
    groups = 5  # weights, two moments, best weights, average
    assert sum(read) <= groups * held * 1.1
    assert all(isinstance(x, DTensor) for x in again.best.tensors.values())


def test_a_process_reads_only_what_it_holds(tmp_path):
    together(2, check_one_resumes_from_its_own_file, tmp_path)


def check_blocks(folder):
    """Cuts along either dimension, uneven ones, one dimension cut twice, and repeated tensors."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    rank = dist.get_rank()
    strided = _StridedShard(0, split_factor=2)
    cases = {
        "rows": ((7, 3), [Shard(0), Replicate()]),
        "columns": ((3, 7), [Replicate(), Shard(1)]),
        "both": ((5, 6), [Shard(0), Shard(1)]),
        "twice": ((8, 3), [strided, Shard(0)]),
        "twice unevenly": ((10, 3), [strided, Shard(0)]),
        "left to right": ((5,), [Shard(0), Shard(0)]),
        "few rows": ((1, 4), [Shard(0), Replicate()]),
        "repeated": ((4,), [Replicate(), Replicate()]),
        "scalar": ((), [Replicate(), Replicate()]),
        "empty": ((0, 3), [Shard(0), Replicate()]),
    }
    whole = {name: torch.randn(shape, generator=torch.Generator().manual_seed(3)) for name, (shape, _) in cases.items()}
    held = {
        name: distribute_tensor(whole[name].clone(), mesh, placements, src_data_rank=None)
        for name, (_, placements) in cases.items()
    }
    whole["plain"] = held["plain"] = torch.arange(4)
    own = {name: share for name, x in held.items() if (share := own_share(x)) is not None}
    assert {name: share.nbytes for name, share in own.items()} == {
        name: own_bytes(x) for name, x in held.items() if name in own
    }
    write_shares(folder / shares.file_name("g", rank, 4), own)
    dist.barrier()
    stored = open_group(folder, "g")
    assert stored.keys() == whole.keys()
    for name, x in whole.items():
        assert torch.equal(stored[name].read(), x), name
        again = read_like(held[name], stored[name])
        assert torch.equal(local_shard(again), local_shard(held[name])), name
    assert sum(stop - start for start, stop in own_runs(held["columns"])[1]) == held["columns"].to_local().shape[1]


def test_blocks_are_those_that_torch_gives_each_process(tmp_path):
    together(4, check_blocks, tmp_path)


def check_full_disk(folder, failing):
    """A failure of any process ends the run on all, and leaves the checkpoint before."""
    session, training = session_in(folder), training_of()
    step(training, 1)
    save_checkpoint(session, 1, 9, training, {})
    session.finish_saves()
    before = {path.name: path.read_bytes() for path in (folder / "step-00000001").iterdir()}

    def full(path, parts):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    real = shares.write_shares
    if parallel.rank_and_world_size()[0] == failing:
        shares.write_shares = full
    step(training, 2)
    save_checkpoint(session, 2, 9, training, {})  # returns: the failure is of a thread
    with pytest.raises(UserError, match="No space left on device"):
        for number in range(3, 500):  # the next steps of a training
            session.save_is_due(number)
            dist.barrier()
    dist.barrier()
    assert [path.name for path in step_folders(folder)] == ["step-00000001"]
    assert {path.name: path.read_bytes() for path in (folder / "step-00000001").iterdir()} == before
    shares.write_shares = real
    session = session_in(folder)
    assert load_checkpoint(session, training, 9)[0] == 1
    step(training, 2)
    save_checkpoint(session, 2, 9, training, {})  # there is room again
    session.finish_saves()
    dist.barrier()
    assert len(step_folders(folder)) == 2


def check_full_disks(folder):
    for failing in (0, 1):
        check_full_disk(folder / str(failing), failing)


def test_a_full_disk_ends_the_run_at_the_next_step(tmp_path):
    together(2, check_full_disks, tmp_path)


def check_folder_of_its_own(folder):
    session, training = session_in(folder / str(parallel.rank_and_world_size()[0])), training_of()
    shared_saves.SEEN_WITHIN = 0.1
    step(training, 1)
    with pytest.raises(UserError, match="not every process sees this folder"):
        save_checkpoint(session, 1, 9, training, {})


def test_machines_without_a_common_file_system_are_refused(tmp_path):
    together(2, check_folder_of_its_own, tmp_path)


def check_damage(folder):
    session, training = session_in(folder), training_of()
    for number in (1, 2, 3):
        step(training, number)
        save_checkpoint(session, number, 9, training, {"n": number})
    session.finish_saves()
    dist.barrier()


def test_a_damaged_share_is_set_aside(tmp_path):
    together(2, check_damage, tmp_path / "made")
    for damage in ("missing", "flipped", "stray"):
        shutil.copytree(tmp_path / "made", tmp_path / damage)
        path = tmp_path / damage / "step-00000003" / "model_optimizer-00001-of-00002.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        if damage == "missing":
            path.unlink()
        elif damage == "flipped":
            path.write_bytes(content)
        else:
            path.with_name("model_optimizer-00002-of-00003.safetensors").write_bytes(content)
        lines = []
        found = CheckpointStore(tmp_path / damage, 1, 2, "run", say=lines.append).newest()
        assert found.step == 2 and found.state["n"] == 2 and "set aside" in lines[0], damage


def test_shares_that_do_not_add_up_are_refused(tmp_path):
    half = shares.Share((4,), [((0,), torch.zeros(2))])
    write_shares(tmp_path / shares.file_name("model", 0, 1), {"w": half})
    with pytest.raises(UserError, match="2 of its 4 elements"):
        open_group(tmp_path, "model")


def test_one_process_saves_whole_weights_and_reads_them(tmp_path):
    session, training = session_in(tmp_path), training_of()
    step(training, 1)
    save_checkpoint(session, 1, 9, training, {})
    found = session.checkpoints.newest()
    assert (found.path / "best.safetensors").is_file()
    assert_same(read_weights(training.trainees[0], found, "best"), gather_tensors(training.best.tensors))
