"""Run tests that failed beside others once more, each in a process of its own.

    python tests/second_try.py REPORT [-m EXPRESSION]

REPORT is what pytest's --junitxml wrote of a run that ended. Exit code 0: at most five tests failed
there, and each passes now. 1: more failed, one fails again, or the run did not get to all tests (a
worker or the whole run broke off, or a file could not be collected). A test of processes, browsers
or clocks may fail on a full machine; which ones did is printed.
"""

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

MOST = 5
"""Failures above which something else is wrong than a full machine."""


def id_of(case: ElementTree.Element) -> str | None:
    """Return the id of a test in a report; None if that is no test, but a file not collected."""
    parts = [part for part in (case.get("classname") or "").split(".") if part]
    for count in range(len(parts), 0, -1):
        file = Path(*parts[:count]).with_suffix(".py")
        if file.is_file():
            return "::".join([file.as_posix(), *parts[count:], case.get("name") or ""])
    return None


def failed_in(report: Path) -> tuple[list[str | None], int]:
    """Return the ids of tests that failed, and how many tests there are in a report.

    Args:
        report: The file; nothing failed, and nothing ran, if there is none.
    """
    if not report.is_file():
        return [], 0
    cases = list(ElementTree.parse(report).iter("testcase"))
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    names = {(case.get("classname"), case.get("name")) for case in cases}
    return list(dict.fromkeys(map(id_of, bad))), len(names)


def collected(words: Sequence[str]) -> int:
    """Return how many tests pytest collects; 0 if it cannot collect all files."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return sum("::" in line for line in done.stdout.splitlines()) if done.returncode == 0 else 0


def main(argv: Sequence[str]) -> int:
    """Run the tests, and return the exit code."""
    report, words = Path(argv[0]), list(argv[1:])
    failed, ran = failed_in(report)
    expected = collected(words)
    if not 0 < len(failed) <= MOST or None in failed or not 0 < expected <= ran:
        print(f"no second try: {len(failed)} failed; {ran} of {expected} tests are in {report}")
        return 1
    again = []
    for name in filter(None, failed):
        print(f"failed beside others; once more, alone: {name}", flush=True)
        if subprocess.run([sys.executable, "-m", "pytest", "-q", *words, name], check=False).returncode:
            again.append(name)
    print(f"of {len(failed)} tests that failed beside others, {len(again)} fail alone")
    return int(bool(again))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
