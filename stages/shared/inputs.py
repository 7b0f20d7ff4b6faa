"""Load the records of a stage and encode them within its length limits."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from data import sources
from data.encode import encode_prompts, encode_responses
from data.error_lines import shorten
from data.group_rows import (
    COLUMNS,
    ROWS_AT_ONCE,
    EncodedRanking,
    GroupRows,
    count_pairs,
    groups_of,
    read_groups,
    write_groups,
)
from data.groups import PromptGroup
from data.length_limit import LengthLimiter, LengthReport, equal_pairs, fit_lengths
from data.row_reader import records
from data.source import Loaded
from data.source import Source as ReaderSource
from data.streams import held_out
from pipeline.errors import UserError
from pipeline.stage import Source
from pipeline.store import integrity
from stages.settings.checks import reader_source
from stages.shared.data_notes import DataNotes
from stages.shared.row_cache import RowCache

COMMIT = re.compile("[0-9a-f]{40}")
"""A commit on the Hub, which always holds the same files."""


@dataclasses.dataclass(frozen=True)
class LengthLimit:
    """Say how long a row may be, and what happens to a longer one."""

    max_length: int
    """The most tokens of a row."""
    on_too_long: str
    """"error", "drop" or "truncate"."""
    section: str
    """The stage whose settings these are, for error lines."""


def load_records(kind: str, source: Source, notes: DataNotes | None = None) -> list:
    """Load the records of a kind (documents, demonstrations, …).

    Args:
        kind: The kind of record.
        source: Where they are, as `StageRun.source` gives it.
        notes: Where it is said what is not taken; None: nowhere.
    """
    return load_placed_records(kind, source, notes)[0]


def load_placed_records(kind: str, source: Source, notes: DataNotes | None = None) -> tuple[list, list[str]]:
    """Load records as `load_records` does, with the location (file and line) of each."""
    reader = reader_source(source)
    loaded = sources.load_whole(kind, reader)
    if notes is not None:
        notes.take_down(kind, reader.name, loaded)
    return loaded.records, loaded.locations


def stream_records(kind: str, source: Source) -> Iterator[Any]:
    """Yield the records of a kind one by one; at the end UserError with the errors of the data.

    Args:
        kind: The kind of record.
        source: Where they are.
    """
    loaded = Loaded()
    for _, record in sources.stream(kind, reader_source(source), loaded):
        yield record
    if loaded.errors:
        raise UserError(shorten(loaded.errors))


def split_documents(source: Source, fraction: float, notes: DataNotes | None = None) -> tuple[list, list]:
    """Load the documents and split them, in the same way for every stage of an experiment.

    Args:
        source: Where the documents are.
        fraction: The fraction to hold out (data.validation_fraction).
        notes: As of `load_records`.

    Returns:
        The documents to train on and the held-out ones.
    """
    documents = load_records("documents", source, notes)
    train, held = held_out([d.text for d in documents], fraction)
    return [documents[i] for i in train], [documents[i] for i in held]


@dataclasses.dataclass(frozen=True)
class GivenText:
    """Say where records of one kind are, and how many."""

    source: Source
    """Where they are."""
    rows: int | None
    """How many there are about, for progress; None if that is not known."""


def content_of(source: Source) -> dict[str, Any] | None:
    """Return what records depend on, as JSON values; None if the content of a part is not known.

    Args:
        source: Where they are.
    """
    for part in source.parts or (source,):
        if part.sha256 is None and not COMMIT.fullmatch(part.revision or ""):
            return None
    return json.loads(json.dumps(dataclasses.asdict(reader_source(source)), default=str))


def fit_prompts(
    tokenizer: Any, prompts: Iterable, places: list[str], limit: LengthLimit, response_length: int
) -> tuple[list[int], list[list[int]], LengthReport]:
    """Encode prompts that leave room for a response.

    Args:
        tokenizer: The tokenizer with its chat template.
        prompts: Prompts, each a string or a list of messages.
        places: The location of each, for error lines.
        limit: The limit of prompt and response together.
        response_length: Tokens that a response may take.

    Returns:
        Indices of the prompts that fit, their token ids, and a report on those that do not.
    """
    ids = encode_prompts(tokenizer, prompts, places)
    kept, ids, _, report = fit_lengths(
        ids,
        [[] for _ in ids],
        max_length=limit.max_length - response_length,
        # a prompt that is cut would be another prompt
        on_too_long="drop" if limit.on_too_long == "truncate" else limit.on_too_long,
        what="prompt",
        names=places,
        section=limit.section,
    )
    return kept, ids, report


def published(file: Path) -> ReaderSource:
    """Return the source of a file that a stage wrote.

    Its rows were checked when they were first read, so a chat template in them is text that was
    asked to be kept.
    """
    return ReaderSource(path=file, templated="keep")


def load_groups(
    file: Path,
    tokenizer: Any,
    limit: LengthLimit,
    cache: RowCache | None = None,
    with_ties: bool = False,
    with_labels: bool = False,
) -> tuple[Sequence[PromptGroup], LengthReport]:
    """Load rankings and encode each prompt with all its responses.

    A response that was cut off has no EOS: its score is read at its last token, as PPO and evaluate
    do with a sample that reached the length limit. Its log-probability is that of its own tokens.
    Rankings of the same responses by several labelers are one group, computed once.

    Args:
        file: Rankings as JSONL.
        tokenizer: The tokenizer with its chat template.
        limit: The limit of prompt and response together.
        cache: Where encoded rankings are kept, for a run that resumes or starts again; None: in
            memory only.
        with_ties: Whether to return groups that have ties only, too.
        with_labels: Whether to return groups with a label of a response, and no others.

    Returns:
        The groups with at least one usable pair, and a report on rows that were cut or dropped.

    Raises:
        UserError: No usable pair is left, or no label.
    """
    limiter = LengthLimiter(limit.max_length, limit.on_too_long, "ranking", limit.section)
    if cache is None:
        groups, report = (
            groups_of(encoded_rankings(file, tokenizer, limiter), with_ties, with_labels),
            limiter.finished(),
        )
    else:
        groups, report = cached_groups(file, tokenizer, limiter, cache, with_ties, with_labels)
    if with_labels and len(groups):
        return groups, report
    if not count_pairs(groups):
        problem = "no label and no usable pair" if with_labels else "no usable pair"
        problem += " (all ties, unjudged, dropped or equal within max_length)"
        raise UserError([f"{file}: {problem}; `rlhf data check {file} -c CONFIG` says more"])
    return groups, report


def cached_groups(
    file: Path, tokenizer: Any, limiter: LengthLimiter, cache: RowCache, with_ties: bool, with_labels: bool
) -> tuple[GroupRows, LengthReport]:
    """Return the groups of a file of rankings, encoded now or earlier.

    Args:
        file: Rankings as JSONL.
        tokenizer: The tokenizer with its chat template.
        limiter: The limit of prompt and response together.
        cache: Where encoded rankings are kept.
        with_ties: Whether to return groups that have ties only, too.
        with_labels: Whether to return groups with a label of a response, and no others.

    Returns:
        The groups, and the report on rows that were cut or dropped.
    """
    name = f"groups-{file.stem}"

    def write(paths: dict[str, Path]) -> dict:
        with file.open("rb") as handle:
            total = sum(1 for line in handle if line.strip())
        with cache.progress(file.stem, total) as note:
            write_groups(paths["arrow"], paths["index"], encoded_rankings(file, tokenizer, limiter, note))
        return dataclasses.asdict(limiter.finished())

    made_of = [integrity.sha256_file(file), [limiter.max_length, limiter.on_too_long], COLUMNS]
    report = cache.entry(name, ("arrow", "index"), made_of, write)
    groups = read_groups(cache.path(name, "arrow"), cache.path(name, "index"), with_ties, with_labels)
    return groups, LengthReport(**report)


def encoded_rankings(
    file: Path, tokenizer: Any, limiter: LengthLimiter, note: Callable[[int], None] = lambda count: None
) -> Iterator[EncodedRanking]:
    """Read and encode rankings, some at a time; those that are too long are left out or cut.

    Args:
        file: Rankings as JSONL.
        tokenizer: The tokenizer with its chat template.
        limiter: The limit of prompt and response together; its report counts rows that were cut.
        note: Called with the number of rankings so far, now and then.

    Raises:
        UserError: With the errors of the file, or of rows that are too long.
    """
    loaded, count = Loaded(), 0
    rows = records("rankings", published(file), loaded)
    while batch := list(islice(rows, ROWS_AT_ONCE)):
        names = [f"{place} ({ranking.id})" for place, ranking in batch]
        rankings = [ranking for _, ranking in batch]
        prompts = encode_prompts(tokenizer, (ranking.prompt for ranking in rankings), names)
        flat = iter(encode_responses(tokenizer, [answer for ranking in rankings for answer in ranking.answers]))
        responses = [list(islice(flat, len(ranking.responses))) for ranking in rankings]
        for i, prompt, group in zip(*limiter.fit(prompts, responses, names), strict=True):
            limiter.report.equal += [names[i]] * equal_pairs(rankings[i], group)
            row = EncodedRanking(prompt, group, rankings[i])
            limiter.report.ties += row.ties
            yield row
        count += len(batch)
        note(count)
    if loaded.errors:
        raise UserError(shorten(loaded.errors))
    limiter.finished()


def read_world(inputs: dict[str, Path]) -> dict | None:
    """Return world.json of the embedded world; None where the experiment does not use it.

    Args:
        inputs: The artifact folders that the stage reads, by stage.
    """
    if "world" not in inputs:
        return None
    return json.loads((inputs["world"] / "world.json").read_text(encoding="utf-8"))
