"""Test which failures CI tries once more."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("second_try.py")
FAILS_ONCE = """\
from pathlib import Path
import os

def test_good():
    pass

class TestMore:
    def test_first_time(self, {cases}):
        seen = Path("seen")
        was = seen.exists()
        seen.touch()
        assert was
"""


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """Return run(files, *words) → exit code of the second try after a first run; its output."""
    monkeypatch.chdir(tmp_path)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}

    def run(files: dict[str, str], *words: str) -> tuple[int, str]:
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        common = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=report.xml", *words]
        subprocess.run(common, capture_output=True, env=environment, check=False)
        command = [sys.executable, str(PROGRAM), "report.xml"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        return done.returncode, done.stdout

    return run


def test_one_that_fails_beside_others_and_passes_alone_is_forgiven_and_named(suite):
    text = "import pytest\n" + FAILS_ONCE.format(cases="case").replace(
        "class TestMore:\n", "class TestMore:\n    @pytest.mark.parametrize('case', ['a.b::c'])\n"
    )
    code, said = suite({"test_a.py": text})
    assert code == 0 and "alone: test_a.py::TestMore::test_first_time[a.b::c]" in said


def test_one_that_fails_again_fails(suite):
    code, said = suite({"test_a.py": "def test_good(): pass\ndef test_bad(): assert 0\n"})
    assert code == 1 and "1 fail alone" in said


@pytest.mark.parametrize(
    "files, words",
    [
        ({"test_a.py": "".join(f"def test_{i}(): assert 0\n" for i in range(6))}, []),
        ({"test_a.py": "def test_bad(): assert 0\n", "test_b.py": "import nothing_of_that_name\n"}, []),
        ({"test_a.py": "import os\ndef test_bad(): assert os.path.exists('seen') or open('seen', 'w').close()\n"
                       "def test_not_reached(): assert 0\n"}, ["-x"]),
        ({"test_a.py": "def test_good(): pass\n"}, []),
    ],
    ids=["too many", "a file that cannot be collected", "a run that broke off", "no failure at all"],
)  # fmt: skip
def test_a_run_that_says_less_than_it_should_is_not_forgiven(suite, files, words):
    code, said = suite(files, *words)
    assert code == 1 and said.startswith("no second try: ")


def test_no_report_is_no_success(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_a.py").write_text("def test_good(): pass\n")
    done = subprocess.run([sys.executable, str(PROGRAM), "none.xml"], capture_output=True, check=False)
    assert done.returncode == 1
