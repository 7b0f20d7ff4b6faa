"""What the stage report declares: its settings, metrics, inputs and checks."""

from pathlib import Path

from rich.console import Console

from pipeline.stage import StageRun
from stages.settings.training import Section, setting
from stages.settings.wanted import judges, policies

NAME = "report"
METRICS: dict[str, str] = {}
HEADLINE = ("policies", "plots")
STAGES = ("world", "base", "sft", "rankings", "rm", "ppo", "dpo", "evaluate")


class Config(Section):
    """What the page shows of the samples."""

    prompts: int = setting(12, "prompts whose responses are shown side by side", "prompts", ge=1)
    ppo_looks: int = setting(6, "moments of PPO whose samples are shown", ge=1)


def needs(experiment) -> list[str]:
    made = {"world"} if "world" in experiment.data.model_dump().values() else set()
    made |= {"base", "sft", "evaluate"} | {"ppo", "dpo"} & set(policies(experiment))
    made |= {"rankings", "rm"} if judges(experiment) else {"rankings"} if "dpo" in made else set()
    return [stage for stage in STAGES if stage in made]


def reads(experiment) -> list[str]:
    return []


def run(ctx: StageRun) -> dict:
    """Run the stage; its libraries are imported only now."""
    from stages.report import run as run_stage

    return run_stage(ctx)


STAGES = ("world", "base", "sft", "rankings", "rm", "ppo", "dpo", "evaluate")


def show(folder: Path, console: Console) -> None:
    """Print the table that ends `rlhf run report`."""
    from stages.page.terminal import show as show_table

    show_table(folder, console)
