"""Checks of settings that several stages share: each returns lines, one for each mistake."""

import json
from functools import lru_cache
from pathlib import Path

from data import sources
from pipeline.config.sections import local_folder
from pipeline.errors import UserError
from pipeline.fingerprints import source_of
from pipeline.launch.processes import place_in_environment
from stages.settings.training import batch_of_each


def unreadable(experiment, kinds: list[str]) -> list[str]:
    """What is wrong with the first rows of the files that the config names for these kinds, a line each: told before
    anything runs, for the stage that reads them may come after hours."""
    found = []
    for kind in kinds:
        value = getattr(experiment.data, kind)
        source = None if value is None else source_of(value)
        if source is not None and source.path is not None:  # the Hub is not asked for rows, and the world's are ours
            facts = source.path.stat()
            found += faults_in_head(kind, source.path, source.skip, source.limit, (facts.st_mtime_ns, facts.st_size))
    return found


@lru_cache(maxsize=8)  # several stages read the same files
def faults_in_head(kind: str, path: Path, skip: int, limit: int | None, state: tuple) -> tuple[str, ...]:
    """Error lines of a file's first 200 rows after `skip`. state: of the file, so that another is read again."""
    try:
        sources.load_first(kind, path, limit, skip, most=200)
    except UserError as fault:
        return tuple(fault.lines)
    return ()


def context_of(config: dict) -> int | None:
    """The longest row that a model reads, as its config.json names it (of one with a language model inside: there);
    None where it does not."""
    names = ("max_position_embeddings", "n_positions", "seq_length")
    known = (part.get(name) for part in (config.get("text_config") or {}, config) for name in names)
    return next(filter(None, known), None)


def beyond_context(experiment, stage: str, *lengths: str) -> list[str]:
    """Return a line for each length of a stage that is more than the given model reads, where that is a folder of this
    machine: told before anything runs. lengths: settings of the stage beside max_length."""
    folder = local_folder(experiment.model.name_or_path)
    if folder is None or not (folder / "config.json").is_file():
        return []
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError:  # base says so
        return []
    context = context_of(config) if isinstance(config, dict) else None
    return too_long_for(context, getattr(experiment, stage), stage, *lengths)


def too_long_for(context: int | None, section, stage: str, *lengths: str) -> list[str]:
    """Return a line for each length of a stage's section that is more than the model's context in tokens; None: it is
    not known."""
    asked = {key: getattr(section, key) for key in ("max_length", *lengths)}
    return [
        f"{stage}.{key}: {length} tokens, and the model's context is {context}; set {stage}.{key} to {context} or less"
        for key, length in asked.items()
        if context is not None and length > context
    ]


def over_context(experiment, stage: str, *lengths: str) -> list[str]:
    """Lines for lengths over the context of a model from scratch (a pretrained one's is known when it is loaded)."""
    if experiment.model.name_or_path is not None:
        return []
    context, config = experiment.model.max_position_embeddings, getattr(experiment, stage)
    return [
        f"{stage}.{key}: {getattr(config, key)} is over the context {context} of the model; lower it, or raise "
        f"model.max_position_embeddings"
        for key in ("max_length", *lengths)
        if getattr(config, key) > context
    ]


def no_room(experiment, stage: str) -> list[str]:
    """A line if response_length leaves no room for a prompt."""
    c = getattr(experiment, stage)
    what = (
        f"{c.response_length} leaves no room for a prompt in {stage}.max_length {c.max_length}; lower "
        f"{stage}.response_length or raise {stage}.max_length"
    )
    return [f"{stage}.response_length: {what}"] if c.response_length >= c.max_length else []


def reward_models(experiment) -> list[str]:
    """Return the folders of the models that rm trains, in their order: model, ensemble/1, …, held_out/model."""
    c = experiment.rm
    held_out = experiment.data.rankings is not None if c.held_out is None else c.held_out
    return ["model", *(f"ensemble/{k}" for k in range(1, c.ensemble)), *["held_out/model"] * held_out]


def uneven(experiment, stage: str) -> list[str]:
    """A line if `launch.processes` cannot share the batch of a stage that trains on text."""
    c = getattr(experiment, stage)
    processes = max(experiment.launch.processes * experiment.launch.nodes, place_in_environment()[1])
    try:
        batch_of_each(c.per_device_train_batch_size, c.gradient_accumulation_steps, processes)
    except ValueError:
        what = f"{c.per_device_train_batch_size} times gradient_accumulation_steps {c.gradient_accumulation_steps}"
        return [f"{stage}.per_device_train_batch_size: {what} cannot be shared by {processes} processes; make one of "
                f"them a multiple of that"]  # fmt: skip
    return []
