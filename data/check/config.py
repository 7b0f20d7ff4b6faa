"""Take from a validated config what checking data needs: files, parts, limits and the tokenizer.

`experiment` is the pipeline's validated config, of which only attributes are read: `data` can know
neither its class nor the stages' settings.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, fields, replace
from glob import has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.check.report import Limits
from data.conversations import end_of_turn
from data.files.tables import first_line
from data.forms import FORMS, PROMPT_KINDS
from data.source import Source
from data.template_text import with_variables
from data.turns import Turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

READERS = {
    "documents": ("base",),
    "demonstrations": ("sft",),
    "rankings": ("rm", "dpo"),
    "prompts": ("ppo",),
    "evaluation_prompts": ("evaluate",),
}
"""Kind of data → the sections of the config whose length limits hold for it."""
RANKED, RANKED_FILE = "ranked", Path("people", "ranked", "rankings.jsonl")
"""What a config calls the rankings that people made here, and where they are in its folder."""
HUB_ROWS = 200
"""Rows of a data set on the Hub that are looked at without a limit."""


@dataclass(frozen=True)
class Input:
    """Name an input of the command line, and how it is read."""

    source: Source
    """Where the rows come from; how they are read as far as the command line says."""
    given: tuple[str, ...] = ()
    """The settings of the source that the command line gives."""
    max_rows: int | None = None
    """The number of rows to read; None: all of them."""


def sources_of(experiment: Any, home: Path) -> dict[str, Source]:
    """Return {kind: where its records come from}; a kind that is null is left out.

    Args:
        experiment: The validated config.
        home: The folder of the experiment's artifacts, where the embedded world's files are.
    """
    sources = {}
    for kind in FORMS:
        value = getattr(experiment.data, kind, None)
        if value == "world":
            sources[kind] = Source(path=home / "world" / f"{kind}.jsonl")
        elif value is not None:
            source = source_of(value)
            sources[kind] = with_ranked(source, home) if kind == "rankings" else source
    return sources


def with_ranked(source: Source, home: Path) -> Source:
    """Return a source of rankings in which "ranked" is the snapshot of what people ranked.

    Args:
        source: The source, or a mixture.
        home: The folder of the experiment's artifacts.
    """
    if source.parts:
        return replace(source, parts=tuple(with_ranked(part, home) for part in source.parts))
    if RANKED not in (source.hub, str(source.path)):
        return source
    # People judge texts as they are, so a chat template in one is a part of it.
    return replace(source, hub=None, path=home / RANKED_FILE, templated=source.templated or "keep")


def source_of(value: Any) -> Source:
    """Return the source that a value of the config's section `data` names.

    Args:
        value: A path or Hub id, an object with `path` and how to read it, or a list of such.
    """
    if isinstance(value, list):
        return Source(parts=tuple(source_of(part) for part in value))
    text = value if isinstance(value, str) else value.path
    path = Path(text).expanduser()
    place: dict[str, Any] = {"path": path} if path.exists() or has_magic(text) else {"hub": text}
    if isinstance(value, str):
        return Source(**place)
    for field in fields(Source):
        if field.name not in ("path", "hub", "sha256", "parts") and hasattr(value, field.name):
            given = getattr(value, field.name)
            place[field.name] = tuple(given) if isinstance(given, list) else given
    return Source(**place)


def limits_of(experiment: Any, kind: str | None, tokenizer: PreTrainedTokenizerBase | None = None) -> Limits:
    """Return the limits that a config sets for a kind of data.

    Args:
        experiment: The validated config.
        kind: The kind of data; None if it is not known.
        tokenizer: What lengths are counted with, or None.

    Returns:
        The limits. max_length and on_too_long are None if nothing is limited; response_length only
        of demonstrations, and if there are prompts for PPO.
    """
    sections = [getattr(experiment, name, None) for name in READERS.get(kind or "", ())]
    limited: list[Any] = [section for section in sections if getattr(section, "max_length", None) is not None]
    max_length, on_too_long = None, None
    if limited:
        section = min(limited, key=lambda section: section.max_length)  # the strictest decides
        max_length, on_too_long = section.max_length, getattr(section, "on_too_long", None)
        if kind in PROMPT_KINDS:
            max_length -= getattr(section, "response_length", 0)
    limits = Limits(tokenizer, max_length, on_too_long)
    if kind != "demonstrations":
        return limits
    response_length = None
    if getattr(experiment.data, "prompts", None) is not None:
        response_length = getattr(getattr(experiment, "ppo", None), "response_length", None)
    turns: Turns = getattr(getattr(experiment, "sft", None), "turns", "all")
    return replace(limits, response_length=response_length, turns=turns)


def tokenizer_of(experiment: Any, home: Path) -> tuple[PreTrainedTokenizerBase | None, str]:
    """Load the tokenizer of the published base model, otherwise that of model.name_or_path.

    Args:
        experiment: The validated config.
        home: The folder of the experiment's artifacts.

    Returns:
        The tokenizer, or None if there is none on this machine; and a note that says which it is,
        or
        why there is none.
    """
    model_name = getattr(experiment.model, "name_or_path", None)
    template = getattr(experiment.model, "chat_template", None)
    variables = getattr(experiment.model, "chat_template_kwargs", None)
    published = home / "base" / "model"
    folders = [published]
    if model_name:
        folders.append(Path(model_name).expanduser())
    if template is not None or variables is not None:
        folders.reverse()  # base's tokenizer may be older than these settings
    folder = next((folder for folder in folders if folder.is_dir()), None)
    options: dict[str, str] = {}
    if folder is None and model_name and (packaged := packaged_gguf(model_name)) is not None:
        folder, options = packaged.parent, {"gguf_file": packaged.name}
    if folder is None:
        return None, "none on this machine yet (`base` publishes it); lengths are in words"
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
        if folder != published:
            prepare_as_base_does(tokenizer, template, variables)
    except Exception as error:  # the tokenizers library raises nothing finer, and a template anything
        return None, f"{folder} cannot be loaded ({first_line(error)}); lengths are in words"
    if tokenizer.chat_template is None or tokenizer.eos_token_id is None:
        return None, f"{folder} has no chat template or no EOS; lengths are in words"
    return tokenizer, str(folder)


def packaged_gguf(name: str) -> Path | None:
    """Return the gguf file of a model that an installed Python package carries.

    Args:
        name: The value of model.name_or_path, package:NAME for example.

    Returns:
        The file; None if the name is no package, or it is not installed.
    """
    if not name.startswith("package:"):
        return None
    spec = importlib.util.find_spec(name.removeprefix("package:").replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        return None
    return next(Path(next(iter(spec.submodule_search_locations))).glob("*.gguf"), None)


def prepare_as_base_does(tokenizer: PreTrainedTokenizerBase, template: str | None, variables: dict | None) -> None:
    """Give a tokenizer the chat template and the EOS with which `base` will publish it.

    Args:
        tokenizer: The tokenizer of the model that `base` starts from.
        template: The file that model.chat_template names.
        variables: model.chat_template_kwargs.
    """
    if template is not None:
        tokenizer.chat_template = Path(template).expanduser().read_text(encoding="utf-8")
    if tokenizer.chat_template is None:
        return
    if variables:
        tokenizer.chat_template = with_variables(tokenizer.get_chat_template(), variables)
    tokenizer.eos_token = end_of_turn(tokenizer) or tokenizer.eos_token
