"""Test `rlhf run --submit slurm` with a fake queue: the chain as jobs, one of them preempted."""

import json
import re
import subprocess
import sys

import fake_slurm
import pytest
from resume_worker import CONFIG, copy_without, published, rlhf


def submit(environment, *argv):
    command = [sys.executable, "-m", "pipeline.cli", "run", *argv, "-c", str(CONFIG), "--submit", "slurm"]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_dry_run_prints_what_would_be_submitted(tmp_path):
    environment = fake_slurm.install(tmp_path / "slurm")
    options = ["launch.nodes=2", "launch.processes=2", "launch.slurm.partition=gpu", "launch.slurm.time=1-00:00:00"]
    ended = submit(environment, "rm", "--artifacts", str(tmp_path / "a"), "--dry-run", "--restart", *options)
    assert ended.returncode == 0, ended.stderr
    scripts = ended.stdout.split("# -- ")[1:]
    assert [re.search(r"--job-name=micro-(\w+)", text)[1] for text in scripts] == [
        "world", "base", "sft", "rankings", "rm"
    ]  # fmt: skip
    for line in ("nodes=2", "ntasks-per-node=2", "partition=gpu", "time=1-00:00:00", "signal=USR1@120", "requeue"):
        assert f"#SBATCH --{line}\n" in scripts[-1]
    assert "restart=--restart\n" in scripts[-1] and "restart=\n" in scripts[0]  # of the target, at its first start
    assert "--nodes=1\n" in scripts[0] and "launch.processes=1" in scripts[0]  # one process does the work of world
    assert not (tmp_path / "a").exists() and not list((tmp_path / "slurm" / "spool").iterdir())
    check = subprocess.run(["bash", "-n"], input=scripts[-1].split("\n", 1)[1], text=True, capture_output=True)
    assert check.returncode == 0, check.stderr


def test_a_refusal_of_sbatch_is_one_line(tmp_path):
    environment = fake_slurm.install(tmp_path / "slurm")
    (tmp_path / "slurm" / "bin" / "sbatch").write_text("#!/bin/sh\necho 'Invalid partition' >&2; exit 1\n")
    ended = submit(environment, "world", "--artifacts", str(tmp_path / "a"))
    assert ended.returncode == 2 and "Invalid partition" in ended.stderr
    assert ended.stderr.startswith("error: --submit slurm: sbatch refused")
    (tmp_path / "slurm" / "bin" / "sbatch").unlink()
    ended = submit(environment, "world", "--artifacts", str(tmp_path / "a"))
    assert ended.returncode == 2 and "sbatch is not on the PATH" in ended.stderr


@pytest.mark.slow
def test_a_preempted_job_resumes_and_the_next_one_waits(oracle, tmp_path):
    """dpo in two processes is told to save halfway and is queued again; evaluate comes after it."""
    environment = fake_slurm.install(tmp_path / "slurm")
    root = copy_without(oracle, tmp_path, "dpo")
    options = ("launch.processes=2", "dpo.max_steps=40", "evaluate.policies=[sft,dpo]", "evaluate.best_of=1")
    ended = submit(environment, "evaluate", "--artifacts", str(root), *options)
    assert ended.returncode == 0, ended.stderr
    assert re.findall(r"^(\w+): job (\d+)", ended.stdout, re.M) == [("dpo", "101"), ("evaluate", "102")]
    folder = root / "micro" / "dpo"

    def middle():
        return (folder / "metrics.jsonl").exists() and len((folder / "metrics.jsonl").read_bytes().splitlines()) >= 2

    starts = fake_slurm.run_jobs(environment, lambda job, start: middle if (job, start) == ("101", 0) else None)
    log = (root / "micro" / "slurm" / "dpo-101.log").read_text()
    assert starts == [("101", 75), ("101", 0), ("102", 0)], log
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["resumes"] == 1 and manifest["world_size"] == 2
    assert (root / "micro" / "evaluate" / "results.json").exists()
    assert "resuming from step" in log


@pytest.mark.slow
def test_a_forced_redo_resumes_after_a_preemption(oracle, tmp_path):
    """It is beside an up-to-date artifact; and what is certain to be refused is not submitted."""
    environment = fake_slurm.install(tmp_path / "slurm")
    root, long = copy_without(oracle, tmp_path, "dpo"), "dpo.max_steps=40"
    assert rlhf("run", "dpo", "-c", str(CONFIG), "--artifacts", str(root), "--only", long) == 0
    folder = root / "micro" / "dpo"
    before = json.loads((folder / "manifest.json").read_text())
    assert submit(environment, "dpo", "--artifacts", str(root), "--force", long).returncode == 0
    journal = folder / ".redo" / "metrics.jsonl"
    middle = lambda: journal.exists() and len(journal.read_bytes().splitlines()) >= 2  # noqa: E731
    starts = fake_slurm.run_jobs(environment, lambda job, start: None if start else middle)
    assert starts == [("101", 75), ("101", 0)]
    after = json.loads((folder / "manifest.json").read_text())
    assert after["run_id"] != before["run_id"] and after["resumes"] == 1
    assert published(folder)["model/model.safetensors"] == before["outputs"]["model/model.safetensors"]["sha256"]

    assert rlhf("run", "dpo", "-c", str(CONFIG), "--artifacts", str(root), "--force", long, die=("dpo", 5)) == -9
    (folder / "manifest.json").unlink()
    ended = submit(environment, "evaluate", "--artifacts", str(root), "dpo.max_steps=30")
    assert ended.returncode == 2 and "dpo.max_steps 40 → 30" in ended.stderr


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_whole_chain_as_jobs(oracle, tmp_path):
    """With one process per job, the bytes are those of the chain that was not submitted."""
    environment = fake_slurm.install(tmp_path / "slurm")
    root = tmp_path / "artifacts"
    ended = submit(environment, "evaluate", "--artifacts", str(root))
    assert ended.returncode == 0, ended.stderr
    assert all(code == 0 for _, code in fake_slurm.run_jobs(environment))
    for stage in ("base", "sft", "rankings", "rm", "ppo", "dpo", "evaluate"):
        assert published(root / "micro" / stage) == published(oracle / "micro" / stage)
