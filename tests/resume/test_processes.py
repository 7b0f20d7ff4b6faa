"""Two processes that share a stage: the numbers of one, and what happens when one of them dies, hangs or is told to
stop."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from resume_worker import CONFIG, end, published, rlhf, rlhf_together, start_together, without
from safetensors.torch import load_file

STAGES = ("base", "sft", "rankings", "rm", "ppo", "dpo", "evaluate")
DERIVED = ("eps", "val/explained_variance")  # of the clock; a ratio whose denominator can all but vanish


def rows_of(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).open()]


def assert_same_figures(found, expected):
    """Losses within 1e-5 over the first three steps, and no figure far off later."""
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for i, (row, other) in enumerate(zip(found, expected, strict=True)):
        assert row.keys() == other.keys()
        for key in row.keys() - set(DERIVED):
            tight = i < 3 and "loss" in key
            assert row[key] == pytest.approx(other[key], abs=1e-5 if tight else 1e-3), (i, key)


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_do_what_one_does(stage, oracle, tmp_path):
    """From the same upstream artifacts: the same rows in the same order, the same samples, weights to the order of
    sums."""
    root = without(oracle, tmp_path, stage)
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


@pytest.fixture(scope="module")
def together(oracle, tmp_path_factory):
    """PPO and the reward model by two processes that nobody disturbs."""
    root = without(oracle, tmp_path_factory.mktemp("together"), "ppo")
    run = ("run", "ppo", "-c", str(CONFIG), "--artifacts", str(root), "--only")
    assert rlhf_together(*run) == [0, 0]
    return root


@pytest.mark.parametrize("who", [0, 1])
def test_one_is_killed_and_the_other_ends(who, oracle, together, tmp_path):
    """In time, with no artifact and no half checkpoint; started again they come to the same bytes."""
    root = without(oracle, tmp_path, "ppo")
    run = ("run", "ppo", "-c", str(CONFIG), "--artifacts", str(root), "--only")
    codes = rlhf_together(*run, die=(who, "ppo", 5), seconds=60)
    assert codes[who] == -signal.SIGKILL and codes[1 - who] == 1
    folder = root / "micro" / "ppo"
    assert not (folder / "manifest.json").exists()
    saved = list((folder / "checkpoints").glob("step-*"))
    assert saved and all((path / "manifest.json").exists() for path in saved)
    assert rlhf_together(*run) == [0, 0]
    assert published(folder) == published(together / "micro" / "ppo")


def test_one_hangs_and_the_other_gives_up(oracle, tmp_path):
    root = without(oracle, tmp_path, "ppo")
    run = ("run", "ppo", "-c", str(CONFIG), "--artifacts", str(root), "--only", "launch.timeout=4")
    children = start_together(run, 2)
    wait_for_rows(root / "micro" / "ppo", 2)
    os.kill(children[1].pid, signal.SIGSTOP)
    assert end(children[:1], 60) == [1]
    children[1].kill()


def test_another_number_of_processes_needs_a_word(oracle, tmp_path):
    """2 → 1 → 2: refused, then accepted with --allow-elastic; the same prompts, samples and losses as one alone."""
    root = without(oracle, tmp_path, "ppo")
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
    """Until the stage in `folder` has logged so many steps."""
    deadline = time.monotonic() + seconds
    while not (folder / "metrics.jsonl").exists() or len((folder / "metrics.jsonl").read_bytes().splitlines()) < count:
        assert time.monotonic() < deadline, "no rows"
        time.sleep(0.02)


def started(root, *more):
    """The command itself, with its own launcher."""
    argv = ["run", "ppo", "-c", str(CONFIG), "--artifacts", str(root), "--only", "launch.processes=2", *more]
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def children_of(pid):
    """Process ids whose parent is `pid`."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                if int(file.read().rsplit(") ", 1)[1].split()[1]) == pid:
                    found.append(int(name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return sorted(found)


def gone(pids, seconds):
    deadline = time.monotonic() + seconds
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_the_launcher_hands_on_a_signal(oracle, together, tmp_path):
    """75, a checkpoint, nobody left; started again, the same bytes. Then a kill of the launcher itself ends all."""
    root = without(oracle, tmp_path, "ppo")
    process = started(root)
    wait_for_rows(root / "micro" / "ppo", 2)
    workers = children_of(process.pid)
    assert len(workers) == 2
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75, err
    assert "run again to go on" in err and gone(workers, 1)
    folder = root / "micro" / "ppo"
    assert not (folder / "manifest.json").exists() and list((folder / "checkpoints").glob("step-*/manifest.json"))
    seen = len(rows_of(folder))

    process = started(root)
    wait_for_rows(folder, seen + 1)
    workers = children_of(process.pid)
    process.kill()
    process.communicate()
    assert gone(workers, 15)
    assert not (folder / "manifest.json").exists()
    process = started(root)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert published(folder) == published(together / "micro" / "ppo")


def test_the_launcher_says_who_died(oracle, tmp_path):
    root = without(oracle, tmp_path, "ppo")
    process = started(root)
    wait_for_rows(root / "micro" / "ppo", 1)
    os.kill(children_of(process.pid)[1], signal.SIGKILL)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "error: process 1 of 2 was ended by SIGKILL; run again to go on" in err
