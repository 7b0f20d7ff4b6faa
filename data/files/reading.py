"""Collect what reading a file finds besides its rows."""

from dataclasses import dataclass, field


@dataclass
class Reading:
    """Collect what reading a file finds besides its rows."""

    errors: list[str] = field(default_factory=list)
    """Lines "FILE:LINE: what is wrong; what to do"."""
    blanks: int = 0
    """Blank lines that were skipped."""
    hashes: bool = False
    """Whether to compute `sha256`."""
    sha256: str | None = None
    """The digest of the whole file, folder or glob, known after reading has ended."""
    split: str | None = None
    """The split to take of a folder that holds several; None: such a folder is refused."""
    format: str | None = None
    """json, csv, tsv, text, parquet or arrow, known before the first row.

    In csv and tsv every value is a string.
    """
