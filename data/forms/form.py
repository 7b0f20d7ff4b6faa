"""Define a data form: how its rows are recognised, and how they are converted."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Form:
    """Describe the rows of one form of data.

    A row has this form if it has all keys of `needs`. To add a form, write a module with a `Form`
    in this folder and name it in the table of `data/forms/__init__.py`.
    """

    needs: tuple[str, ...]
    """Keys that every row of this form has."""
    also: tuple[str, ...]
    """Keys that a row may have, and that are read."""
    convert: Callable[[dict], dict]
    """Row of this form → row of our own form ({text}, {prompt}, {prompt, completion} or {prompt,
    responses, ranks, …}), which is then checked by `data/parsing.py`. Raises ValueError("what is
    wrong; what to do")."""
    strict: bool = False
    """Whether a key that is neither in `needs` nor in `also` is an error: True for our own forms,
    where it is a misspelling."""

    def __str__(self) -> str:
        """Return the keys as in error lines: {prompt, completion, system?}."""
        return "{" + ", ".join([*self.needs, *(f"{key}?" for key in self.also)]) + "}"
