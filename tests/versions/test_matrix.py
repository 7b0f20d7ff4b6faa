"""Test the run with several library versions: bounds, Pythons, environments, counts, table."""

import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.versions import matrix

PROJECT = tomllib.loads((matrix.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NEWEST = matrix.ROOT / "tests" / "versions" / "newest.txt"
LOWEST = matrix.ROOT / "constraints.txt"


def pins(path: Path, python: str) -> dict[str, str]:
    """Return {name: version} of a file of constraints on Linux with one Python."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            place = {"python_version": python, "python_full_version": f"{python}.1", "sys_platform": "linux"}
            if requirement.marker is None or requirement.marker.evaluate(place):
                name = canonicalize_name(requirement.name)
                assert name not in found, f"{path.name}: {name} is there twice for Python {python}"
                found[name] = str(requirement.specifier).removeprefix("==")
    return found


def requirements() -> list[Requirement]:
    """Return the dependencies, with those of the extras that the environments have."""
    lines = list(PROJECT["dependencies"])
    for extra in matrix.EXTRAS.split(","):
        lines += PROJECT["optional-dependencies"][extra]
    return [one for one in map(Requirement, lines) if one.name not in ("rlhf-pipeline", "types-PyYAML")]


@pytest.mark.parametrize("environment", matrix.environments(), ids=lambda environment: environment.name)
def test_the_pins_are_within_the_bounds(environment):
    held = pins(environment.constraints, environment.python)
    for requirement in requirements():
        name = canonicalize_name(requirement.name)
        if name in held or environment.name != "lowest":
            assert requirement.specifier.contains(held[name]), f"{name} {held[name]} is not in {requirement}"


def test_the_lowest_pins_are_the_lower_bounds():
    held = pins(LOWEST, matrix.PYTHONS[0])
    for requirement in requirements():
        if requirement.name in matrix.SHOWN:
            [bound] = [one.version for one in requirement.specifier if one.operator == ">="]
            assert f"{held[requirement.name]}.".startswith(f"{bound}."), requirement


def test_no_pin_of_the_newest_is_older_than_that_of_the_lowest():
    from packaging.version import Version

    lowest, newest = pins(LOWEST, "3.11"), pins(NEWEST, "3.11")
    assert not {name: newest[name] for name in lowest.keys() & newest if Version(newest[name]) < Version(lowest[name])}


def test_the_lowest_python_is_that_of_the_project():
    assert PROJECT["requires-python"] == f">={matrix.PYTHONS[0]}"
    assert matrix._allows("3.11") and not matrix._allows("3.10")


def test_the_environments_are_the_lowest_and_the_newest_on_each_python():
    names = [environment.name for environment in matrix.environments()]
    assert names == ["lowest", *(f"newest-{python}" for python in matrix.PYTHONS)]
    assert [environment.name for environment in matrix.selected(["newest-3.12"])] == ["newest-3.12"]
    with pytest.raises(ValueError, match=r"VERSIONS: there is no environment newst; use one of lowest, newest-3\.11"):
        matrix.selected(["lowest", "newst"])


def stub(path: Path, version: str | None) -> Path:
    """Write a program that answers as a Python of a version does; as pyenv's shim does for None."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho {version}\n" if version else "#!/bin/sh\nexit 127\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Leave no Python on this machine but what a test puts into the folder."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    monkeypatch.setenv("UV_PYTHON_INSTALL_DIR", str(tmp_path / "uv"))
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path / "none"))
    return tmp_path


def test_no_python_is_found_where_none_is(machine):
    assert matrix.interpreter("3.12") is None


def test_a_python_of_the_path_comes_first(machine):
    stub(machine / "pyenv/versions/3.12.1/bin/python3.12", "3.12")
    mine = stub(machine / "bin/python3.12", "3.12")
    assert matrix.interpreter("3.12") == mine


def test_a_shim_of_pyenv_that_only_fails_is_passed_over(machine):
    stub(machine / "bin/python3.12", None)
    real = stub(machine / "pyenv/versions/3.12.1/bin/python3.12", "3.12")
    assert matrix.interpreter("3.12") == real


def test_a_python_of_another_version_is_passed_over(machine):
    stub(machine / "bin/python3.12", "3.11")
    assert matrix.interpreter("3.12") is None


def test_a_python_of_uv_is_found(machine):
    real = stub(machine / "uv/cpython-3.14.2-linux-x86_64-gnu/bin/python3.14", "3.14")
    assert matrix.interpreter("3.14") == real


def test_this_python_is_found_and_can_make_environments():
    python = ".".join(platform.python_version_tuple()[:2])
    assert matrix.interpreter(python) is not None


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """Collect the commands that make() runs, in a folder of the test; `venv` makes the folder."""
    calls = []

    def run(command, **options):
        assert options["check"]
        calls.append(command)
        if "venv" in command:
            Path(command[-1]).mkdir(parents=True)

    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    monkeypatch.setattr(matrix, "FOLDER", tmp_path / ".versions")
    monkeypatch.setattr(matrix.subprocess, "run", run)
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    return calls


def environment_of(folder: Path, pin: str) -> matrix.Environment:
    """Return an environment whose file of constraints holds torch only."""
    constraints = folder / "pins.txt"
    constraints.write_text(f"# pins\ntorchdata==1.0\n{pin}\n")
    return matrix.Environment("newest-3.12", "3.12", constraints)


def test_an_environment_is_made_with_torch_first_and_is_kept(commands, tmp_path, capsys):
    environment = environment_of(tmp_path, "torch==2.15.0 ; python_version < '3.16'")
    python = matrix.make(environment, Path("python3.12"))
    assert python == tmp_path / ".versions/newest-3.12/bin/python"
    assert [command[-1] for command in commands] == [str(python.parents[1]), "torch==2.15.0", f".[{matrix.EXTRAS}]"]
    assert all(["-c", str(environment.constraints)] == command[5:7] for command in commands[1:])
    assert "newest-3.12.install.log" in capsys.readouterr().out

    matrix.make(environment, Path("python3.12"))
    assert len(commands) == 3, "it was up to date"


def test_an_environment_is_made_again_for_other_versions(commands, tmp_path):
    matrix.make(environment_of(tmp_path, "torch==2.15.0"), Path("python3.12"))
    matrix.make(environment_of(tmp_path, "torch==2.15.1"), Path("python3.12"))
    assert len(commands) == 6 and commands[4][-1] == "torch==2.15.1"
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    matrix.make(environment_of(tmp_path, "torch==2.15.1"), Path("python3.12"))
    assert len(commands) == 9


def test_an_environment_whose_install_failed_is_not_kept(commands, tmp_path, monkeypatch):
    def fail(command, **options):
        raise subprocess.CalledProcessError(1, command)

    environment = environment_of(tmp_path, "torch==2.15.0")
    with monkeypatch.context() as patched:
        patched.setattr(matrix.subprocess, "run", fail)
        with pytest.raises(subprocess.CalledProcessError):
            matrix.make(environment, Path("python3.12"))
    matrix.make(environment, Path("python3.12"))
    assert len(commands) == 3


TESTS = """
import pytest

def test_passes(): ...
def test_fails(): assert False
@pytest.mark.skip
def test_is_skipped(): ...
@pytest.mark.xfail
def test_is_known_to_fail(): assert False
@pytest.fixture
def broken():
    yield
    assert False
def test_passes_and_then_fails(broken): ...
"""


@pytest.fixture
def here(monkeypatch, tmp_path):
    """Let the tests of an environment run here, in one process, with this Python."""
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    monkeypatch.setattr(matrix, "FOLDER", tmp_path / ".versions")
    monkeypatch.setattr(matrix, "TEST_ARGUMENTS", ("-q", "-p", "no:cacheprovider"))
    monkeypatch.setattr(matrix, "make", lambda environment, program: Path(sys.executable))
    (tmp_path / ".versions").mkdir()
    return tmp_path


def run_here(folder: Path, text: str, *arguments: str) -> matrix.Result:
    """Run a file of tests as those of the environment `lowest`."""
    (folder / "test_it.py").write_text(text)
    return matrix.run_tests(matrix.environments()[0], Path(sys.executable), ["test_it.py", *arguments])


def test_tests_are_counted_and_the_failed_ones_named(here, capsys):
    result = run_here(here, TESTS)
    assert (result.passed, result.failed, result.skipped) == (1, 2, 2)
    out = capsys.readouterr().out
    assert "lowest: failed: test_it::test_fails" in out
    assert "lowest: failed: test_it::test_passes_and_then_fails" in out
    assert "test_it" in (here / ".versions/lowest.log").read_text()
    assert result.versions["python"].startswith(".".join(platform.python_version_tuple()[:2]))


def test_arguments_of_pytest_are_passed_on(here):
    assert run_here(here, TESTS, "-k", "test_passes and not then").failed == 0


def test_a_pytest_that_dies_is_a_failure(here):
    assert run_here(here, "import os\nos._exit(3)\n").failed == 1


def test_a_file_that_cannot_be_imported_is_a_failure(here):
    assert run_here(here, "import no_such_module_here\n").failed == 1


def test_the_run_prints_a_table_and_says_what_is_left_out(here, monkeypatch, capsys):
    programs = {"3.11": Path(sys.executable), "3.13": Path(sys.executable)}
    monkeypatch.setattr(matrix, "interpreter", programs.get)
    monkeypatch.setattr(matrix, "_allows", lambda python: True)
    (here / "test_it.py").write_text(TESTS)
    chosen = ["--only", "lowest", "--only", "newest-3.12", "--only", "newest-3.13"]
    assert matrix.main([*chosen, "--tests", "test_it.py -k 'test_passes and not then'"]) == 0
    out = capsys.readouterr().out
    assert "newest-3.12: left out, no python3.12" in out
    rows = [line for line in out.splitlines() if line.startswith("|")]
    assert rows[0].startswith("| environment | python | torch | transformers |")
    assert [row.split(" ")[1] for row in rows[2:]] == ["lowest", "newest-3.13"]
    assert all(re.search(r"\| 1 \| 0 \| 0 \| [\d.]+ \|$", row) for row in rows[2:])

    assert matrix.main([*chosen, "--tests", "test_it.py"]) == 1, "two tests fail"


def test_a_broken_install_is_reported_and_the_others_run(here, monkeypatch, capsys):
    def broken(environment, program):
        if environment.name == "lowest":
            raise subprocess.CalledProcessError(1, ["pip"])
        return Path(sys.executable)

    monkeypatch.setattr(matrix, "interpreter", {"3.11": Path(sys.executable)}.get)
    monkeypatch.setattr(matrix, "_allows", lambda python: True)
    monkeypatch.setattr(matrix, "make", broken)
    (here / "test_it.py").write_text("def test_passes(): ...\n")
    assert matrix.main(["--only", "lowest", "--only", "newest-3.11", "--tests", "test_it.py"]) == 1
    out = capsys.readouterr().out
    assert "lowest: cannot be installed; .versions/lowest.install.log says why" in out and "| newest-3.11 |" in out


def test_a_run_that_can_run_nothing_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(matrix, "interpreter", lambda python: None)
    assert matrix.main([]) == 2 and "error: VERSIONS: no Python" in capsys.readouterr().err
    assert matrix.main(["--only", "nwest"]) == 2 and "there is no environment nwest" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_passes_the_selection_on():
    words = [
        "make",
        "-n",
        "-C",
        str(matrix.ROOT),
        "-o",
        ".venv/.installed",
        "test-versions",
        f"PYTHON={sys.executable}",
    ]
    words += ["VERSIONS=lowest newest-3.12", "VERSIONS_TESTS=tests/data -k 'a or b'"]
    clean = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    done = subprocess.run(words, capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr
    assert "--only lowest --only newest-3.12 --tests='tests/data -k '\\''a or b'\\'''" in done.stdout
