"""Declare the stage refusals: its settings, inputs and checks."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from pipeline.config.section import Section, setting
from pipeline.config.sections import DataValue
from pipeline.stage import Stage, StageRun
from stages.settings.policies import trained_policies
from stages.settings.reward_bench import missing_paths, parts_of, paths_of
from stages.settings.training import TOO_LONG_PROMPT, TooLong

if TYPE_CHECKING:
    from stages.settings.experiment import Experiment

SETS = ("harmful", "harmless_looking")
"""The two sets of prompts: those to refuse, and those that only look so."""
POLICIES = ("base", "sft", "ppo", "dpo")


class RefusalsSettings(Section):
    """Choose the prompts on which refusals are counted, and how a refusal is recognised."""

    harmful: DataValue = setting(
        None,
        "prompts that ask for harm and should be refused: a path, a Hub id, {path, columns, where, …} or a list of "
        "them, read as data.prompts is; null: none",
    )
    harmless_looking: DataValue = setting(
        None,
        "prompts that look harmful, are not, and should be answered (as in XSTest or OR-Bench); read in the same way",
    )
    patterns: str | None = setting(
        None,
        "file with the phrases that make a response a refusal, one a line (`re:` before a regular expression, # before "
        "a comment); null: the list in stages/external/refusal_patterns.txt",
    )
    within: int = setting(
        200, "a phrase counts if it begins among the first characters of a response", "characters", ge=1
    )
    policies: list[Literal["base", "sft", "ppo", "dpo"]] | None = setting(
        None, "policies to measure; null: those that evaluate compares"
    )
    temperature: float = setting(0.0, "sampling temperature; 0: the likeliest token at each position", ge=0)
    samples_per_prompt: int = setting(1, "responses of each policy per prompt", ge=1)
    response_length: int = setting(128, "largest length of a response, EOS included", "tokens", ge=1)
    max_length: int = setting(512, "largest length of prompt and response together", "tokens", ge=8)
    on_too_long: TooLong = setting("error", TOO_LONG_PROMPT)
    batch_size: int = setting(32, "rows sampled at a time", "rows", ge=1)


def measured_policies(experiment: "Experiment") -> list[str]:
    """Return the policies to measure, base first."""
    chosen = experiment.refusals.policies
    wanted = trained_policies(experiment) if chosen is None else chosen
    return [name for name in POLICIES if name in wanted]


def folders(experiment: "Experiment") -> dict[str, Path]:
    """Return the user's files: their content is part of the fingerprint."""
    settings = experiment.refusals
    paths: dict[str, Path] = {}
    for name in SETS:
        paths |= paths_of(f"refusals.{name}", getattr(settings, name))
    if settings.patterns is not None:
        paths["refusals.patterns"] = Path(settings.patterns).expanduser()
    return paths


def check(experiment: "Experiment") -> list[str]:
    """Return a line for each setting that cannot work."""
    settings, lines = experiment.refusals, []
    for name in SETS:
        lines += missing_paths(f"refusals.{name}", getattr(settings, name))
    if settings.patterns is not None and not Path(settings.patterns).expanduser().is_file():
        lines.append(f"refusals.patterns: no such file: {settings.patterns}; give a file with a phrase a line")
    if settings.temperature == 0 and settings.samples_per_prompt > 1:
        lines.append(
            f"refusals.samples_per_prompt: at temperature 0 all {settings.samples_per_prompt} samples would be the "
            f"same; set refusals.temperature: 1, or 1 sample"
        )
    if settings.response_length >= settings.max_length:
        lines.append(
            f"refusals.response_length: {settings.response_length} leaves no room for a prompt within max_length "
            f"{settings.max_length}; lower it, or raise max_length"
        )
    if settings.policies == []:
        lines.append("refusals.policies: is an empty list; name at least one, or leave it out")
    return lines


def missing_requirements(experiment: "Experiment") -> list[str]:
    """Return the mistakes in files and lengths, or that no prompts are named."""
    from data.error_lines import shorten
    from stages.external.patterns import read_patterns
    from stages.settings.checks import errors_in_head, over_context, over_folder_context, reader_source

    settings = experiment.refusals
    parts = [part for name in SETS for part in parts_of(getattr(settings, name))]
    if not parts:
        return [
            "refusals.harmful: names no prompts; `rlhf evaluate --harmful FILE --harmless-looking FILE -c CONFIG` "
            "counts refusals on them"
        ]
    lines: list[str] = []
    for part in parts:
        if part.path is not None:
            lines += errors_in_head("prompts", reader_source(part))
    too_long = over_context(experiment, "refusals") + over_folder_context(experiment, "refusals")
    return shorten(lines) + read_patterns(settings.patterns)[1] + too_long


def run(ctx: "StageRun[RefusalsSettings, Experiment]") -> dict[str, Any]:
    """Run the stage. Its libraries are imported only now."""
    from stages.external.refusals import run as run_stage

    return run_stage(ctx)


def show(folder: Path, console: Console) -> None:
    """Print the table that ends `rlhf evaluate --harmful`."""
    from stages.page.external import show as show_tables

    show_tables("refusals", folder, console)


STAGE = Stage(
    name="refusals",
    summary="Count refusals of harmful prompts, and of prompts that only look harmful.",
    settings=RefusalsSettings,
    run=run,
    needs=measured_policies,
    headline=("policies", "prompts"),
    check=check,
    missing_requirements=missing_requirements,
    folders=folders,
    fixed=tuple(f"refusals.{key}" for key in RefusalsSettings.model_fields if key not in ("policies", "batch_size")),
    shared=True,
    show=show,
)
