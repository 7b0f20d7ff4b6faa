"""Pass new rows through `rlhf data prepare`: copies, users, personal data, evaluation prompts."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.prepare.command import sift
from data.prepare.personal import need_packages
from data.prepare.reading import Input
from data.prepare.settings import Settings
from data.records import Document, prompt_key, write_jsonl
from data.row_reader import records
from data.source import Loaded, Source
from pipeline.errors import UserError
from stages.people.rounds.gather import Row, rows_of
from stages.people.rounds.old import Prompted
from stages.settings.rounds import RoundsSettings

BEFORE = "an earlier round has it"
"""Why a row is left out that is not new."""


@dataclass
class Sifted:
    """Hold what became of the new rows of a kind."""

    parts: dict[str, list[Row]] = field(default_factory=dict)
    """Part of `data prepare` (sft, rm or ppo) → its rows."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Reason → rows."""

    def part(self, name: str) -> list[Row]:
        """Return the rows of a part."""
        return self.parts.get(name, [])


def check_packages(settings: RoundsSettings) -> None:
    """Raise UserError if personal data cannot be looked for, naming the setting and not a flag."""
    if settings.personal == "off":
        return
    try:
        need_packages(settings.region)
    except UserError as error:
        lines = [line.replace("--pii off", "rounds.personal: off") for line in error.lines]
        lines = [line.replace("--pii:", "rounds.personal:").replace("--region:", "rounds.region:") for line in lines]
        raise UserError(lines) from None


def shares_of(kind: str, settings: RoundsSettings) -> dict[str, float]:
    """Return the shares of the parts that new rows of a kind go to.

    Args:
        kind: prompts, demonstrations or rankings.
        settings: The section rounds.
    """
    shares = dict.fromkeys(("sft", "rm", "ppo", "validation", "test"), 0.0)
    if kind == "prompts":
        return shares | {"sft": settings.demonstrations, "rm": settings.rankings, "ppo": settings.prompts}
    return shares | {"sft" if kind == "demonstrations" else "rm": 1.0}


def sift_rows(
    kind: str, rows: Sequence[Row], folder: Path, settings: RoundsSettings, protected: list[Source], known: set[str]
) -> Sifted:
    """Sift the new rows of a kind.

    Args:
        kind: prompts, demonstrations or rankings.
        rows: The rows.
        folder: An empty folder; gets the ledger of what is left out, and where personal data is.
        settings: The section rounds.
        protected: Evaluation prompts, which training must not hold.
        known: Keys (`record_key`) of what earlier rounds have.

    Returns:
        The rows that are left, as records, by part.
    """
    found = Sifted()
    if not rows:
        return found
    file = folder / f"new_{kind}.jsonl"
    write_jsonl(file, rows)
    source, loaded, new = Source(path=file, templated="keep"), Loaded(), []
    for _, record in records(kind, source, loaded):
        assert not isinstance(record, Document), "this kind has prompts"
        if record_key(record) in known:
            found.left_out[BEFORE] += 1
        else:
            new.append(record)
    if loaded.errors:
        raise UserError(loaded.errors)
    if loaded.duplicates:
        found.left_out["duplicate"] += loaded.duplicates
    if not new:
        return found
    write_jsonl(file, new)
    is_label = kind != "prompts"  # judgments of two turns of a conversation, or of like prompts, are two
    asked = Settings(
        personal=settings.personal,
        region=settings.region,
        per_user=settings.per_user,
        prefix=0 if is_label else Settings.prefix,
        near=0.0 if is_label else settings.near,
        drop_leaks=True,
        shares=shares_of(kind, settings),
    )
    outcome = sift(folder, [Input(kind, source)], protected, asked)
    found.left_out += outcome.left_out
    for part in ("sft", "rm", "ppo"):
        found.parts[part] = list(rows_of(folder / f"{part}.jsonl"))
    return found


def record_key(record: Prompted) -> str:
    """Return what two equal records share: the prompt, and what is answered to it."""
    answer = getattr(record, "completion", None) or [getattr(record, name, None) for name in ("responses", "ranks")]
    return json.dumps([prompt_key(record.prompt), answer, getattr(record, "labeler", None)], default=list)


def keys_of(found: Iterable[Prompted]) -> set[str]:
    """Return the keys of records."""
    return {record_key(record) for record in found}
