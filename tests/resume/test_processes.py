"""Test two processes that share a stage: results, and the death, hang or stop of one."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from resume_worker import (
    CONFIG,
    assert_same_figures,
    copy_without,
    end,
    published,
    rlhf,
    rlhf_together,
    rows_of,
    start,
    start_together,
)
from safetensors.torch import load_file

LONG = [pytest.param(stage, marks=pytest.mark.slow) for stage in ("base", "rankings", "dpo", "evaluate")]


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo", *LONG])
def test_two_processes_give_the_results_of_one(stage, oracle, tmp_path):
    """Rows, their order and samples are the same, and weights up to rounding."""
    root = copy_without(oracle, tmp_path, stage)
    run = ("run", stage, "-c", str(CONFIG), "--artifacts", str(root), "--only")
    assert rlhf_together(*run) == [0, 0]
    folder, alone = root / "micro" / stage, oracle / "micro" / stage
    manifest, expected = (json.loads((x / "manifest.json").read_text()) for x in (folder, alone))
    assert (manifest["world_size"], expected["world_size"]) == (2, 1)
    assert manifest["outputs"].keys() == expected["outputs"].keys()
    if stage in ("rankings", "evaluate"):
        names = ("train.jsonl", "validation.jsonl") if stage == "rankings" else ("responses.jsonl",)
        for name in names:
            for row, other in zip(rows_of(folder, name), rows_of(alone, name), strict=True):
                assert {**row, "score": 0} == {**other, "score": 0}
                assert row.get("score", 0) == pytest.approx(other.get("score", 0), abs=1e-4)
        return
    assert_same_figures(rows_of(folder), rows_of(alone))
    assert_same_figures(rows_of(folder, "evaluations.jsonl"), rows_of(alone, "evaluations.jsonl"))
    for name in manifest["outputs"]:
        if name.endswith(".safetensors"):
            ours, theirs = load_file(folder / name), load_file(alone / name)
            assert ours.keys() == theirs.keys()
            for key in ours:
                torch.testing.assert_close(ours[key], theirs[key], atol=2e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("stage, strategy", [("sft", "ddp"), ("sft", "fsdp2"), ("base", "ddp")])
def test_packed_rows_and_the_head_of_labels_give_the_results_of_padded_ones(stage, strategy, oracle, tmp_path):
    """So large a micro-batch has many logits: rows are packed (those of base have one length)."""
    roots = [copy_without(oracle, tmp_path / name, stage) for name in ("together", "alone")]
    large = (f"{stage}.per_device_train_batch_size=400", f"{stage}.gradient_accumulation_steps=1")
    runs = [("run", stage, "-c", str(CONFIG), "--artifacts", str(root), "--only", *large) for root in roots]
    assert rlhf_together(*runs[0], f"launch.strategy={strategy}") == [0, 0]
    assert rlhf(*runs[1], *(["sft.packing=false"] if stage == "sft" else [])) == 0
    folder, alone = (root / "micro" / stage for root in roots)
    assert_same_figures(rows_of(folder), rows_of(alone))
    assert_same_figures(rows_of(folder, "evaluations.jsonl"), rows_of(alone, "evaluations.jsonl"))


@pytest.mark.slow
def test_the_kl_of_kto_is_that_of_the_whole_batch(oracle, tmp_path):
    """Two processes and smaller micro-batches estimate what one process does."""
    roots = [copy_without(oracle, tmp_path / name, "dpo") for name in ("together", "alone")]
    options = ("dpo.loss_type=kto", "dpo.loss_weights=null", "dpo.undesirable_weight=0.1")
    runs = [("run", "dpo", "-c", str(CONFIG), "--artifacts", str(root), "--only", *options) for root in roots]
    assert rlhf_together(*runs[0], "dpo.per_device_train_tokens=60") == [0, 0]
    assert rlhf(*runs[1]) == 0
    folder, alone = (root / "micro" / "dpo" for root in roots)
    assert_same_figures(rows_of(folder), rows_of(alone))
    assert_same_figures(rows_of(folder, "evaluations.jsonl"), rows_of(alone, "evaluations.jsonl"))
    assert max(row["kl"] for row in rows_of(alone)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "rm", "ppo", "dpo"])
def test_each_process_does_about_half_of_the_work(stage, oracle, tmp_path):
    """Count tokens through an embedding, with few held-out evaluations and few demonstrations.

    Every process samples and scores those for itself.
    """
    roots = [copy_without(oracle, tmp_path / name, stage) for name in ("together", "alone")]
    few = [f"{stage}.eval_steps=8", *["rm.bias_demonstrations=8"] * (stage == "rm")]
    runs = [("run", stage, "-c", str(CONFIG), "--artifacts", str(root), "--only", *few) for root in roots]
    assert end(start_together(runs[0], tokens=tmp_path)) == [0, 0]
    assert end([start(runs[1], tokens=tmp_path / "one")]) == [0]
    halves = [int((tmp_path / str(i)).read_text()) for i in range(2)]
    alone = int((tmp_path / "one").read_text())
    assert max(halves) < 0.75 * alone, (halves, alone)


@pytest.fixture(scope="module")
def together(oracle, tmp_path_factory):
    """Return the artifacts of PPO and the reward model from two undisturbed processes."""
    root = copy_without(oracle, tmp_path_factory.mktemp("together"), "ppo")
    run = ("run", "ppo", "-c", str(CONFIG), "--artifacts", str(root), "--only")
    assert rlhf_together(*run) == [0, 0]
    return root


@pytest.mark.parametrize("who", [0, 1])
def test_after_one_is_killed_the_other_ends(who, oracle, together, tmp_path):
    """It ends in time without an artifact or a half checkpoint; a rerun gives the same bytes."""
    root = copy_without(oracle, tmp_path, "ppo")
    run = ("run", "ppo", "-c", str(CONFIG), "--artifacts", str(root), "--only")
    codes = rlhf_together(*run, die=(who, "ppo", 5), seconds=60)
    assert codes[who] == -signal.SIGKILL and codes[1 - who] == (4 if who == 0 else 1)
    folder = root / "micro" / "ppo"
    assert not (folder / "manifest.json").exists()
    saved = list((folder / "checkpoints").glob("step-*"))
    assert saved and all((path / "manifest.json").exists() for path in saved)
    assert rlhf_together(*run) == [0, 0]
    assert published(folder) == published(together / "micro" / "ppo")


@pytest.mark.parametrize("stage, step", [("sft", 5), pytest.param("dpo", 6, marks=pytest.mark.slow)])
def test_both_leave_a_held_out_evaluation(stage, step, oracle, tmp_path):
    """Rank 0 gets a signal during the evaluation at step 6: 75, then the undisturbed bytes."""
    found = []
    for name in ("whole", "left"):
        root = copy_without(oracle, tmp_path / name, stage)
        run = ("run", stage, "-c", str(CONFIG), "--artifacts", str(root), "--only")
        folder = root / "micro" / stage
        if name == "left":
            assert rlhf_together(*run, term=(0, stage, step), seconds=60)[0] == 75
            assert not (folder / "manifest.json").exists()
            assert (folder / "checkpoints" / "step-00000006" / "manifest.json").is_file()
            assert 6 not in [row["step"] for row in rows_of(folder, "evaluations.jsonl")]
        assert rlhf_together(*run) == [0, 0]
        found.append(published(folder))
    assert found[0] == found[1]


@pytest.mark.slow
def test_one_hangs_and_the_other_gives_up(oracle, tmp_path):
    root = copy_without(oracle, tmp_path, "ppo")
    run = ("run", "ppo", "-c", str(CONFIG), "--artifacts", str(root), "--only", "launch.timeout=10")
    children = start_together(run)
    wait_for_rows(root / "micro" / "ppo", 2)
    os.kill(children[1].pid, signal.SIGSTOP)
    assert end(children[:1], 60) == [1]
    children[1].kill()


def test_another_number_of_processes_needs_a_flag(oracle, tmp_path):
    """From 2 to 1 to 2: refused, then with --allow-elastic the same losses as one process."""
    root = copy_without(oracle, tmp_path, "ppo")
    run = ("run", "ppo", "-c", str(CONFIG), "--artifacts", str(root), "--only")
    assert rlhf_together(*run, die=(0, "ppo", 3))[0] == -signal.SIGKILL
    assert rlhf(*run) == 2
    assert rlhf(*run, "--allow-elastic", die=("ppo", 5)) == -signal.SIGKILL
    assert rlhf_together(*run) == [2, 1]
    assert rlhf_together(*run, "--allow-elastic") == [0, 0]
    folder, alone = root / "micro" / "ppo", oracle / "micro" / "ppo"
    assert_same_figures(rows_of(folder), rows_of(alone))
    texts = [[row["response"] for row in rows_of(x, "samples.jsonl")] for x in (folder, alone)]
    assert texts[0] == texts[1]


def wait_for_rows(folder, count, seconds=60):
    """Wait until the stage in `folder` has logged so many steps."""
    deadline = time.monotonic() + seconds
    while not (folder / "metrics.jsonl").exists() or len((folder / "metrics.jsonl").read_bytes().splitlines()) < count:
        assert time.monotonic() < deadline, "no rows"
        time.sleep(0.02)


def started(root, *more):
    """Start the command with its own launcher."""
    argv = ["run", "ppo", "-c", str(CONFIG), "--artifacts", str(root), "--only", "launch.processes=2", *more]
    err = root.parent / "err.txt"  # a pipe would stay open in whatever outlives the launcher
    with err.open("w") as file:
        command = [sys.executable, "-m", "pipeline.cli", *argv]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file), err


def stat(pid):
    """Return (state, parent) of a process; None if there is none."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            state, parent = file.read().rsplit(") ", 1)[1].split()[:2]
            return state, int(parent)
    except (FileNotFoundError, ProcessLookupError):
        return None


def children_of(pid):
    """Return {rank: process id} of a launcher's processes."""
    found = {}
    for child in map(int, filter(str.isdecimal, os.listdir("/proc"))):
        if (stat(child) or ("", 0))[1] == pid:
            with open(f"/proc/{child}/environ", "rb") as file:
                variables = dict(x.split(b"=", 1) for x in file.read().split(b"\0") if b"=" in x)
            found[int(variables[b"RANK"])] = child
    return found


def gone(pids, seconds):
    """Return whether they have ended (nobody may be there to fetch their exit codes)."""
    deadline = time.monotonic() + seconds
    while any((stat(pid) or "Z")[0] != "Z" for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.slow
def test_the_launcher_passes_on_a_signal(oracle, together, tmp_path):
    """It passes a signal on: 75, and no process is left. When it is killed, rank 0 saves first.

    At last the bytes are those of two undisturbed processes.
    """
    root = copy_without(oracle, tmp_path, "ppo")
    folder = root / "micro" / "ppo"
    process, err = started(root)
    wait_for_rows(folder, 2)
    workers = children_of(process.pid)
    assert sorted(workers) == [0, 1]
    process.send_signal(signal.SIGTERM)
    assert process.wait(90) == 75, err.read_text()
    assert "run again to resume" in err.read_text() and gone(workers.values(), 1)
    assert not (folder / "manifest.json").exists() and list((folder / "checkpoints").glob("step-*/manifest.json"))

    process, _ = started(root, "checkpoints.every=0")
    wait_for_rows(folder, len(rows_of(folder)) + 1)
    workers = children_of(process.pid)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL and gone(workers.values(), 60)
    assert not (folder / "manifest.json").exists()
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1].name
    assert newest == f"step-{rows_of(folder)[-1]['step']:08d}", "the first process was to save"

    process, err = started(root)
    assert process.wait(120) == 0, err.read_text()
    assert published(folder) == published(together / "micro" / "ppo")


@pytest.mark.slow
def test_the_launcher_reports_which_process_died(oracle, tmp_path):
    root = copy_without(oracle, tmp_path, "ppo")
    process, err = started(root)
    wait_for_rows(root / "micro" / "ppo", 1)
    os.kill(children_of(process.pid)[1], signal.SIGKILL)
    assert process.wait(90) == 1
    assert "error: process 1 of 2 was ended by SIGKILL; run again to resume" in err.read_text()


@pytest.mark.slow
def test_exit_codes_of_rank_zero_are_those_of_the_run(oracle, tmp_path):
    """An alarm that stops (3) leaves a checkpoint; a mistake (2) is one line, printed once."""
    root = copy_without(oracle, tmp_path, "ppo")
    process, err = started(root, "ppo.on_alarm=stop", "ppo.alarm_kl=1e-6", "checkpoints.every=0")
    assert process.wait(60) == 3, err.read_text()
    assert err.read_text().count("training stopped itself") == 1
    folder = root / "micro" / "ppo"
    assert list((folder / "checkpoints").glob("step-*/manifest.json")) and not (folder / "manifest.json").exists()
    process, err = started(
        copy_without(oracle, tmp_path / "other", "ppo"), "ppo.max_length=24", "ppo.response_length=23"
    )
    assert process.wait(60) == 2
    lines = err.read_text().splitlines()
    assert len(set(lines)) == len(lines) and all(line.startswith("error: ") for line in lines)


@pytest.mark.slow
def test_a_second_signal_ends_all_processes_at_once(oracle, tmp_path):
    """Rank 0 is blocked at that time, waiting for a process that hangs."""
    root = copy_without(oracle, tmp_path, "ppo")
    process, _ = started(root)
    wait_for_rows(root / "micro" / "ppo", 1)
    workers = children_of(process.pid)
    os.kill(workers[1], signal.SIGSTOP)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == -signal.SIGINT and gone(workers.values(), 60)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--nproc-per-node", "2"],
        ["accelerate.commands.launch", "--config_file", "configs/launch/one-node.yaml", "--num_processes", "2"],
    ],
)
def test_torchrun_and_accelerate(launcher, oracle, together, tmp_path):
    root = copy_without(oracle, tmp_path, "ppo")
    command = [sys.executable, "-m", *launcher, "-m", "pipeline.cli"]
    command += ["run", "ppo", "-c", str(CONFIG), "--artifacts", str(root), "--only"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert published(root / "micro" / "ppo") == published(together / "micro" / "ppo")
    ended = subprocess.run([*command, "--force", "sft.max_steps=4"], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1 and "error: sft: is stale" in ended.stderr  # torchrun's own code for any failure


def test_an_environment_that_does_not_fit_is_refused(oracle, tmp_path):
    root = copy_without(oracle, tmp_path, "ppo")
    run = ("run", "ppo", "-c", str(CONFIG), "--artifacts", str(root), "--only")
    assert end([start((*run, "launch=null"))]) == [0]
    assert end([start(run, {"WORLD_SIZE": "2"})]) == [2]
    assert end(start_together((*run, "launch.processes=3"))) == [2, 2]
    assert end([start((*run, "launch.nodes=2"))]) == [2]
    batch = ("sft.per_device_train_batch_size=3", "sft.gradient_accumulation_steps=1")
    assert end([start((*run, "launch.processes=2", *batch), {"WORLD_SIZE": "1"})]) == [2]
