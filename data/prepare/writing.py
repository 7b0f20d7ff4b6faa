"""Write the parts, the ledger, what is personal, the `data:` section and the manifest."""

import hashlib
import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import yaml

from data.prepare.personal import Find, find_personal
from data.prepare.reading import Input, digests_of
from data.prepare.settings import DOCUMENTS, PARTS, TRAINING_PARTS, Settings
from data.prepare.sift import Kept, LeftOut, names_of, text_key, user_key
from data.source import Source

PLACE = re.compile(r"(?P<file>.+?):(?P<line>\d+)(?:: index (?P<index>\d+))?")


@dataclass
class PartCounts:
    """Count what is in a part."""

    rows: int = 0
    """Its rows."""
    kinds: Counter[str] = field(default_factory=Counter)
    """Kind of data → its rows."""
    labels: Counter[str] = field(default_factory=Counter)
    """What rows call themselves under `kind`, such as few-shot → its rows."""
    users: set[bytes] = field(default_factory=set)
    """The keys of its users."""
    prompts: set[bytes] = field(default_factory=set)
    """The keys of its prompts, or documents."""
    personal: int = 0
    """Rows with personal data."""


@dataclass
class Outcome:
    """Count what became of the rows."""

    parts: dict[str, PartCounts] = field(default_factory=dict)
    """Part → what is in it."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Reason → rows."""
    personal: Counter[str] = field(default_factory=Counter)
    """Name of personal data → rows that hold it."""

    @property
    def rows(self) -> int:
        """Return the number of rows of the input."""
        return sum(part.rows for part in self.parts.values()) + self.left_out.total()


class Writer:
    """Write rows into the files of their parts, and rows that are left out into the ledger."""

    def __init__(self, folder: Path, settings: Settings):
        """Open the files.

        Args:
            folder: Where they are written.
            settings: What was asked for.
        """
        self.outcome = Outcome()
        self._folder = folder
        self._settings = settings
        self._files: dict[str, IO[str]] = {}
        self._ids: dict[str, str] = {}  # id of a ranking → the file that it came from
        for name in ("ledger", "personal_data"):
            self._open(name)

    def write(self, decision: Kept | LeftOut) -> None:
        """Write what was decided about a row."""
        if isinstance(decision, Kept):
            self._keep(decision)
        else:
            self._leave_out(decision)

    def close(self) -> None:
        """Close the files."""
        for handle in self._files.values():
            handle.close()

    def _keep(self, kept: Kept) -> None:
        """Write a row into its part."""
        row, part = kept.row, self.outcome.parts.setdefault(kept.part, PartCounts())
        part.rows += 1
        part.kinds[row.kind] += 1
        part.labels.update([row.value["kind"]] if row.value.get("kind") is not None else [])
        part.users.add(user_key(row))
        part.prompts.add(text_key(row))
        value = row.value
        if row.kind == "rankings":
            value = self._with_own_id(value, row.place)
        trains = kept.part in (*TRAINING_PARTS, DOCUMENTS)
        if trains and self._settings.personal in ("drop", "mask"):
            value = with_pseudonyms(value, self._settings.region)
        self._line(kept.part, value)
        if kept.personal:
            part.personal += 1
            action = "masked" if trains and self._settings.personal == "mask" else "kept"
            self._personal(kept.row.place, kept.personal, kept.part, action)

    def _leave_out(self, left_out: LeftOut) -> None:
        """Write a row into the ledger."""
        self.outcome.left_out[left_out.reason] += 1
        entry = {**place_of(left_out.row.place), "reason": left_out.reason}
        for key, text in (("copy_of", left_out.copy_of), ("detail", left_out.detail)):
            if text is not None:
                entry[key] = text
        self._line("ledger", entry)
        if left_out.personal:
            self._personal(left_out.row.place, left_out.personal, None, "left out")

    def _personal(self, place: str, finds: dict[str, list[Find]], part: str | None, action: str) -> None:
        """List the personal data of a row: where it is, and never what it says.

        Args:
            place: Where the row is.
            finds: {where: what was found there}.
            part: The row's part.
            action: What was done about it.
        """
        self.outcome.personal.update(names_of(finds))
        found = [
            {"what": find.what, "where": where, "start": find.start, "end": find.end}
            for where, group in finds.items()
            for find in group
        ]
        self._line("personal_data", {**place_of(place), "part": part, "action": action, "found": found})

    def _with_own_id(self, value: dict, place: str) -> dict:
        """Return a ranking with an id that no row of another file has."""
        file = place_of(place)["file"]
        name, copy = value["id"], 2
        while self._ids.setdefault(name, file) != file:
            name, copy = f"{value['id']}-{copy}", copy + 1
        return value | {"id": name}

    def _line(self, name: str, value: dict) -> None:
        """Append an object to a file."""
        handle = self._files.get(name) or self._open(name)
        handle.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")

    def _open(self, name: str) -> IO[str]:
        """Open a new file."""
        handle = (self._folder / f"{name}.jsonl").open("w", encoding="utf-8", newline="\n")
        self._files[name] = handle
        return handle


def place_of(place: str) -> dict[str, Any]:
    """Return {file, line, index?} of a place "FILE:LINE: index I"; of any other only {file}."""
    match = PLACE.fullmatch(place)
    if match is None:
        return {"file": place}
    found = {"file": match["file"], "line": int(match["line"])}
    return found if match["index"] is None else found | {"index": int(match["index"])}


def with_pseudonyms(value: dict, region: str) -> dict:
    """Return a record whose user and labeler have hashes for names that are personal data.

    Args:
        value: The record as JSON.
        region: As of `find_personal`.
    """
    changed = dict(value)
    for key, prefix in (("user_id", "user"), ("labeler", "labeler")):
        name = value.get(key)
        if isinstance(name, str) and find_personal(name, region):
            changed[key] = f"{prefix}-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"
    return changed


# ── the data section and the manifest ────────────────────────────────────────────────────────────

USED_AS = {"sft": "demonstrations", "rm": "rankings", "ppo": "prompts", DOCUMENTS: "documents"}
"""Part → the key of the section `data` that it is used under."""
TO_LABEL = {"sft": "prompts to write demonstrations for", "rm": "prompts whose responses are to be ranked"}
"""Part → what its rows are where they are only prompts."""


def data_section(folder: Path, outcome: Outcome, evaluation: Source | None) -> str:
    """Return the `data:` section of a config that uses the parts, with comments on the others.

    Args:
        folder: The folder of the parts.
        outcome: What is in them.
        evaluation: The config's evaluation prompts, which stay; None: the validation part is used.
    """
    section: dict[str, Any] = {}
    comments = []
    for part in (DOCUMENTS, *PARTS):
        counts = outcome.parts.get(part)
        file = str(folder / f"{part}.jsonl")
        if counts is None:
            continue
        if part in TO_LABEL and set(counts.kinds) == {"prompts"}:
            comments.append(f"{file}: {counts.rows:,} {TO_LABEL[part]}")
        elif part in USED_AS:
            section[USED_AS[part]] = file
        elif part == "validation" and evaluation is None:
            section["evaluation_prompts"] = file
        else:
            comments.append(f"{file}: {counts.rows:,} rows for later, which no stage reads")
    if evaluation is not None:
        sources = [as_setting(source) for source in evaluation.parts or (evaluation,)]
        section["evaluation_prompts"] = sources if evaluation.parts else sources[0]
    lines = "".join(f"# {comment}\n" for comment in comments)
    return lines + yaml.safe_dump({"data": section}, sort_keys=False, allow_unicode=True, width=1000)


def as_setting(source: Source) -> str | dict[str, Any]:
    """Return a source as a config names it: only its path, if it has no other settings."""
    changed = changed_settings(source)
    return {"path": source.name, **changed} if changed else source.name


def changed_settings(source: Source) -> dict[str, Any]:
    """Return the settings of a source that are not the defaults, as JSON."""
    default = Source()
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in vars(source).items()
        if key not in ("path", "hub", "parts") and value != getattr(default, key)
    }


def manifest_of(
    folder: Path, inputs: list[Input], protected: list[Source], settings: Settings, outcome: Outcome
) -> dict:
    """Return what was read, what was asked for and what was written, with a digest of it all.

    Nothing in it depends on when, where or by how many processes it was made.

    Args:
        folder: Where the parts are.
        inputs: The input.
        protected: The evaluation prompts that were protected.
        settings: What was asked for.
        outcome: What became of the rows.
    """
    parts = {}
    for name in (DOCUMENTS, *PARTS):
        if name in outcome.parts:
            part = outcome.parts[name]
            parts[name] = {
                "rows": part.rows,
                "prompts": len(part.prompts),
                "users": None if name == DOCUMENTS else len(part.users),
                "kinds": dict(sorted(part.kinds.items())),
                "labels": dict(sorted(part.labels.items())),
                "rows_with_personal_data": part.personal,
            }
    outputs = {}
    for file in sorted(folder.glob("*.*")):
        content = file.read_bytes()
        outputs[file.name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    manifest = {
        "inputs": [{"kind": item.kind, **described(item.source)} for item in inputs],
        "protected": [described(source) for source in protected],
        "settings": asdict(settings),
        "rows": outcome.rows,
        "left_out": dict(sorted(outcome.left_out.items())),
        "personal_data": dict(sorted(outcome.personal.items())),
        "parts": parts,
        "outputs": outputs,
    }
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return manifest | {"digest": hashlib.sha256(canonical.encode()).hexdigest()}


def described(source: Source) -> dict[str, Any]:
    """Return a source as JSON: its settings that are not the defaults, and its files' digests."""
    changed = {} if source.parts else changed_settings(source)
    if source.parts:
        changed["parts"] = [changed_settings(part) for part in source.parts]
    return {"source": source.name, **changed, "files": digests_of(source)}
