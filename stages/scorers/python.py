"""Score responses by a Python function of the user.

    def score(prompts, responses, **columns): ...

gives a list with one number for each response. It gets what it has parameters for: `prompts`
(texts or messages, as the data have them), `responses` (texts), `finished` (whether each ended by
itself), and any key of the rows of data (`answer`, …), each a list with one entry a response.
"""

import importlib.util
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import UserError
from stages.scorers.scorer import ScoreRequest, ScorerSpec, Scores
from stages.settings.scorers import python


class PythonScorer:
    """Score by the function that the settings name, in this process."""

    reads_rows = False

    def __init__(self, spec: ScorerSpec) -> None:
        assert isinstance(spec.settings, python.PythonScorer)
        self.name = spec.name
        file, function = spec.settings.file_and_function()
        self.function = load_function(file, function)

    def score(self, request: ScoreRequest) -> Scores:
        """Return the function's scores (B,), on the CPU."""
        given = arguments(self.function, request)
        scores = self.function(**given)
        if len(scores) != len(request.responses):
            raise UserError(f"{self.name}: {len(scores)} scores for {len(request.responses)} responses; give one each")
        for i, score in enumerate(scores):
            if not isinstance(score, int | float) or not math.isfinite(score):
                raise UserError(f"{self.name}: the score of response {i} is {score!r}; give a finite number")
        return Scores(torch.tensor([float(score) for score in scores]))

    def close(self) -> None:
        """Do nothing: the function holds nothing here."""


def load_function(file: Path, name: str) -> Callable[..., Any]:
    """Return a function of a file.

    Raises:
        UserError: The file cannot be imported, or has no such function.
    """
    spec = importlib.util.spec_from_file_location(f"reward_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{file}: cannot be imported ({type(error).__name__}: {error}); correct it") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{file}: has no function {name}; define it, or name another one")
    return function


def arguments(function: Callable[..., Any], request: ScoreRequest) -> dict[str, Any]:
    """Return the arguments of a function: what it has parameters for.

    Args:
        function: The user's function.
        request: Prompts, responses and rows of data.
    """
    rows = request.data_rows or [{} for _ in request.responses]
    columns = {key: [row.get(key) for row in rows] for row in rows for key in row}
    columns |= {
        "prompts": [row.get("prompt") for row in rows],
        "responses": request.response_texts(),
        "finished": request.finished(),
    }
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return columns
    return {name: column for name, column in columns.items() if name in parameters}
