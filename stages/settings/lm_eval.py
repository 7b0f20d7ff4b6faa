"""Declare the stage lm_eval: its settings, inputs and checks."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from pipeline.config.section import Section, setting
from pipeline.stage import Stage, StageRun
from stages.settings.policies import trained_policies

if TYPE_CHECKING:
    from stages.settings.experiment import Experiment

POLICIES = ("base", "sft", "ppo", "dpo")
INSTALL = "`.venv/bin/pip install -e '.[eval]'` installs it"


class LMEvalSettings(Section):
    """Choose on which tasks of lm-evaluation-harness the policies are measured, and how."""

    tasks: list[str] | None = setting(
        None,
        "tasks, groups or tags of lm-evaluation-harness (arc_easy, gsm8k, mmlu), or names of tasks in include_path; "
        "null: none, and `rlhf evaluate --lm-eval TASKS` names them",
    )
    include_path: str | None = setting(
        None,
        "folder with tasks of your own: YAML files, and their data beside them. Paths in a YAML are read from the "
        "working folder or, where they are not there, from this one. Functions that a YAML names run with your rights",
    )
    policies: list[Literal["base", "sft", "ppo", "dpo"]] | None = setting(
        None, "policies to measure; null: those that evaluate compares"
    )
    limit: int | None = setting(None, "documents per task, from the first; null: all", "documents", ge=1)
    num_fewshot: int | None = setting(None, "examples before each question; null: as the task says", "examples", ge=0)
    chat_template: Literal["trained", "all", "none"] = setting(
        "trained",
        "who is asked through the chat template. trained: all policies but base, which continues plain text; all: base "
        "too, for a base model that was instructed; none: nobody",
    )
    batch_size: int = setting(8, "rows in a forward pass", "rows", ge=1)
    max_length: int | None = setting(None, "longest row; null: the model's context", "tokens", ge=8)
    run_unsafe_code: bool = setting(False, "whether tasks may run code that the model writes (humaneval, mbpp)")


def measured_policies(experiment: "Experiment") -> list[str]:
    """Return the policies to measure, base first."""
    chosen = experiment.lm_eval.policies
    wanted = trained_policies(experiment) if chosen is None else chosen
    return [name for name in POLICIES if name in wanted]


def folders(experiment: "Experiment") -> dict[str, Path]:
    """Return the folder of the user's tasks: its content is part of the fingerprint."""
    path = experiment.lm_eval.include_path
    return {} if path is None else {"lm_eval.include_path": Path(path).expanduser()}


def check(experiment: "Experiment") -> list[str]:
    """Return a line for each setting that cannot work."""
    settings, lines = experiment.lm_eval, []
    if settings.include_path is not None and not Path(settings.include_path).expanduser().is_dir():
        lines.append(f"lm_eval.include_path: {settings.include_path} is no folder; give a folder with YAML files")
    for key in ("tasks", "policies"):
        if getattr(settings, key) == []:
            lines.append(f"lm_eval.{key}: is an empty list; name at least one, or leave it out")
    return lines


def missing_requirements(experiment: "Experiment") -> list[str]:
    """Return a line for each task that cannot be loaded, or if lm-eval is not installed."""
    from importlib.util import find_spec

    settings = experiment.lm_eval
    if settings.tasks is None:
        return ["lm_eval.tasks: names no task; `rlhf evaluate --lm-eval TASKS -c CONFIG` measures on them"]
    if find_spec("lm_eval") is None:
        return [f"lm_eval: the package lm_eval is not installed; {INSTALL}"]
    from stages.external.tasks import problems_of_tasks

    return problems_of_tasks(settings.tasks, settings.include_path)


def run(ctx: "StageRun[LMEvalSettings, Experiment]") -> dict[str, Any]:
    """Run the stage. Its libraries are imported only now."""
    from stages.external.lm_eval import run as run_stage

    return run_stage(ctx)


def show(folder: Path, console: Console) -> None:
    """Print the table that ends `rlhf evaluate --lm-eval`."""
    from stages.page.external import show as show_tables

    show_tables("lm_eval", folder, console)


STAGE = Stage(
    name="lm_eval",
    summary="Measure the policies on tasks of lm-evaluation-harness.",
    settings=LMEvalSettings,
    run=run,
    needs=measured_policies,
    headline=("policies", "tasks"),
    check=check,
    missing_requirements=missing_requirements,
    folders=folders,
    fixed=tuple(f"lm_eval.{key}" for key in LMEvalSettings.model_fields if key not in ("policies", "batch_size")),
    show=show,
)
