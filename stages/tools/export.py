"""Write the policy of a stage as one file for other programs: the command `rlhf export`."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.store import files
from pipeline.store.artifacts import ArtifactStore
from stages.tools.push import published_model

NEEDED = "--to gguf: needs the package gguf, which is not installed; for that: .venv/bin/pip install -e '.[gguf]'"
DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Options:
    """Say what is written, and where."""

    stage: str
    """Stage whose policy is written."""
    output: Path
    """File to write."""
    folder: str = "model"
    """Published folder: model or model_ema."""
    dtype: str = "as-published"
    """How matrices are held: as-published, f32, f16, bf16 or q8_0."""
    overwrite: bool = False
    """Whether to replace a file that is there."""


def run(
    experiment: Any,
    store: ArtifactStore,
    stages: Mapping[str, Any],
    options: Options,
    say: Callable[[str], None] = print,
) -> int:
    """Write a policy as GGUF.

    Args:
        experiment: The validated experiment.
        store: Its artifacts.
        stages: All stages by name.
        options: What is written, and where.
        say: Prints a line.

    Returns:
        The exit code.

    Raises:
        UserError: The stage is not up to date, the model is of a kind that cannot be written here,
            or the file exists.
    """
    if find_spec("gguf") is None:
        raise UserError(NEEDED)
    if options.output.is_dir() or not options.output.absolute().parent.is_dir():
        raise UserError(f"{options.output}: is no file in a folder that exists; name one, such as ppo.gguf")
    if options.output.exists() and not options.overwrite:
        raise UserError(f"{options.output}: exists; replace it with --overwrite, or name another file")
    found = published_model(experiment, store, stages, options.stage, options.folder)
    if "config.json" not in found.sizes:
        raise UserError(
            f"{found.folder}: its adapter is not merged into the weights, and GGUF has no such adapter; take another "
            f"model.peft.method"
        )
    files.require_space(options.output.absolute().parent, sum(found.sizes.values()))
    from stages.tools import gguf_file

    config = json.loads((found.folder / "config.json").read_text(encoding="utf-8"))
    dtype = DTYPES[config.get("dtype") or "float32"] if options.dtype == "as-published" else options.dtype
    name = f"{experiment.name} {options.stage}"
    partial = options.output.with_name(f".tmp-{os.getpid()}-{options.output.name}")
    try:
        notes = gguf_file.write(found.folder, partial, name, dtype)
        os.replace(partial, options.output)
    finally:
        partial.unlink(missing_ok=True)
    say(f"{options.output}: {files.human_bytes(options.output.stat().st_size)}, matrices in {dtype}")
    for note in notes:
        say(note)
    return 0
