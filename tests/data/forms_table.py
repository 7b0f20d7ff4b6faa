"""Print a table of what `rlhf data check` and `preview` make of every file of a folder.

    .venv/bin/python tests/data/forms_table.py FOLDER [key=value …]

The table is Markdown: file, kind and form, rows and records, what is left out, or the refusal, and
the beginning of the first row that preview shows. `key=value` says how all files are read.
"""

import io
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.check.guess import guess_kind
from data.check.inspect_file import check
from data.check.report import Limits, Report
from data.error_lines import shorten
from data.row_reader import records
from data.source import Loaded, Source
from data.tools.marked import Printer
from data.tools.preview import show_plain
from pipeline.data_arguments import parse_reading
from pipeline.errors import UserError

SEEN = ("rows", "form", "left out", "dropped", "filtered", "keys not read")
"""Facts of the report that have a column of their own."""
PREVIEWED = 160
"""Characters of the first row that are shown."""


@dataclass
class Line:
    """Hold a line of the table."""

    file: str
    """The file's name."""
    kind: str = ""
    """The kind of data; "refused" if there are errors."""
    forms: list[str] = field(default_factory=list)
    """The forms of its rows."""
    rows: str = ""
    """The number of rows."""
    left: list[str] = field(default_factory=list)
    """What is left out or not read, or the first errors."""
    first: str = ""
    """The beginning of the first row."""

    def markdown(self) -> str:
        """Return the line."""
        cells = [self.file, self.kind, "<br>".join(self.forms), self.rows, "<br>".join(self.left), self.first]
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", "\u23ce ") for cell in cells) + " |"


def line_of(path: Path, reading: dict) -> Line:
    """Return the line of a file.

    Args:
        path: The file.
        reading: Settings of the source.
    """
    source = Source(
        path=path, **{key: tuple(value) if isinstance(value, list) else value for key, value in reading.items()}
    )
    kind = guess_kind(source)
    report = check(source, kind)
    line = Line(path.name, kind or "unknown", forms_in(report), dict(report.facts).get("rows", ""))
    if report.errors:
        line.kind = f"**refused**{f' ({kind})' if kind else ''}"
        line.left = [text.replace(f"{path.parent}/", "") for text in shorten(report.errors)[:2]]
        return line
    assert kind is not None
    line.left = [f"{label} {text}" for label, text in report.facts if label in SEEN[2:]]
    line.first = first_row(source, kind)
    return line


def forms_in(report: Report) -> list[str]:
    """Return the form lines of a report, the optional keys left out."""
    return [text for label, text in report.facts if label == "form"]


def first_row(source: Source, kind: str) -> str:
    """Return the beginning of the first row as preview shows it."""
    out = io.StringIO()
    location, record = next(records(kind, source, Loaded()))
    show_plain(record, location, kind, Limits(), Printer(out))
    _, _, text = out.getvalue().partition("\n")
    return text.strip()[:PREVIEWED]


def main(folder: str, words: list[str]) -> int:
    """Print the table, and return the exit code."""
    files = sorted(path for path in Path(folder).iterdir() if not path.name.startswith("."))
    print("| file | kind | form | rows | left out, not read, or why it is refused | first row |")
    print("| --- | --- | --- | --- | --- | --- |")
    lines = [line_of(path, parse_reading(words)) for path in files]
    for line in lines:
        print(line.markdown())
    refused = sum("refused" in line.kind for line in lines)
    print(f"\n{len(lines)} files: {len(lines) - refused} read, {refused} refused")
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    try:
        sys.exit(main(sys.argv[1], sys.argv[2:]))
    except UserError as error:
        sys.exit("\n".join(f"error: {problem}" for problem in error.lines))
