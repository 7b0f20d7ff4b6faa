"""Run the tests with the lowest and the newest library versions, on every Python found.

    python tests/versions/matrix.py                           the quick tests, everywhere
    python tests/versions/matrix.py --tests tests/models      a selection (arguments of pytest)
    python tests/versions/matrix.py --only newest-3.12        one environment; may be given again
    python tests/versions/matrix.py --list                    what would be run, and what is missing

`make test-versions` calls it, with VERSIONS_TESTS and VERSIONS. The lowest versions are those of
constraints.txt, on the lowest Python; the newest are those of newest.txt beside this file, on each
Python. A Python that the machine lacks is left out with a line. Each environment is kept in
.versions/NAME, with pip's and pytest's output beside it, and made again when its versions change.

The exit code is 1 if a test failed or an environment could not be made, 2 if nothing can be run.
"""

import argparse
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".versions"
PYTHONS = ("3.11", "3.12", "3.13", "3.14", "3.15")
"""The lowest that pyproject.toml allows, to the newest for which torch has a build."""
EXTRAS = "dev,math,schema,sentiment,tensorboard"
"""What is installed beside the dependencies: the tests of other extras are skipped."""
SHOWN = ("torch", "transformers", "trl", "accelerate", "peft", "datasets", "numpy")
LISTED = 20
"""How many names of failed tests are printed for an environment."""
TEST_ARGUMENTS = ("-q", "-p", "no:cacheprovider", "-n", "logical", "--dist", "loadfile", "--no-loadscope-reorder")


@dataclass(frozen=True)
class Environment:
    """Describe an environment: which Python, with which versions."""

    name: str
    """Its folder below .versions."""
    python: str
    """The minor version of its Python, such as 3.12."""
    constraints: Path
    """The file that holds every version."""


@dataclass(frozen=True)
class Result:
    """Hold what the tests of one environment gave."""

    versions: dict[str, str]
    """Installed version of python and of each library in SHOWN."""
    passed: int
    failed: int
    """Failed tests, and errors of fixtures and imports."""
    skipped: int
    minutes: float


def environments() -> list[Environment]:
    """Return every environment: the lowest versions first, then the newest on each Python."""
    newest = ROOT / "tests" / "versions" / "newest.txt"
    lowest = Environment("lowest", PYTHONS[0], ROOT / "constraints.txt")
    return [lowest, *(Environment(f"newest-{python}", python, newest) for python in PYTHONS)]


def selected(names: Sequence[str]) -> list[Environment]:
    """Return the environments with these names; all if there are none.

    Raises:
        ValueError: A name that no environment has.
    """
    known = {environment.name: environment for environment in environments()}
    for name in names:
        if name not in known:
            raise ValueError(f"VERSIONS: there is no environment {name}; use one of {', '.join(known)}")
    return [known[name] for name in names] if names else list(known.values())


def interpreter(python: str) -> Path | None:
    """Return a program that runs this Python: of PATH, of pyenv or of uv; None if there is none.

    A program is asked for its version first: pyenv puts a python3.12 into PATH that only reports
    an error until that version is switched on.
    """
    for candidate in _candidates(python):
        # Debian's python3 without python3-venv has no ensurepip, and cannot make an environment.
        code = "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"
        try:
            answer = subprocess.run([candidate, "-c", code], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if answer.returncode == 0 and answer.stdout.strip() == python:
            return Path(candidate)
    return None


def _candidates(python: str) -> Iterator[str]:
    """Yield programs that may be this Python, those of PATH first."""
    found = shutil.which(f"python{python}")
    if found:
        yield found
    yield str(Path(sys.base_prefix, "bin", f"python{python}"))
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    managed = Path(os.environ.get("UV_PYTHON_INSTALL_DIR", Path.home() / ".local/share/uv/python"))
    for folder in [*sorted(pyenv.glob(f"{python}.*")), *sorted(managed.glob(f"cpython-{python}.*"))]:
        yield str(folder / "bin" / f"python{python}")


def make(environment: Environment, program: Path) -> Path:
    """Make an environment unless it is up to date, and return its Python.

    torch is installed first, by its exact version, as `make setup` does: pip then takes the build
    that the machine offers.

    Args:
        environment: What to install.
        program: A Python of its version.

    Raises:
        subprocess.CalledProcessError: venv or pip failed; NAME.install.log has their output.
    """
    folder = FOLDER / environment.name
    python, stamp = folder / "bin" / "python", folder / ".installed"
    state = _state(environment, program)
    if stamp.is_file() and stamp.read_text() == state:
        return python
    log = FOLDER / f"{environment.name}.install.log"
    print(f"{environment.name}: installing, some minutes; {_shown(log)} says what", flush=True)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "-c", str(environment.constraints)]
    shutil.rmtree(folder, ignore_errors=True)
    FOLDER.mkdir(exist_ok=True)
    with log.open("w") as output:
        for command in (
            [str(program), "-m", "venv", str(folder)],
            [*pip, torch_pin(environment.constraints.read_text())],
            [*pip, "-e", f".[{EXTRAS}]"],
        ):
            print("$", shlex.join(command), file=output, flush=True)
            subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, check=True)
    stamp.write_text(state)
    return python


def _state(environment: Environment, program: Path) -> str:
    """Return a digest of what an environment is made from: its Python and its versions."""
    digest = hashlib.sha256(str(program).encode())
    for path in (ROOT / "pyproject.toml", environment.constraints):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def torch_pin(constraints: str) -> str:
    """Return the exact requirement of torch in a file of constraints, without its marker."""
    found = re.search(r"^torch==[^\s;]+", constraints, re.MULTILINE)
    assert found, "no torch==VERSION"
    return found.group()


def run_tests(environment: Environment, python: Path, arguments: Sequence[str]) -> Result:
    """Run pytest in an environment and count its tests; NAME.log has the output."""
    report, log = FOLDER / f"{environment.name}.xml", FOLDER / f"{environment.name}.log"
    report.unlink(missing_ok=True)
    command = [str(python), "-m", "pytest", *TEST_ARGUMENTS, f"--junitxml={report}", *arguments]
    print(f"{environment.name}: testing; {_shown(log)} has the output", flush=True)
    start = time.monotonic()
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with log.open("w") as output:
        subprocess.run(command, cwd=ROOT, env=surroundings, stdout=output, stderr=subprocess.STDOUT)
    minutes = (time.monotonic() - start) / 60
    passed, failed, skipped = counts(report)
    for name in failed[:LISTED]:
        print(f"{environment.name}: failed: {name}", flush=True)
    if len(failed) > LISTED:
        print(f"{environment.name}: and {len(failed) - LISTED} more", flush=True)
    return Result(installed(python), passed, len(failed), skipped, minutes)


def counts(report: Path) -> tuple[int, list[str], int]:
    """Return how many tests passed, the names of those that failed, and how many were skipped.

    Args:
        report: pytest's report in the format of JUnit. If pytest died before it wrote one, that
            counts as a failure named "pytest wrote no report".
    """
    if not report.is_file():
        return 0, ["pytest wrote no report"], 0
    passed, failed, skipped = 0, {}, 0
    for case in ElementTree.parse(report).iter("testcase"):
        outcomes = {child.tag for child in case}
        if outcomes & {"failure", "error"}:
            # A test that passed and whose fixture then failed is listed twice.
            failed[f"{case.get('classname')}::{case.get('name')}"] = None
        elif "skipped" in outcomes:
            skipped += 1
        else:
            passed += 1
    return passed, list(failed), skipped


def installed(python: Path) -> dict[str, str]:
    """Return the version of an environment's Python and of each library in SHOWN."""
    code = (
        "import platform, sys\nfrom importlib import metadata\nprint('python', platform.python_version())\n"
        "for name in sys.argv[1:]: print(name, metadata.version(name))"
    )
    answer = subprocess.run([python, "-c", code, *SHOWN], capture_output=True, text=True, check=True)
    return dict(line.split() for line in answer.stdout.splitlines())


def table(results: dict[str, Result]) -> str:
    """Return a Markdown table with one row an environment."""
    head = ["environment", "python", *SHOWN, "passed", "failed", "skipped", "minutes"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    for name, result in results.items():
        figures = [str(result.passed), str(result.failed), str(result.skipped), f"{result.minutes:.1f}"]
        cells = [name, *(result.versions[key] for key in ("python", *SHOWN)), *figures]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _allows(python: str) -> bool:
    """Return whether requires-python of pyproject.toml allows a minor version of Python."""
    from packaging.specifiers import SpecifierSet

    with (ROOT / "pyproject.toml").open("rb") as file:
        return SpecifierSet(tomllib.load(file)["project"]["requires-python"]).contains(f"{python}.99")


def main(argv: Sequence[str] | None = None) -> int:
    """Make what is missing, run the tests everywhere, print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="an environment; may be repeated")
    parser.add_argument("--tests", default="", help="arguments of pytest, such as 'tests/models -k lora'")
    parser.add_argument("--list", action="store_true", help="list the environments, and run nothing")
    given = parser.parse_args(argv)
    try:
        chosen = [environment for environment in selected(given.only) if _allows(environment.python)]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = {environment: interpreter(environment.python) for environment in chosen}
    results, broken = {}, False
    for environment, program in found.items():
        if program is None:
            print(f"{environment.name}: left out, no python{environment.python} in PATH, pyenv or uv", flush=True)
        elif given.list:
            print(f"{environment.name}: {program}, {_shown(environment.constraints)}")
        else:
            try:
                python = make(environment, program)
                results[environment.name] = run_tests(environment, python, shlex.split(given.tests))
            except subprocess.CalledProcessError:
                broken = True
                log = _shown(FOLDER / f"{environment.name}.install.log")
                print(f"{environment.name}: cannot be installed; {log} says why", flush=True)
    if not any(found.values()):
        print("error: VERSIONS: no Python for what was asked; install one of those named above", file=sys.stderr)
        return 2
    if results:
        print(table(results))
    return int(broken or any(result.failed for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
