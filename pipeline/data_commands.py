"""Run `rlhf data check | preview | stats | convert | export | prepare`.

Each function takes parsed arguments and returns an exit code. What the files hold is the business
of the room `data`; here it is decided which files are meant, and how the config and the command
line say they are read.
"""

import argparse
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline import api
from pipeline.api import Location
from pipeline.config.sections import is_hub_id
from pipeline.data_arguments import parse_reading
from pipeline.data_progress import reading_line
from pipeline.errors import UserError


def check_action(arguments: argparse.Namespace) -> int:
    """Run `rlhf data check`: report on files, or on all data of an experiment."""
    experiment, inputs = prepared(arguments, "check")
    check = importlib.import_module("data.check.command")
    artifacts = folder_of(arguments)
    over = lengths_over_context(experiment, artifacts)
    if arguments.file:
        return check.run(inputs, arguments.kind, experiment, artifacts=artifacts, errors=over, watch=reading_line)
    return check.run_all(experiment, artifacts=artifacts, errors=over, watch=reading_line)


def preview_action(arguments: argparse.Namespace) -> int:
    """Run `rlhf data preview`: show rows as the model sees them."""
    experiment, inputs = prepared(arguments, "preview")
    preview = importlib.import_module("data.tools.preview")
    if arguments.n < 1:
        raise UserError(f"command line: -n {arguments.n} shows no row; give 1 or more")
    choice = preview.Choice(number=arguments.n, seed=arguments.seed, row=arguments.row)
    return preview.run(inputs, arguments.kind, experiment, choice, folder_of(arguments), reading_line)


def stats_action(arguments: argparse.Namespace) -> int:
    """Run `rlhf data stats`: count what data hold, and draw histograms."""
    experiment, inputs = prepared(arguments, "stats")
    stats = importlib.import_module("data.tools.stats")
    page = None if arguments.html is None else free_path(arguments.html, arguments.force)
    return stats.run(inputs, arguments.kind, experiment, page, folder_of(arguments), reading_line)


def convert_action(arguments: argparse.Namespace) -> int:
    """Run `rlhf data convert`: write data of any form as our records."""
    experiment, inputs = prepared(arguments, "convert")
    output = free_path(arguments.output, arguments.force)
    if output.suffix != ".jsonl":
        raise UserError(f"{output}: records are written as JSON lines; give a name that ends in .jsonl")
    convert = importlib.import_module("data.tools.convert")
    return convert.run(inputs, arguments.kind, arguments.to, output, experiment, folder_of(arguments), reading_line)


def export_action(arguments: argparse.Namespace) -> int:
    """Run `rlhf data export`: write rankings as tasks for people."""
    experiment, inputs = prepared(arguments, "export")
    output = free_path(arguments.output, arguments.force)
    export = importlib.import_module("data.tools.export")
    request = export.Request(tool=arguments.to, output=output, seed=arguments.seed)
    return export.run(inputs, arguments.kind, request, experiment, folder_of(arguments), reading_line)


def prepare_action(arguments: argparse.Namespace) -> int:
    """Run `rlhf data prepare`: sift data and split them by user."""
    settings = importlib.import_module("data.prepare.settings")
    asked = settings.Settings(
        personal=arguments.pii,
        region=arguments.region,
        per_user=arguments.per_user,
        prefix=arguments.prefix,
        near=arguments.near,
        drop_leaks=arguments.drop_leaks,
        shares=settings.parse_shares(arguments.shares),
    )
    reading = {name: tuple(v) if isinstance(v, list) else v for name, v in parse_reading(arguments.reading).items()}
    return importlib.import_module("data.prepare.command").run(
        arguments.file,
        arguments.output,
        asked,
        arguments.kind,
        load_if_given(arguments),
        folder_of(arguments),
        arguments.force,
        reading,
        watch=reading_line,
    )


ACTIONS: dict[str, Callable[[argparse.Namespace], int]] = {
    "check": check_action,
    "preview": preview_action,
    "stats": stats_action,
    "convert": convert_action,
    "export": export_action,
    "prepare": prepare_action,
}


# ── what the words mean ──────────────────────────────────────────────────────────────────────────


def prepared(arguments: argparse.Namespace, action: str) -> tuple[Any, list[Any]]:
    """Return the experiment, or None, and the inputs: where each is, and how it is read.

    Args:
        arguments: The parsed arguments.
        action: Name of the action, for error lines.

    Raises:
        UserError: The words contradict each other, or name nothing.
    """
    reading = parse_reading(arguments.reading)
    experiment = load_if_given(arguments)
    if not arguments.file:
        help_line = f"see `rlhf data {action} --help`"
        if experiment is None:
            raise UserError(f"command line: give a FILE, or -c CONFIG for all its data; {help_line}")
        if arguments.kind is not None:
            raise UserError(f"command line: --kind needs a FILE; {help_line}")
        if reading:
            raise UserError(
                f"command line: {arguments.reading[0]!r} says how a file is read, and no FILE is given; give one, or "
                f"set it in the config (data.rankings.{arguments.reading[0].partition('.')[0]})"
            )
    is_look = action in ("check", "preview", "stats")
    return experiment, [input_of(text, reading, is_look) for text in arguments.file]


def input_of(text: str, reading: dict[str, Any], is_look: bool) -> Any:
    """Return an input of the command line: where it is, and how it is read.

    Args:
        text: A path, a glob or the id of a data set on the Hub.
        reading: Settings of a source that are given.
        is_look: Whether the first rows of a data set on the Hub will do.
    """
    source_module = importlib.import_module("data.source")
    config = importlib.import_module("data.check.config")
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in reading.items()}
    if is_hub_id(text):
        if not is_look or "limit" in settings:
            return config.Input(source_module.Source(hub=text, **settings), tuple(settings), None)
        source = source_module.Source(hub=text, **settings, limit=config.HUB_ROWS)  # with a limit it is streamed
        return config.Input(source, tuple(settings), config.HUB_ROWS)
    return config.Input(source_module.Source(path=Path(text).expanduser(), **settings), tuple(settings), None)


def allow_hub(texts: list[str]) -> None:
    """Let the libraries reach the Hub if an input names it; otherwise they stay offline.

    Args:
        texts: Paths, globs and ids of data sets on the Hub.
    """
    if any(is_hub_id(text) for text in texts):
        os.environ.setdefault("HF_HUB_OFFLINE", "0")


def load_if_given(arguments: argparse.Namespace) -> Any:
    """Load the experiment if -c names one; otherwise set the usual environment and return None."""
    allow_hub(arguments.file)
    if arguments.config is not None:
        return api.load_experiment(arguments.config, *arguments.overrides)
    from pipeline.launch import environment

    environment.set_environment({})
    return None


def folder_of(arguments: argparse.Namespace) -> str:
    """Return the folder of all experiments on this machine."""
    return str(Location.of(arguments.artifacts).folder)


def free_path(text: str, force: bool) -> Path:
    """Return a path that may be written.

    Args:
        text: The path.
        force: Whether it may be replaced.

    Raises:
        UserError: It exists, or there is no folder for it.
    """
    path = Path(text).expanduser()
    if path.exists() and not force:
        raise UserError(f"{path}: exists; give another name, or replace it with --force")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.absolute().parent}; make it first")
    return path


def lengths_over_context(experiment: Any, artifacts: str) -> list[str]:
    """Return a line for each length of a config that its model cannot take, as `rlhf run` does.

    Args:
        experiment: The validated experiment, or None.
        artifacts: The folder of all experiments.
    """
    if experiment is None:
        return []
    context = importlib.import_module("stages.settings.context")
    return context.lengths_over_context(experiment, artifacts)
