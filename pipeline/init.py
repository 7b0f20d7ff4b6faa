"""Write a short config for a base model and data files: the command `rlhf init`."""

import argparse
import importlib
import json
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import api, hints
from pipeline.errors import UserError

if TYPE_CHECKING:
    from stages.settings.experiment import Experiment

HEADER = "# Every setting: configs/SETTINGS.md, or `rlhf run STAGE --help`."
PLAIN = re.compile(r"[A-Za-z./][A-Za-z0-9_./+-]*")  # text that YAML takes for a string without quotes
WORDS = {"null", "true", "false"}
TEXT_LENGTHS = ("ptx_length", "perplexity_length")  # lengths of rows of data.documents


def init_command(arguments: argparse.Namespace) -> int:
    """Run `rlhf init`: write a short config that works."""
    path = Path(arguments.output)
    if path.exists():
        raise UserError(f"{path}: exists and is not overwritten; choose another file with -o")
    name, data = name_from(path), guess_kinds(arguments.data)
    experiment, wanted = check_composed(compose(name, arguments.model, data, arguments.device), str(path))
    lengths = lengths_that_fit(experiment, wanted)
    text = compose(name, arguments.model, data, arguments.device, lengths)
    check_composed(text, str(path))
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another file with -o") from None
    print(text)
    words = shlex.join(["-c", str(path)])
    look = f"{hints.program()} data check {words}, then " if data else ""
    print(f"written to {path}; next: {look}{hints.program()} run {list(api.stages())[-1]} {words}")
    return 0


def check_composed(text: str, source: str) -> "tuple[Experiment, list[str]]":
    """Validate a composed config and check that it names all data that its stages read.

    Args:
        text: The YAML.
        source: The file to which it will be written.

    Returns:
        The experiment, and the stages that its last stage needs, in order.

    Raises:
        UserError: With a line for each mistake, which names the argument of `rlhf init`.
    """
    from pipeline.chain import missing_data_of, wanted_stages
    from pipeline.config.yaml_tree import parse_tree

    stages = api.stages()
    try:
        experiment = api.validate(parse_tree(text, source))
        wanted = wanted_stages(experiment, stages)
        ordered = [name for name in stages if name in wanted]
        lines = missing_data_of(ordered, stages, experiment)
    except UserError as error:
        lines = error.lines
    if lines:
        raise UserError(lines_about_arguments(lines, source))
    return experiment, ordered


def lines_about_arguments(lines: Iterable[str], source: str) -> list[str]:
    """Return error lines that name arguments, not places in a file that does not exist yet.

    Args:
        lines: Lines "FILE:LINE: section.key: what is wrong", or without FILE:LINE.
        source: The file.
    """
    named = []
    for line in lines:
        line = re.sub(rf"^{re.escape(source)}(:\d+)?: ", "", line)
        line = re.sub(r"^model\.name_or_path: ", "--model: ", line)
        named.append(re.sub(r"^data\.(\w+): ", r"--data: \1: ", line))
    return named


def lengths_that_fit(experiment: "Experiment", stages: list[str]) -> dict[str, dict[str, int]]:
    """Return the lengths to write because the base model's context is below their defaults.

    A response gets at most half of the context, so that a prompt fits before it.

    Args:
        experiment: The experiment with the defaults.
        stages: The stages that will run.

    Returns:
        stage → setting → length; {} if the context is large enough or unknown.
    """
    checks = importlib.import_module("stages.settings.checks")
    context = checks.folder_context(experiment.model.name_or_path)
    if context is None:
        return {}
    keys = ("max_length",) if experiment.data.documents is None else ("max_length", *TEXT_LENGTHS)
    unread = {"base"}  # a base model in a folder is not trained
    if experiment.data.rankings is not None:
        unread.add("rankings")  # people ranked, so nothing is sampled
    lengths: dict[str, dict[str, int]] = {}
    for stage in stages:
        if stage in unread:
            continue
        section = getattr(experiment, stage).model_dump()
        fitting = {key: context for key in keys if section.get(key, 0) > context}
        if section.get("response_length", 0) > context // 2:
            fitting["response_length"] = context // 2
        if fitting:
            lengths[stage] = fitting
    return lengths


def guess_kinds(paths: list[str]) -> dict[str, list[str]]:
    """Return the data files, folders and globs of each kind, as `rlhf data check` guesses kinds.

    Raises:
        UserError: If a kind cannot be guessed.
    """
    inspect_file = importlib.import_module("data.check.inspect_file")
    source_module = importlib.import_module("data.source")
    is_glob = importlib.import_module("data.files.paths").is_glob
    by_kind: dict[str, list[str]] = {}
    lines = []
    for path in paths:
        place = Path(path).expanduser()
        if not place.exists() and not is_glob(place):
            lines.append(f"{path}: no such file; give a file, a folder or a glob of data")
            continue
        kind = inspect_file.guess_kind(source_module.Source(path=place))
        if kind is None:
            lines.append(f"{path}: its rows are of no known kind; `rlhf data check {shlex.quote(path)}` shows why")
        else:
            by_kind.setdefault(kind, []).append(path)
    if lines:
        raise UserError(lines)
    return by_kind


def compose(
    name: str,
    model: str | None,
    data: dict[str, list[str]],
    device: str,
    lengths: dict[str, dict[str, int]] | None = None,
) -> str:
    """Return the YAML of an experiment.

    Args:
        name: Name of the experiment.
        model: Base model; None: train one from scratch.
        data: Data files of each kind that is given; {}: all data are the embedded world's.
        device: Value of launch.device.
        lengths: Lengths of each stage that are not the defaults.
    """
    lengths = lengths or {}
    lines = [HEADER, f"name: {quoted(name)}"]
    if model is not None:
        lines += ["", "model:", f"  name_or_path: {quoted(model)}"]
    if data:
        lines += ["", "data:"]
        for kind, paths in data.items():
            if len(paths) == 1:
                lines.append(f"  {kind}: {quoted(paths[0])}")
            else:
                lines += [f"  {kind}:", *(f"    - {quoted(path)}" for path in paths)]
        lines += ["", "# Rows longer than max_length are dropped and counted; set error or truncate instead."]
    if lengths:
        if not data:
            lines.append("")
        lines.append("# The base model's context is shorter than the default lengths.")
    with_data = stages_with_lengths(data) if data else []
    for stage in [*with_data, *(stage for stage in lengths if stage not in with_data)]:
        lines.append(f"{stage}:")
        if stage in with_data:
            lines.append("  on_too_long: drop")
        if stage == "ppo" and data and "documents" not in data:
            lines.append("  ptx_coef: 0    # no pretraining gradient: that needs data.documents")
        lines += [f"  {key}: {length}" for key, length in lengths.get(stage, {}).items()]
    if device != "auto":
        lines += ["", "launch:", f"  device: {device}"]
    return "\n".join(lines) + "\n"


def stages_with_lengths(data: dict[str, list[str]]) -> list[str]:
    """Return the stages that read the given data and have the setting on_too_long."""
    stages = ["sft", "evaluate"]
    if "rankings" in data:
        stages += ["rm", "dpo"]
    if "prompts" in data:
        stages += ["ppo"]
    return stages


def name_from(path: Path) -> str:
    """Return the experiment's name for a config file: its stem, with odd characters replaced."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", path.stem).lstrip(".-") or "experiment"


def quoted(text: str) -> str:
    """Return a text as YAML: plain if that is unambiguous, otherwise in quotes."""
    if PLAIN.fullmatch(text) and text.lower() not in WORDS:
        return text
    return json.dumps(text, ensure_ascii=False)
