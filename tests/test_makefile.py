"""Test make's command line: settings reach rlhf unchanged, and unknown variables are refused."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make")


@pytest.fixture
def make(tmp_path):
    """Return make(words…), which returns the exit code, the arguments of rlhf and stderr."""
    stub, calls = tmp_path / "rlhf", tmp_path / "calls"
    stub.write_text(f'#!/bin/sh\nfor word; do printf "%s\\n" "$word"; done > {calls}\n')
    stub.chmod(0o755)

    def run(*words):
        calls.unlink(missing_ok=True)
        command = ["make", "-s", "-C", str(ROOT), "-o", ".venv/.installed", f"RLHF={stub}", f"PYTHON={sys.executable}"]
        clean = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
        done = subprocess.run([*command, *words], capture_output=True, text=True, env=clean)
        return done.returncode, calls.read_text().splitlines() if calls.exists() else None, done.stderr

    return run


PLACE = ["-c", "configs/tiny.yaml", "--artifacts", "artifacts"]


@pytest.mark.parametrize("target", ["ppo", "status", "demo", "chat", "clean-artifacts", "doctor"])
def test_a_setting_reaches_every_command(make, target):
    code, called, err = make(target, "ppo.kl_coef=0.2")
    assert code == 0 and called[-1] == "ppo.kl_coef=0.2", err
    start = called.index("-c")
    assert called[start : start + 4] == PLACE


@pytest.mark.parametrize(
    "word",
    [
        "name=hot",
        "seed=3",
        "data.prompts={path: my file.jsonl, limit: 3}",
        'model.name_or_path=it\'s "here" $HOME $(x) \\ #1; `y` %',
        "ppo.x=[1, 2]",
        "a.b=",
    ],
)
def test_a_setting_arrives_as_it_was_typed(make, word):
    code, called, err = make("ppo", word, "CONFIG=my dir/it's.yaml")
    assert code == 0 and called == ["run", "ppo", "-c", "my dir/it's.yaml", *PLACE[2:], word], err


def test_set_adds_to_dotted_variables(make):
    _, called, _ = make("ppo", "a.b=1", 'SET=c.d="x y" --restart')
    assert called == ["run", "ppo", *PLACE, "a.b=1", "c.d=x y", "--restart"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["ppo", "CONFG=x.yaml"], "CONFG=x.yaml: make has no variable CONFG here; did you mean CONFIG=x.yaml?"),
        (["ppo", "config=x.yaml"], "did you mean CONFIG=x.yaml?"),
        (["ARTIFACT=x", "sft"], "did you mean ARTIFACTS=x?"),
        (["sft", "kl_coef=0.2"], 'sft.kl_coef=0.2, or SET="sft.kl_coef=0.2"'),
        (["kl_coef=0.2"], 'ppo.kl_coef=0.2, or SET="ppo.kl_coef=0.2"'),
        (
            ["clean-artifacts", "FORCE=1"],
            "variables are CONFIG ARTIFACTS SET MODELS BENCH KILLS EXTRAS YES PYTHON VERSIONS VERSIONS_TESTS QUICK "
            "ONLY, and a setting is named with its section",
        ),
    ],
)
def test_an_unknown_variable_is_refused(make, words, message):
    code, called, err = make(*words)
    assert code == 2 and called is None and message in err and err.count("\n") == 1


def test_clean_artifacts_asks_without_yes(make, monkeypatch):
    """YES counts on make's command line only, not in the environment."""
    monkeypatch.setenv("YES", "1")
    assert "--yes" not in make("clean-artifacts")[1] and "--yes" not in make("clean-artifacts", "YES=0")[1]
    assert make("clean-artifacts", "YES=1")[1][-1] == "--yes"


def test_setup_shows_its_progress():
    """Neither of pip's two calls is quiet."""
    command = ["make", "-n", "-W", "pyproject.toml", "-C", str(ROOT), "setup", "VENV=.elsewhere"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    calls = [line for line in output.splitlines() if "pip install" in line]
    assert len(calls) == 2 and not [line for line in calls if " -q" in line] and "setup: .elsewhere" in output


@pytest.mark.parametrize(
    "words, called",
    [
        ([], "claims.py --artifacts 'artifacts'"),
        (["QUICK=1", "ONLY=a b", "ppo.x=1"], "claims.py --artifacts 'artifacts' --quick --only a b 'ppo.x=1'"),
        (["CONFIG=my.yaml", "QUICK=0"], "claims.py -c 'my.yaml' --artifacts 'artifacts'"),
    ],
)
def test_claims_has_rows_and_a_config_only_where_they_are_given(words, called):
    """Each row has a config of its own, so that the default of CONFIG is not passed on."""
    command = ["make", "-n", "-s", "-o", ".venv/.installed", "-C", str(ROOT), "claims", *words]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert " ".join(output.replace("\\\n", " ").split()).endswith(called)
