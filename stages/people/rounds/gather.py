"""Read what people gave since the last round: on the ranking pages and in the playgrounds.

Every round has a database of its own, and people may go on using an earlier round's pages. So the
databases of all rounds are read, and what a round took before is left out: the files that rounds
keep of what they gathered, and the snapshots that their stage rankings read.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from stages.people.playground import collect
from stages.people.rank import snapshots
from stages.people.store.database import open_existing, people_folder
from stages.settings.rounds import FOLDER, artifact

Row = dict[str, Any]
GATHERED = "gathered"
"""Folder of what a round gathered, as people gave it."""
PAGE = "page_rankings"
"""What came from ranking pages; the other files are those of playgrounds."""
KINDS = (PAGE, "rankings", "demonstrations", "prompts")
"""Files of a round's folder GATHERED, without their suffix."""


@dataclass
class Gathered:
    """Hold what people gave, as rows of data."""

    rows: dict[str, list[Row]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    """What no round took before, by file."""
    gone: set[str] = field(default_factory=set)
    """Ids of rankings that a round took, and that were excluded, changed or deleted since."""

    def count(self) -> int:
        """Return the number of rows that are new."""
        return sum(len(rows) for rows in self.rows.values())


def gather(bases: Sequence[Path], thumbs: bool = False) -> Gathered:
    """Return what people gave in some experiments and no round took before.

    Args:
        bases: The folders of all rounds so far, the first one first.
        thumbs: Whether thumbs are rankings too, of one response with a label each.

    Raises:
        UserError: A database is damaged or of another experiment, or a round is not there any more.
    """
    for base in bases:
        check_whole(base)
    known = {kind: set(map(key_of, rows)) for kind, rows in taken_before(bases).items()}
    ids_before = {row["id"] for kind in (PAGE, "rankings") for row in taken_before(bases)[kind]}
    found, ids_now = Gathered(), set()
    for base in bases:
        for kind, rows in given(base, thumbs).items():
            for row in rows:
                if key_of(row) not in known[kind]:
                    found.rows[kind].append(row)
                elif "id" in row:
                    ids_now.add(row["id"])
    found.gone = ids_before - ids_now
    return found


def check_whole(base: Path) -> None:
    """Check that it is known what a round took: else its rankings would be gone, or taken twice.

    Raises:
        UserError: The round's folder is gone, or its stage rankings although there is a snapshot.
    """
    if not base.is_dir():
        raise UserError(f"round.earlier: no such folder: {base}; put the artifacts of this round back, or correct it")
    if (people_folder(base) / snapshots.FOLDER).is_dir() and artifact(base, "rankings") is None:
        raise UserError(
            f"{base}/rankings: is not there any more, and it alone knows which of people's rankings this round took; "
            f"put it back, or run the stage rankings of this round again"
        )


def given(base: Path, thumbs: bool) -> dict[str, list[Row]]:
    """Return everything that people gave in an experiment, by file; playgrounds with consent only.

    Args:
        base: The experiment's folder.
        thumbs: As of `gather`.
    """
    database = open_existing(base, base.name)
    if database is None:
        return {kind: [] for kind in KINDS}
    try:
        with database.read() as connection:
            trees = collect.trees(connection)
            labelled = collect.labelled_rows(trees) if thumbs else []
            return {
                PAGE: [json.loads(line) for line in snapshots.lines_of(connection)],
                "rankings": collect.ranking_rows(trees) + labelled,
                "demonstrations": collect.demonstration_rows(trees),
                "prompts": collect.prompt_rows(trees),
            }
    finally:
        database.close()


def taken_before(bases: Sequence[Path]) -> dict[str, list[Row]]:
    """Return what rounds took before, by file.

    Args:
        bases: The folders of all rounds so far.
    """
    found: dict[str, list[Row]] = {kind: [] for kind in KINDS}
    for base in bases:
        for kind in KINDS:
            found[kind] += rows_of(base / FOLDER / GATHERED / f"{kind}.jsonl")
        for snapshot in snapshots_read(base):
            found[PAGE] += rows_of(snapshot)
    return found


def snapshots_read(base: Path) -> list[Path]:
    """Return the snapshots of a ranking page that an experiment's stage rankings read.

    Args:
        base: The experiment's folder.
    """
    manifest = base / "rankings" / "manifest.json"
    if not manifest.is_file():
        return []
    source = json.loads(manifest.read_text(encoding="utf-8"))["config"].get("data", {}).get("rankings") or {}
    folder = people_folder(base) / snapshots.FOLDER
    parts = list(source.get("parts", {}).values()) or [source]
    paths = [
        folder / Path(part["path"]).name for part in parts if Path(part.get("path", "")).parent.name == folder.name
    ]
    return [path for path in paths if path.is_file()]


def rows_of(path: Path) -> Iterator[Row]:
    """Yield the rows of a file of JSON lines; none where there is no file."""
    if path.is_file():
        with path.open(encoding="utf-8") as lines:
            yield from (json.loads(line) for line in lines)


def key_of(row: Row) -> str:
    """Return a digest of what a row says, without what a lead says of it."""
    text = snapshots.comparable(json.dumps(row).encode())
    return hashlib.sha256(text.encode()).hexdigest()
