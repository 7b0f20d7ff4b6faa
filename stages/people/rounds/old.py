"""Keep a stated share of what earlier rounds trained on, and name it as the next config does."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data import sources
from data.error_lines import shorten
from data.records import Demonstration, Document, Prompt, Ranking, prompt_key, write_jsonl
from data.source import Loaded
from data.source import Source as ReaderSource
from data.streams import position_of
from pipeline.errors import UserError
from pipeline.fingerprints import source_of
from pipeline.store.artifacts import ArtifactStore
from stages.people.rounds.gather import Row, rows_of
from stages.settings.checks import reader_source

if TYPE_CHECKING:
    from stages.settings.experiment import Experiment

Prompted = Demonstration | Ranking | Prompt
"""Records that have a prompt."""
TRAINED = ("train.jsonl", "judge.jsonl")
"""Files of the stage rankings that go on. Its validation rows never train, in no later round."""


def stays(key: str, share: float, seed: int) -> bool:
    """Return whether the rows of a prompt stay, the same for all rows of one prompt.

    Args:
        key: The key of the prompt.
        share: The share of prompts that stay.
        seed: The experiment's seed.
    """
    return position_of(f"stays {seed} {key}") < share


def old_rankings(rankings: Path | None, share: float, seed: int, gone: set[str]) -> Iterator[Row]:
    """Yield the rankings that a round trained on and that stay.

    Args:
        rankings: The folder of its stage rankings; None: it has none.
        share: The share of prompts whose rankings stay.
        seed: The experiment's seed.
        gone: Ids of rankings that their labeler or the lead has taken back since.
    """
    if rankings is None:
        return
    for name in TRAINED:
        for row in rows_of(rankings / name):
            if row["id"] not in gone and stays(prompt_key(row["prompt"]), share, seed):
                yield row


def source_in(experiment: "Experiment", store: ArtifactStore, kind: str) -> ReaderSource | None:
    """Return where an experiment's records of a kind are; None where the config gives none.

    Args:
        experiment: The validated experiment.
        store: Its artifacts, which hold the world's files.
        kind: demonstrations, prompts or evaluation_prompts.
    """
    value = getattr(experiment.data, kind)
    if value is None:
        return None
    if value == "world":
        return ReaderSource(path=store.folder("world") / f"{kind}.jsonl")
    return reader_source(source_of(value))


def read(kind: str, source: ReaderSource | None) -> Iterator[Prompted]:
    """Yield the records of a source that have a prompt; none of no source.

    Raises:
        UserError: With the errors of the data.
    """
    if source is None:
        return
    loaded = Loaded()
    for _, record in sources.stream(kind, source, loaded):
        assert not isinstance(record, Document), "this kind has prompts"
        yield record
    if loaded.errors:
        raise UserError(shorten(loaded.errors))


def is_mixed(value: Any) -> bool:
    """Return whether a value of the section data has weights, which another part would change."""
    parts = value if isinstance(value, list) else [value]
    return any(getattr(part, "weight", None) is not None for part in parts)


def write_share(file: Path, kind: str, found: Iterable[Prompted], share: float, seed: int) -> int:
    """Write the records that stay, and return how many they are.

    Args:
        file: The file.
        kind: demonstrations or prompts.
        found: The records.
        share: The share of prompts that stay.
        seed: The experiment's seed.
    """
    kept = [record for record in found if stays(prompt_key(record.prompt), share, seed)]
    if not kept:
        raise UserError(f"rounds.old.{kind}: {share:g} leaves no row of the earlier rounds; raise it")
    write_jsonl(file, kept)
    return len(kept)
