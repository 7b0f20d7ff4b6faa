"""Declare the scorer `python:`: a function of the user."""

from pathlib import Path

from pipeline.config.section import setting
from stages.settings.scorers.common import ScorerSection


class PythonScorer(ScorerSection):
    """Score by a Python function."""

    python: str = setting(..., "FILE.py:FUNCTION, a function that scores responses (stages/scorers/README.md)")

    def file_and_function(self) -> tuple[Path, str]:
        """Return the two parts of `python`; the second is "" if there is no colon."""
        file, _, function = self.python.rpartition(":") if ":" in self.python else (self.python, "", "")
        return Path(file).expanduser(), function

    def default_name(self) -> str:
        """Return the name of the function."""
        return self.file_and_function()[1]

    def problems(self, key: str) -> list[str]:
        """Return a line if the file or the name of the function is missing."""
        file, function = self.file_and_function()
        if not function.isidentifier():
            return [f"{key}.python: {self.python!r} names no function; give FILE.py:FUNCTION"]
        if not file.is_file():
            return [f"{key}.python: no such file: {file}; give FILE.py:FUNCTION"]
        return []

    def files(self, key: str) -> dict[str, Path]:
        """Return the file."""
        return {f"{key}.python": self.file_and_function()[0]}
