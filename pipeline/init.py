"""Write a short config for a base model and data files: the command `rlhf init`."""

import argparse
import importlib
import json
import re
import shlex
from pathlib import Path

from pipeline import api
from pipeline.errors import UserError

HEADER = "# Every setting: configs/SETTINGS.md, or `rlhf run STAGE --help`."
PLAIN = re.compile(r"[A-Za-z./][A-Za-z0-9_./+-]*")  # text that YAML takes for a string without quotes
WORDS = {"null", "true", "false"}


def init_command(arguments: argparse.Namespace) -> int:
    """Run `rlhf init`: write a short config that works."""
    from pipeline.chain import missing_data_of, wanted_stages
    from pipeline.config.yaml_tree import parse_tree

    path = Path(arguments.output)
    if path.exists():
        raise UserError(f"{path}: exists and is not overwritten; choose another file with -o")
    text = compose(name_from(path), arguments.model, guess_kinds(arguments.data), arguments.device)
    experiment, stages = api.validate(parse_tree(text, str(path))), api.stages()
    wanted = wanted_stages(experiment, stages)
    if lines := missing_data_of([name for name in stages if name in wanted], stages, experiment):
        raise UserError(lines)
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another file with -o") from None
    print(text)
    words = shlex.join(["-c", str(path)])
    print(f"written to {path}; next: rlhf run {list(stages)[-1]} {words}")
    return 0


def guess_kinds(paths: list[str]) -> dict[str, str]:
    """Return the data files by kind, as `rlhf data check` guesses the kinds.

    Raises:
        UserError: If a kind cannot be guessed, or two files are of the same kind.
    """
    inspect_file = importlib.import_module("data.check.inspect_file")
    by_kind: dict[str, str] = {}
    lines = []
    for path in paths:
        if not Path(path).expanduser().is_file():
            lines.append(f"{path}: no such file; give a data file")
            continue
        kind = inspect_file.guess_kind(Path(path).expanduser())
        if kind is None:
            lines.append(f"{path}: its rows are of no known kind; `rlhf data check {shlex.quote(path)}` shows why")
        elif kind in by_kind:
            lines.append(f"{path}: contains {kind}, as {by_kind[kind]} does; join them to one file")
        else:
            by_kind[kind] = path
    if lines:
        raise UserError(lines)
    return by_kind


def compose(name: str, model: str | None, data: dict[str, str], device: str) -> str:
    """Return the YAML of an experiment.

    Args:
        name: Name of the experiment.
        model: Base model; None: train one from scratch.
        data: Data file of each kind that is given; {}: all data are the embedded world's.
        device: Value of launch.device.
    """
    lines = [HEADER, f"name: {quoted(name)}"]
    if model is not None:
        lines += ["", "model:", f"  name_or_path: {quoted(model)}"]
    if data:
        lines += ["", "data:"]
        lines += [f"  {kind}: {quoted(path)}" for kind, path in data.items()]
        lines += ["", "# Rows longer than max_length are dropped and counted; error or truncate is the alternative."]
        lines += [f"{stage}:\n  on_too_long: drop" for stage in stages_with_lengths(data)]
        if "prompts" in data and "documents" not in data:
            lines += ["  ptx_coef: 0    # no pretraining gradient: that needs data.documents"]
    if device != "auto":
        lines += ["", "launch:", f"  device: {device}"]
    return "\n".join(lines) + "\n"


def stages_with_lengths(data: dict[str, str]) -> list[str]:
    """Return the stages that read the given data and have the setting on_too_long; ppo is last."""
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
