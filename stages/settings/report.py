"""Declare the stage report: its settings and inputs."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from pipeline.config.section import Section, setting
from pipeline.stage import Stage, StageRun
from stages.settings.policies import compared_policies, needs_reward_model

if TYPE_CHECKING:
    from stages.settings.experiment import Experiment

STAGES = ("world", "base", "sft", "rankings", "rm", "ppo", "dpo", "evaluate")  # those that it can show


TESTS = ("lm_eval", "reward_bench", "refusals")  # that it shows where they were made


class ReportSettings(Section):
    """Choose how many samples the page shows."""

    prompts: int = setting(12, "number of prompts whose responses are shown side by side", "prompts", ge=1)
    ppo_looks: int = setting(6, "number of moments of PPO whose samples are shown", ge=1)


def needs(experiment: "Experiment") -> list[str]:
    """Return the stages that must be done first: all that the experiment uses."""
    used = {"base", "sft", "evaluate"}
    if "world" in experiment.data.model_dump().values():
        used.add("world")
    used |= {"ppo", "dpo"} & set(compared_policies(experiment))
    if needs_reward_model(experiment):
        used |= {"rankings", "rm"}
    elif "dpo" in used:
        used.add("rankings")
    return [stage for stage in STAGES if stage in used]


def shows(experiment: "Experiment") -> list[str]:
    """Return the tests that it shows where they were made of today's models."""
    return list(TESTS)


def run(ctx: "StageRun[ReportSettings, Experiment]") -> dict[str, Any]:
    """Run the stage. Its libraries are imported only now."""
    from stages.report import run as run_stage

    return run_stage(ctx)


def show(folder: Path, console: Console) -> None:
    """Print the table that ends `rlhf run report`."""
    from stages.page.terminal import show as show_table

    show_table(folder, console)


STAGE = Stage(
    name="report",
    summary="Write one page with the table, the curves and the samples.",
    settings=ReportSettings,
    run=run,
    needs=needs,
    shows=shows,
    headline=("policies", "plots"),
    show=show,
)
