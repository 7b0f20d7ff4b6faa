"""Find the other models of an ensemble on disk; imports no torch."""

from pathlib import Path
from typing import Literal

How = Literal["mean", "min", "mean_minus_std"]


def others_of(folder: Path) -> list[Path]:
    """Return the folders ensemble/1, ensemble/2, … beside the first model of an ensemble."""
    numbered = (path for path in (Path(folder).parent / "ensemble").glob("*") if path.name.isdecimal())
    return sorted(numbered, key=lambda path: int(path.name))
