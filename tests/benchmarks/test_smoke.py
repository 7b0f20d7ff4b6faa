"""Run every benchmark at its smallest: it ends well, and prints or keeps what it should.

None of the figures means anything. What is slow here starts processes that import the libraries, or
runs a chain of a few thousand parameters.
"""

import importlib.util
import inspect
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline import running
from tests.marks import first_of_a_kind
from tests.stages.micro_chain import write_data

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
MICRO = ("-c", str(ROOT / "tests" / "resume" / "micro.yaml"))


@dataclass(frozen=True)
class Smoke:
    """Say how a benchmark is run at its smallest, and what it must leave."""

    words: tuple[str, ...] = ()
    """Its command line. Paths are relative to a folder of the tests."""
    lines: int = 0
    """JSON lines that it prints."""
    says: str = ""
    """Text that it prints."""


PROGRAMS = {
    "dpo": Smoke(("--quick", "--only", "quick/step/k2/1:1/variable", "quick/growth"), 3),
    "ppo": Smoke(("--quick", "--only", "quick/decode", "quick/update/variable/n1/e1/ptx"), 2),
    "rm": Smoke(("--quick", "--only", "quick/step/k4/4:1/variable"), 2),  # by dpo's code
}
"""Benchmarks that start processes, which find their code by that of the program."""
QUICK = {
    "coverage": Smoke(("--draws", "4", "--naive-draws", "1", "--results", "results"), 61, "| gold, 70% perfect |"),
    "priors": Smoke(("experiment",), says="| all | 36, 9 | words and word pairs"),
}
INSIDE = {
    "engines": Smoke(
        ("--python", "./python", "--model", "quick", "--dtype", "float32", "--rows", "n4", "--pairs", "1",
         "--results", "results"), 1, "vllm_over_ours",
    ),
    "checkpoints": Smoke((*MICRO, "--stages", "base", "--results", "results"), 1, "saving_s"),
}  # fmt: skip
"""Benchmarks that run in the test's process."""
ROWS_OF_CLAIMS = {"ptx", "rule_reward"}
"""Benchmarks whose measurements are rows of claims, which test_claims.py runs."""
NOT_YET = {"layouts", "rankings", "shares"}
"""Benchmarks that no test runs yet."""
WORKERS = {
    "ppo_ours": "ppo",
    "preferences_ours": "rm",
    "preferences_peer": "rm",
    "preferences_rows": "rm",
    "sft_worker": "sft",
}
"""Worker process → the benchmark that starts it."""
NEEDS_TRL_1_12 = {"ppo_parity", "ppo_peer"}
"""What runs in an environment of its own, of 2 GB, which no test makes: ppo's rows against trl."""


def test_every_benchmark_is_run_by_a_test():
    """A new one needs a line in one of the tables above, or a test file of its own."""
    files = [path for path in HERE.rglob("*.py") if not path.name.startswith("test_")]
    programs = {path.stem for path in files if '__name__ == "__main__"' in path.read_text("utf-8")}
    named = {*PROGRAMS, *QUICK, *INSIDE, *WORKERS, *NEEDS_TRL_1_12, *ROWS_OF_CLAIMS, *NOT_YET}
    of_its_own = {name for name in programs if (HERE / f"test_{name}.py").is_file()}
    assert named <= programs and set(WORKERS.values()) <= {*PROGRAMS, *of_its_own}
    assert not programs - named - of_its_own


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the working directory of all commands: data, a chain, a stand-in for vLLM's Python."""
    root = tmp_path_factory.mktemp("smoke")
    write_data(root / "experiment")
    script, stand_in = root / "python", ROOT / "tests" / "rollouts" / "stand_in"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{stand_in}" exec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return root


@pytest.fixture(autouse=True)
def results_stay():
    """Check that no test changes the published results."""
    files = sorted((HERE / "results").iterdir())
    before = [path.read_bytes() for path in files]
    yield
    assert files == sorted((HERE / "results").iterdir()) and before == [path.read_bytes() for path in files]


def lines_of(printed: str, smoke: Smoke) -> list[dict]:
    """Check what a benchmark printed, and return its JSON lines."""
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert len(lines) == smoke.lines and smoke.says in printed, printed[-2000:]
    return lines


@pytest.mark.slow
@pytest.mark.parametrize("name", first_of_a_kind(PROGRAMS, 2))
def test_a_program_runs(name, folder):
    smoke = PROGRAMS[name]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(HERE / f"{name}.py"), *smoke.words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    lines = lines_of(done.stdout, smoke)
    if name in ("rm", "dpo"):
        steps = [line for line in lines if line["measure"] == "step"]
        assert [line["peer"].split()[0] for line in steps] == ["trl", "K"]
        for line in steps:
            assert 0 < line["equal_math"]["max_rel_err"] < 1e-3
            assert all(line[clock][side] > 0 for clock in ("seconds", "cpu_seconds") for side in ("ours", "peer"))
        pairs, rows = (line["tokens"]["processed"]["peer"] for line in steps)
        assert pairs > rows or steps[0]["k"] == 2, "in pairs, each response is computed K − 1 times"
    if name == "ppo":
        assert all(math.isfinite(line["ratio"]["median"]) for line in lines if line["ratio"])


@pytest.mark.parametrize(
    "name",
    [
        *QUICK,
        pytest.param("checkpoints", marks=pytest.mark.slow),
        pytest.param("engines", marks=(pytest.mark.slow, pytest.mark.exhaustive)),
    ],
)
def test_it_runs(name, folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(HERE))  # benchmarks import each other from their own folder
    monkeypatch.setattr(running.checkpoints, "CheckpointStore", running.checkpoints.CheckpointStore)  # or watched on
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look up their module
    spec.loader.exec_module(module)
    if name == "data_size":  # the only one without --results
        monkeypatch.setattr(module, "RESULTS", folder / "results" / "data_size.jsonl")
    from sweeps.runner import run_command

    smoke = (QUICK | INSIDE)[name]
    words = list(smoke.words)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
    if hasattr(module, "main"):
        ended = module.main(words) if inspect.signature(module.main).parameters else module.main()
    else:
        ended = run_command(module.run, words)
    printed = capfd.readouterr()
    assert not ended, printed.err[-4000:]
    lines_of(printed.out, smoke)
    if name != "priors":  # it only prints
        assert (folder / "results" / f"{name}.jsonl").read_text("utf-8").startswith("{")
