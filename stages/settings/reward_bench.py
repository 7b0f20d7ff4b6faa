"""Declare the stage reward_bench: its settings, inputs and checks."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from pipeline.config.checks import exists
from pipeline.config.section import Section, setting
from pipeline.config.sections import DataValue, is_hub_id
from pipeline.fingerprints import source_of
from pipeline.stage import Source, Stage, StageRun
from stages.models.ensemble_folder import others_of
from stages.settings.training import TOO_LONG_ROW, TooLong

if TYPE_CHECKING:
    from stages.settings.experiment import Experiment

OF_RM = {"rm": "model", "held_out": "held_out/model", "judge": "judge/model"}
"""Name of a reward model that the stage rm may publish → its folder there."""


class RewardBenchSettings(Section):
    """Choose on which benchmark reward models are measured, and which ones."""

    data: DataValue = setting(
        None,
        "rows of RewardBench 2 (chosen and rejected are lists: the best of four, and ties) or of RewardBench (pairs): "
        "a path, a Hub id (allenai/reward-bench-2, allenai/reward-bench), {path, split, limit, …} or a list of them; "
        "null: none, and `rlhf evaluate --reward-bench FILE` names it",
    )
    models: list[str] | None = setting(
        None,
        "reward models to measure: rm, held_out or judge (those that the stage rm trained), or the folder of any "
        "reward model; null: all that the stage rm trained",
    )
    batch_size: int = setting(32, "responses in a forward pass", "responses", ge=1)
    max_length: int | None = setting(
        None, "longest row of prompt and response; null: the model's context", "tokens", ge=8
    )
    on_too_long: TooLong = setting("error", TOO_LONG_ROW)


def needs(experiment: "Experiment") -> list[str]:
    """Return rm, unless only other reward models are measured."""
    models = experiment.reward_bench.models
    return ["rm"] if models is None or set(models) & set(OF_RM) else []


def parts_of(value: Any) -> tuple[Source, ...]:
    """Return the sources that a setting names: one, or those of a list; none for null."""
    if value is None:
        return ()
    source = source_of(value)
    return source.parts or (source,)


def paths_of(key: str, value: Any) -> dict[str, Path]:
    """Return the local files and folders that a setting names, by a name for each."""
    paths = [part.path for part in parts_of(value) if part.path is not None]
    if len(paths) == 1:
        return {key: paths[0]}
    return {f"{key}[{number}]": path for number, path in enumerate(paths)}


def missing_paths(key: str, value: Any) -> list[str]:
    """Return a line for each path of a setting that does not exist."""
    return [
        f"{name}: no such file: {path}; give a file, a folder or a Hub id org/name"
        for name, path in paths_of(key, value).items()
        if not exists(str(path))
    ]


def folders(experiment: "Experiment") -> dict[str, Path]:
    """Return the user's files and reward models: their content is part of the fingerprint."""
    paths = paths_of("reward_bench.data", experiment.reward_bench.data)
    for name in experiment.reward_bench.models or ():
        if name not in OF_RM:
            folder = Path(name).expanduser()
            paths[f"reward_bench.models ({name})"] = folder
            paths |= {f"reward_bench.models ({name}, {other.name})": other for other in others_of(folder)}
    return paths


def check(experiment: "Experiment") -> list[str]:
    """Return a line for each setting that cannot work."""
    settings = experiment.reward_bench
    lines = missing_paths("reward_bench.data", settings.data)
    if settings.models == []:
        lines.append("reward_bench.models: is an empty list; name at least one, or leave it out")
    for name in settings.models or ():
        if name in OF_RM or (Path(name).expanduser() / "config.json").is_file():
            continue
        what = "is on the Hub; download it" if is_hub_id(name) else f"is neither one of {', '.join(OF_RM)} nor a folder"
        lines.append(f"reward_bench.models: {name} {what} and give the folder with its config.json")
    return lines


def missing_requirements(experiment: "Experiment") -> list[str]:
    """Return the mistakes in the local files, or that no data are named."""
    from data.error_lines import shorten
    from stages.external.bench_rows import read_items

    parts = parts_of(experiment.reward_bench.data)
    if not parts:
        return ["reward_bench.data: names no data; `rlhf evaluate --reward-bench FILE -c CONFIG` measures on them"]
    lines: list[str] = []
    for part in parts:
        if part.path is not None:
            lines += read_items(part)[1]
    return shorten(lines)


def run(ctx: "StageRun[RewardBenchSettings, Experiment]") -> dict[str, Any]:
    """Run the stage. Its libraries are imported only now."""
    from stages.external.reward_bench import run as run_stage

    return run_stage(ctx)


def show(folder: Path, console: Console) -> None:
    """Print the tables that end `rlhf evaluate --reward-bench`."""
    from stages.page.external import show as show_tables

    show_tables("reward_bench", folder, console)


STAGE = Stage(
    name="reward_bench",
    summary="Measure reward models on RewardBench.",
    settings=RewardBenchSettings,
    run=run,
    needs=needs,
    headline=("models", "items", "overall"),
    check=check,
    missing_requirements=missing_requirements,
    folders=folders,
    fixed=("reward_bench.data", "reward_bench.max_length", "reward_bench.on_too_long"),
    shared=True,
    show=show,
)
