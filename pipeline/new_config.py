"""Compose a short config for a base model and data files: the text that `rlhf init` writes."""

import json
import re
from pathlib import Path

HEADER = "# Every setting: configs/SETTINGS.md, or `rlhf run STAGE --help`."
PLAIN = re.compile(r"[A-Za-z./][A-Za-z0-9_./+-]*")  # text that YAML takes for a string without quotes
WORDS = {"null", "true", "false"}


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
