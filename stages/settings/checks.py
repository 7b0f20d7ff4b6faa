"""Check settings in ways that several stages share. Each check returns one line per mistake."""

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from pipeline.config.checks import PREFIX_TOKENS
from pipeline.config.section import Section
from pipeline.config.sections import local_folder
from pipeline.errors import UserError
from pipeline.fingerprints import source_of
from pipeline.launch.processes import rank_and_size_from_environment
from pipeline.stage import Source
from stages.settings.peft import peft_of
from stages.settings.training import batch_of_each

if TYPE_CHECKING:  # `status` and `--help` need no reader: it is imported where something is read
    from data.progress import Note
    from data.source import Source as ReaderSource
    from stages.settings.experiment import Experiment

ROWS_CHECKED = 200
"""Rows of a data set on the Hub that are read before anything runs; of a file, `rlhf doctor` reads
as many."""
NO_LIMIT = 10**12
"""A limit that no data set reaches: with a limit, rows of the Hub are streamed."""
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "seq_length")


def unreadable_files(experiment: "Experiment", kinds: list[str]) -> list[str]:
    """Return the errors in the first rows of the data files that the config names.

    Data on the Hub and data of the embedded world are not checked.

    Args:
        experiment: The validated experiment.
        kinds: The kinds of data to check.
    """
    lines: list[str] = []
    for kind in kinds:
        value = getattr(experiment.data, kind)
        ranked = experiment.ranked if kind == "rankings" else None
        is_there = value is not None and not (kind == "rankings" and experiment.waits_for_people)
        source = source_of(value, ranked) if is_there else None
        for part in () if source is None else source.parts or (source,):
            if part.path is not None:
                lines += errors_in_head(kind, reader_source(part))
    return lines


def check_data(kind: str, source: Source, note: "Note") -> list[str]:
    """Return the errors in a source: a file is read whole, of a data set on the Hub the first rows.

    Args:
        kind: Kind of data.
        source: The source; not a mixture.
        note: Is told how far reading is.
    """
    from data import sources
    from data.error_lines import shorten

    reader = reader_source(source)
    if source.hub is not None:
        return errors_in_head(kind, dataclasses.replace(reader, limit=reader.limit or NO_LIMIT))
    return shorten(sources.scan(kind, reader, note=note).errors)


def errors_in_head(kind: str, source: "ReaderSource") -> list[str]:
    """Return the error lines of the first rows of a source.

    Args:
        kind: Kind of data.
        source: The source.
    """
    from data import sources

    try:
        sources.load_first(kind, source, max_rows=ROWS_CHECKED)
    except UserError as error:
        return error.lines
    return []


def reader_source(source: Source) -> "ReaderSource":
    """Return a source of the pipeline as the reader in `data` takes it."""
    from data.source import Source as ReaderSource

    names = [field.name for field in dataclasses.fields(source) if field.name not in ("reading", "parts")]
    settings: dict[str, Any] = {name: getattr(source, name) for name in names}
    for name, value in source.reading.items():
        settings[name] = tuple(value) if isinstance(value, list) else value
    return ReaderSource(**settings, parts=tuple(reader_source(part) for part in source.parts))


def context_of(config: dict[str, Any]) -> int | None:
    """Return the context length that a model's config.json states; None if it states none.

    Of a model with a language model inside, that part's length counts.
    """
    for part in (config.get("text_config") or {}, config):
        for name in CONTEXT_KEYS:
            if part.get(name):
                return part[name]
    return None


def too_long_for(
    context: int | None, section: Section, stage: str, *lengths: str, from_scratch: bool = False, ahead: int = 0
) -> list[str]:
    """Return a line for each length that is larger than the model's context.

    Args:
        context: The model's context, in tokens; None if it is unknown.
        section: The stage's section.
        stage: Its name.
        *lengths: Settings to check besides max_length.
        from_scratch: Whether the config itself sets the context.
        ahead: Tokens of a prefix, whose places a text cannot have.
    """
    if context is None:
        return []
    context -= ahead
    lines, behind = [], f" behind a prefix of {ahead}" if ahead else ""
    for key in ("max_length", *lengths):
        length = getattr(section, key)
        if length > context:
            remedy = f"set {stage}.{key} to {context} or less"
            if from_scratch:
                remedy += ", or raise model.max_position_embeddings"
            lines.append(
                f"{stage}.{key}: {length} tokens is more than the model's context of {context}{behind}; {remedy}"
            )
    return lines


def prefix_tokens(experiment: "Experiment", stage: str) -> int:
    """Return how many tokens of a model's context a prefix takes in a stage.

    Args:
        experiment: The validated experiment.
        stage: The stage; `base` trains no prefix.
    """
    peft = peft_of(experiment, stage)
    if peft is None or peft.method != "prefix_tuning" or stage == "base":
        return 0
    return peft.num_virtual_tokens or PREFIX_TOKENS


def over_context(experiment: "Experiment", stage: str, *lengths: str) -> list[str]:
    """Return a line for each length over the context of a model that is trained from scratch.

    Args:
        experiment: The validated experiment.
        stage: The stage whose lengths are checked.
        *lengths: Its settings to check besides max_length.
    """
    if experiment.model.name_or_path is not None:
        return []
    context = experiment.model.max_position_embeddings
    section, ahead = getattr(experiment, stage), prefix_tokens(experiment, stage)
    return too_long_for(context, section, stage, *lengths, from_scratch=True, ahead=ahead)


def over_folder_context(experiment: "Experiment", stage: str, *lengths: str) -> list[str]:
    """Return a line for each length over the context of a base model in a local folder.

    Args:
        experiment: The validated experiment.
        stage: The stage whose lengths are checked.
        *lengths: Its settings to check besides max_length.
    """
    context = folder_context(experiment.model.name_or_path)
    return too_long_for(context, getattr(experiment, stage), stage, *lengths, ahead=prefix_tokens(experiment, stage))


def folder_context(model: str | None) -> int | None:
    """Return the context length of a base model in a local folder.

    Args:
        model: Value of model.name_or_path.

    Returns:
        The length in tokens; None if the model is not a local folder or states none.
    """
    folder = local_folder(model)
    if folder is None or not (folder / "config.json").is_file():
        return None
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError:  # the stage `base` reports it
        return None
    return context_of(config) if isinstance(config, dict) else None


def no_room_for_prompt(experiment: "Experiment", stage: str) -> list[str]:
    """Return a line if a stage's response_length leaves no room for a prompt."""
    section = getattr(experiment, stage)
    if section.response_length < section.max_length:
        return []
    return [
        f"{stage}.response_length: {section.response_length} leaves no room for a prompt in {stage}.max_length "
        f"{section.max_length}; lower {stage}.response_length or raise {stage}.max_length"
    ]


def uneven_batches(experiment: "Experiment", stage: str) -> list[str]:
    """Return a line if the processes cannot split the batch of a stage that trains on text."""
    section = getattr(experiment, stage)
    size, accumulated = section.per_device_train_batch_size, section.gradient_accumulation_steps
    launch = experiment.launch
    started = max(launch.processes * launch.nodes, rank_and_size_from_environment()[1])
    processes = max(1, started // launch.together)
    try:
        batch_of_each(size, accumulated, processes)
    except ValueError:
        whom = "processes" if launch.together == 1 else f"groups of {launch.together} processes"
        return [
            f"{stage}.per_device_train_batch_size: {size} times gradient_accumulation_steps {accumulated} cannot be "
            f"split among {processes} {whom}; make one of the two a multiple of that"
        ]
    return []
