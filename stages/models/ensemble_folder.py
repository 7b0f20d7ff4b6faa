"""Where the other models of an ensemble lie. Imports no torch."""

from pathlib import Path
from typing import Literal

How = Literal["mean", "min"]


def others_of(folder: Path) -> list[Path]:
    """The other models of the ensemble whose first one is `folder`: ensemble/1, … beside it."""
    numbered = (path for path in (Path(folder).parent / "ensemble").glob("*") if path.name.isdecimal())
    return sorted(numbered, key=lambda path: int(path.name))
