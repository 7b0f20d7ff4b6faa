"""Declare the scorer `python:`: a function of the user."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pipeline.config.section import setting
from stages.settings.scorers.common import ScorerSection
from stages.settings.scorers.python_source import (
    GIVEN,
    NOT_GIVEN,
    defined_names,
    local_imports,
    parameters_of,
    parse_file,
)


class PythonScorer(ScorerSection):
    """Score by a Python function."""

    python: str = setting(..., "FILE.py:FUNCTION, a function that scores responses (stages/scorers/README.md)")
    completions: Literal["text", "messages"] | None = setting(
        None, "what `completions` holds: texts, or messages; null: as the prompts are, as in trl"
    )
    workers: int | None = setting(
        None,
        "processes that call the function, for each process of the run; null: the run itself, or 1 where timeout is "
        "set",
        "processes",
        ge=1,
    )
    timeout: float | None = setting(
        None, "longest time that a call may take, in a process of its own; null: any time", "seconds", gt=0
    )
    on_error: Literal["stop", "score"] = setting(
        "stop",
        "what an exception, a time-out or a number that is not finite does: end the run, or give the response "
        "error_score and count it",
    )
    error_score: float = setting(-1.0, "score of a response whose scoring failed, with on_error: score")

    def file_and_function(self) -> tuple[Path, str]:
        """Return the two parts of `python`; the second is "" if there is no colon."""
        file, _, function = self.python.rpartition(":") if ":" in self.python else (self.python, "", "")
        return Path(file).expanduser(), function

    def processes(self) -> int:
        """Return the number of worker processes; 0 if the run itself calls the function."""
        if self.workers is None:
            return 0 if self.timeout is None else 1
        return self.workers

    def default_name(self) -> str:
        """Return the name of the function."""
        return self.file_and_function()[1]

    def problems(self, key: str) -> list[str]:
        """Return a line if the file or the function is missing. The file is read, not run."""
        file, function = self.file_and_function()
        if not function.isidentifier():
            return [f"{key}.python: {self.python!r} names no function; give FILE.py:FUNCTION"]
        if not file.is_file():
            return [f"{key}.python: no such file: {file}; give FILE.py:FUNCTION"]
        try:
            tree = parse_file(file)
        except ValueError as error:
            return [f"{key}.python: {file}: {error}"]
        names = defined_names(tree)
        if names is not None and function not in names:
            return [f"{key}.python: {file}: has no function {function}; define it, or name another one"]
        parameters = parameters_of(tree, function)
        if parameters is not None and (asked := sorted(parameters.required & NOT_GIVEN)):
            what = f"{function} must be given {asked[0]}, which exists only inside trl"
            return [f"{key}.python: {file}: {what}; give that parameter a default"]
        if "error_score" in self.model_fields_set and self.on_error == "stop":
            return [f"{key}.error_score: has no effect with on_error: stop; set on_error: score, or leave it out"]
        return []

    def files(self, key: str) -> dict[str, Path]:
        """Return the file, and the Python files beside it that it imports."""
        file = self.file_and_function()[0]
        own = {f"{key}.python": file}
        if not file.is_file():
            return own
        folder = file.resolve().parent
        return own | {f"{key}.python ({one.relative_to(folder)})": one for one in local_imports(file)}

    def row_problems(self, rows: Sequence[Mapping[str, Any]], places: Sequence[str]) -> list[str]:
        """Return a line for each parameter of the function that no row has a key for.

        Args:
            rows: The rows of data.
            places: The location of each, for error lines.
        """
        file, function = self.file_and_function()
        parameters = parameters_of(parse_file(file), function)
        if parameters is None:
            return []
        keys = {key for row in rows for key in row}
        missing = sorted(parameters.required - keys - GIVEN)
        known = ", ".join(sorted((keys - {"prompt"}) | GIVEN))
        return [
            f"{file}:{function}: asks for {name}, which no row of data has (first row: {places[0]}); add it, or ask "
            f"for what is known: {known}"
            for name in missing
        ]
