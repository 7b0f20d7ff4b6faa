"""Collect what reading a file finds besides its rows."""

from collections.abc import Callable
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
    size: int = 0
    """Bytes of all files that are read; 0 if that is not known."""
    passed: int = 0
    """Bytes of the files that were read before the present one."""
    file_size: int = 0
    """Bytes of the present file."""
    file_share: Callable[[], float] | None = None
    """Returns the share of the present file that has been read, from 0 to 1."""

    def share(self) -> float | None:
        """Return the share of everything that has been read, from 0 to 1; None if not known."""
        if self.file_share is None:
            return None
        if not self.size:  # a data set that is no file
            return self.file_share()
        return min(1.0, (self.passed + self.file_share() * self.file_size) / self.size)
