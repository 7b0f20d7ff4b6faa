"""Test configs/launch/Containerfile without a container: what it copies and installs exists."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
FILE = ROOT / "configs/launch/Containerfile"
KNOWN = {"FROM", "RUN", "WORKDIR", "COPY", "ARG", "ENV", "VOLUME", "ENTRYPOINT", "CMD"}


def instructions(text):
    """Return (name, rest) of each instruction, comments left out and continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in "\n".join(lines).replace("\\\n", " ").splitlines()]


FOUND = instructions(FILE.read_text(encoding="utf-8"))


def runs():
    """Return the shell commands of all RUN lines."""
    return [rest for name, rest in FOUND if name == "RUN"]


def test_every_instruction_is_known_and_the_image_comes_first():
    assert FOUND[0][0] == "FROM" and {name for name, _ in FOUND} <= KNOWN


def test_python_is_one_that_the_project_takes():
    version = re.search(r"python:(\d+)\.(\d+)-", FOUND[0][1])
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert (int(version[1]), int(version[2])) >= tuple(map(int, needed.removeprefix(">=").split(".")))


def test_everything_that_is_copied_is_in_git():
    kept = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name, rest in FOUND:
        if name == "COPY":
            for source in shlex.split(rest)[:-1]:
                assert any(path == source or path.startswith(f"{source}/") for path in kept), source


def test_every_package_folder_is_copied():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    copied = {source for name, rest in FOUND if name == "COPY" for source in shlex.split(rest)[:-1]}
    assert {package.split(".")[0] for package in packages} <= copied
    assert {"pyproject.toml", "README.md", "LICENSE", "constraints.txt"} <= copied  # what the build reads


@pytest.mark.parametrize("command", runs())
def test_commands_are_shell_and_install_from_the_lock(command):
    assert subprocess.run(["bash", "-n"], input=command, text=True).returncode == 0
    for part in command.split("&&"):
        if "pip install" in part:
            assert "-c constraints.txt" in part


def test_the_list_of_dependencies_is_what_pip_reads():
    """The line that writes the list runs here as it would there."""
    [command] = [run for run in runs() if "tomllib" in run]
    code = shlex.split(re.search(r"-c (\"import tomllib.*?\") >", command)[1])[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert done.stdout.splitlines() == needed


def test_the_extras_and_the_entry_point_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [rest.partition("=")[2] for name, rest in FOUND if name == "ARG" and rest.startswith("EXTRAS")]
    assert {extra for line in extras for extra in line.split(",")} <= set(project["optional-dependencies"])
    [entry] = [rest for name, rest in FOUND if name == "ENTRYPOINT"]
    assert entry == '["rlhf"]' and "rlhf" in project["scripts"]


def test_nothing_that_is_copied_is_left_out_of_the_build():
    lines = (FILE.parent / "Containerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    kept = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert "*" in lines and kept == {
        source for name, rest in FOUND if name == "COPY" for source in shlex.split(rest)[:-1]
    }
