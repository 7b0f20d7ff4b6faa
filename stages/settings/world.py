"""What the stage world declares: its settings, metrics, inputs and checks."""

from pipeline.config.sections import OF_WORLD
from pipeline.stage import StageRun
from stages.settings.training import Section, setting

NAME = "world"
METRICS: dict[str, str] = {}
HEADLINE = ("documents", "demonstrations", "prompts", "evaluation_prompts")


class Config(Section):
    """Sizes of the embedded world."""

    documents: int = setting(15000, "pretraining documents", "documents", ge=100)
    demonstrations: int = setting(1500, "demonstrations by labelers of mixed quality", "rows", ge=20)
    prompts: int = setting(2000, "prompts for rankings and PPO", "prompts", ge=20)
    evaluation_prompts: int = setting(400, "prompts that nothing trains on", "prompts", ge=20)


def needs(experiment) -> list[str]:
    return []


def reads(experiment) -> list[str]:
    return []


def check(experiment) -> list[str]:
    data = experiment.data
    return [
        f"data.{k}: world takes no split, skip or limit; write {k}: world, and set its size in the section world"
        for k in OF_WORLD
        if getattr(getattr(data, k), "path", None) == "world"
    ]


def run(ctx: StageRun) -> dict:
    """Run the stage; its libraries are imported only now."""
    from stages.world import run as run_stage

    return run_stage(ctx)
