"""Test that what Linux alone has is not needed: /proc, /sys, core affinity, limits of memory."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
CONFIG = ROOT / "tests" / "resume" / "micro.yaml"
WITHOUT_LINUX = '''
"""Take from every Python process what Linux alone has, as far as Python code can see it."""
import builtins, ctypes, io, os, resource

del os.sched_getaffinity, os.sched_setaffinity
opened = builtins.open

def without_system_files(file, *args, **options):
    if not isinstance(file, int) and os.fspath(file).startswith(("/proc", "/sys")):
        with opened(os.environ["ASKED"], "a") as asked:
            asked.write(os.fspath(file) + "\\\\n")
        raise FileNotFoundError(2, "this system has no such files", os.fspath(file))
    return opened(file, *args, **options)

builtins.open = io.open = without_system_files

def without_memory_limit(kind, limits):
    if kind == resource.RLIMIT_AS:
        raise ValueError("this system has no such limit")

resource.setrlimit = without_memory_limit

class NoPrctl:
    def __getattr__(self, name):
        raise AttributeError(name)

library = ctypes.CDLL
ctypes.CDLL = lambda name=None, *args, **options: NoPrctl() if name is None else library(name, *args, **options)
'''


def run_without_linux(tmp_path, *argv):
    """Run `rlhf` without those; return its exit code, its output and the files it asked for."""
    (tmp_path / "site").mkdir(exist_ok=True)
    (tmp_path / "site" / "sitecustomize.py").write_text(WITHOUT_LINUX.replace("\\\\", "\\"))
    asked = tmp_path / "asked"
    path = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path, "ASKED": str(asked)}
    environment.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, "-m", "pipeline.cli", *argv]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr, asked.read_text().split() if asked.exists() else []


def test_a_stage_runs_and_the_others_are_planned(tmp_path):
    root = str(tmp_path / "artifacts")
    code, said, asked = run_without_linux(tmp_path, "run", "world", "-c", str(CONFIG), "--artifacts", root)
    assert code == 0, said
    assert "/proc/cpuinfo" in asked  # it did ask, and was refused
    manifest = json.loads((tmp_path / "artifacts/micro/world/manifest.json").read_text())
    assert manifest["hardware"]["cores"] == os.cpu_count() and manifest["hardware"]["memory_gb"] > 0
    code, said, _ = run_without_linux(tmp_path, "status", "-c", str(CONFIG), "--artifacts", root)
    assert code == 0 and "done" in said and "missing" in said, said


@pytest.mark.slow
def test_stages_train_score_and_sample(tmp_path):
    """Chat templates are rendered in a process of their own, and so is a function that scores."""
    (tmp_path / "reward.py").write_text("def score(responses, **_):\n    return [len(r) for r in responses]\n")
    root, reward = str(tmp_path / "artifacts"), f"ppo.rewards=[{{python: {tmp_path}/reward.py:score}}]"
    few = [
        "ppo.total_episodes=16",
        "ppo.reward_ensemble=mean",
        "evaluate.reward_ensemble=mean",
        "base.max_steps=2",
        "sft.max_steps=2",
    ]
    code, said, _ = run_without_linux(tmp_path, "run", "ppo", "-c", str(CONFIG), "--artifacts", root, reward, *few)
    assert code == 0, said
    assert (tmp_path / "artifacts/micro/ppo/manifest.json").is_file()


def test_what_only_linux_has_is_asked_for_in_known_places():
    """Whoever adds a place says there what happens elsewhere, and adds it here."""
    known = {
        "pipeline/launch/hardware.py",  # falls back to what Python knows
        "stages/tools/doctor_machine.py",  # no limit of a container
        "data/template_worker.py",  # no limit of memory
        "stages/scorers/python_worker.py",  # the pipe's end tells it, after the call
        "pipeline/launch/environment.py",  # all cores
    }
    found = set()
    for room in ("data", "pipeline", "stages"):
        for path in sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                is_file = isinstance(node, ast.Constant) and str(node.value).startswith(("/proc/", "/sys/"))
                is_call = isinstance(node, ast.Attribute) and node.attr in ("sched_getaffinity", "prctl")
                if is_file or is_call:
                    found.add(str(path.relative_to(ROOT)))
    assert found == known
