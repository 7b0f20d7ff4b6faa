"""Mark tests that are one more of a kind, which `make test-exhaustive` runs."""

from collections.abc import Iterable
from typing import Any

import pytest


def first_of_a_kind(cases: Iterable[Any], count: int) -> list[Any]:
    """Return the cases of a slow test: the first `count` as they are, the others `exhaustive`.

    Args:
        cases: The values of a parameter; a tuple has those of several parameters.
        count: How many the slow tests run.
    """
    listed = list(cases)
    return listed[:count] + [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.exhaustive)
        for case in listed[count:]
    ]
