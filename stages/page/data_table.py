"""List the data of a run: files, rows and the stages that read them."""

from dataclasses import dataclass, field
from typing import Any

from stages.page.manifests import Manifest, metrics_of, ordered, section, sha256_of
from stages.page.numbers import NONE
from stages.page.table import Cell, Table, dense
from stages.shared.source_words import parts_of, reading_words, recorded_rows, short_name

KINDS = ("documents", "demonstrations", "prompts", "evaluation_prompts", "rankings")
"""The kinds of data, in the order of the table."""
ONLY_DATA = {"demonstrations": "sft", "rankings": "rankings"}
"""Kind → the stage that reads it and no other kind, so that its counts are of this kind."""


@dataclass
class Source:
    """Record where a kind of data comes from."""

    recorded: dict[str, Any]
    """What a manifest records of the source."""
    digest: str | None
    """The SHA-256 of the file, where it is known."""
    readers: list[str] = field(default_factory=list)
    """The stages that read it."""


def data_table(manifests: dict[str, Manifest], results: dict[str, Any]) -> Table | None:
    """List the data by kind.

    Rows are those of the file. Data on the Hub are not counted before they are read; for those, the
    rows that a stage used are given.

    Args:
        manifests: Stage → its manifest.
        results: results.json, completed.

    Returns:
        The table, or None where no manifest records any data.
    """
    sources = sources_of(manifests)
    used = used_rows(manifests, results)
    untaken = {kind: not_taken(metrics_of(manifests, stage)) for kind, stage in ONLY_DATA.items()}
    rows = [row_of(kind, sources[kind], metrics_of(manifests, "world").get(kind), used.get(kind), untaken.get(kind, []))
            for kind in KINDS if kind in sources]  # fmt: skip
    if "rankings" in manifests and "rankings" not in sources:
        rows.append(sampled_rankings(manifests))
    if not rows:
        return None
    head = ("data", "file", "rows", "read by", "sha256")
    return dense(Table("Data by kind", head, tuple(rows), frozenset({0, 1, 3, 4})))


def sources_of(manifests: dict[str, Manifest]) -> dict[str, Source]:
    """Return kind → its source, as the first stage that read it records it."""
    sources: dict[str, Source] = {}
    for stage, manifest in ordered(manifests):
        for kind, recorded in section(manifest, "data").items():
            if not isinstance(recorded, dict):
                continue
            digest = manifest["inputs"].get(f"data:{kind}")
            if not digest and recorded["path"] == "world":
                digest = sha256_of(manifests, "world", f"{kind}.jsonl")
            sources.setdefault(kind, Source(recorded, digest)).readers.append(stage)
    return sources


def row_of(kind: str, source: Source, written: int | None, used: int | None, untaken: list[str]) -> tuple[Cell, ...]:
    """Return the row of a kind of data.

    Args:
        kind: The kind.
        source: Its source.
        written: How many rows the stage world wrote of it.
        used: How many rows a stage says that it used.
        untaken: What it says that it did not take, as of `not_taken`.
    """
    recorded = source.recorded
    is_world = recorded["path"] == "world"
    count = written if is_world else recorded_rows(recorded)
    read = None if recorded.get("parts") else rows_read(count, recorded)  # weights decide for a mixture
    text = NONE if used is None else f"{used:,} used"
    if read is not None:
        text = f"{read:,}"
    files = "files" if recorded.get("parts") else "file"
    whole = f"of {count:,} in the {files}" if count is not None and (read != count or untaken) else ""
    whole = "; ".join(filter(None, [whole, *untaken]))
    if is_world:
        file = Cell(f"{kind}.jsonl", "from the embedded world")
    else:
        parts = parts_of(recorded)
        file = Cell(" + ".join(map(file_name, parts)), how_read(parts))
    return (Cell(kind.replace("_", " ")), file, Cell(text, whole), Cell(", ".join(source.readers)),
            Cell((source.digest or NONE)[:12], code=True))  # fmt: skip


def sampled_rankings(manifests: dict[str, Manifest]) -> tuple[Cell, ...]:
    """Return the row of rankings that simulated labelers made."""
    count = metrics_of(manifests, "rankings").get("rankings")
    readers = [stage for stage, manifest in ordered(manifests) if "rankings" in manifest["inputs"]]
    digest = sha256_of(manifests, "rankings", "train.jsonl") or NONE
    judged = metrics_of(manifests, "rankings").get("judge")
    files = "train.jsonl, validation.jsonl" + (", judge.jsonl" if judged else "")
    file = Cell(files, "SFT's samples, ranked by simulated labelers")
    more = f"and {judged:,} for the kept judge" if judged else ""
    return (Cell("rankings"), file, Cell(NONE if count is None else f"{count:,}", more), Cell(", ".join(readers)),
            Cell(digest[:12], code=True))  # fmt: skip


def rows_read(count: int | None, recorded: dict[str, Any]) -> int | None:
    """Return how many of a file's `count` rows were read: those after `skip`, at most `limit`."""
    if count is None:
        return None
    remaining = max(0, count - (recorded.get("skip") or 0))
    return remaining if recorded.get("limit") is None else min(remaining, recorded["limit"])


def used_rows(manifests: dict[str, Manifest], results: dict[str, Any]) -> dict[str, int | None]:
    """Return kind → the rows that a stage says it used."""
    return {
        "demonstrations": metrics_of(manifests, "sft").get("rows"),
        "rankings": metrics_of(manifests, "rankings").get("rankings"),
        "evaluation_prompts": results.get("prompts"),
    }


def not_taken(metrics: dict[str, Any]) -> list[str]:
    """Return the rows, or parts of rows, that a stage left out of its data, in words."""
    counts = [(metrics.get("left_out"), "left out"), (metrics.get("bad_rows"), "with mistakes dropped")]
    return [f"{count:,} {words}" for count, words in counts if count]


def how_read(parts: list[dict[str, Any]]) -> str:
    """Say how a source was read; of a mixture, each part with its name."""
    if len(parts) == 1:
        return part_of(parts[0])
    return "; ".join(f"{file_name(part)}: {part_of(part)}" for part in parts if part_of(part))


def file_name(recorded: dict[str, Any]) -> str:
    """Return the name of a file without its folder, or the whole name of a data set on the Hub."""
    path = recorded["path"]
    is_on_hub = "asked_revision" in recorded or recorded.get("revision")
    return path if is_on_hub else short_name(path)


def part_of(recorded: dict[str, Any]) -> str:
    """Say which part of a source was read, and at which commit."""
    parts = []
    if recorded.get("split") not in (None, "train"):
        parts.append(f"split {recorded['split']}")
    if recorded.get("subset"):
        parts.append(f"subset {recorded['subset']}")
    if recorded.get("revision"):
        parts.append(f"commit {recorded['revision'][:7]}")
    if recorded.get("skip"):
        parts.append(f"after the first {recorded['skip']:,}")
    if recorded.get("limit"):
        parts.append(f"at most {recorded['limit']:,} rows")
    return ", ".join([*parts, *reading_words(recorded)])
