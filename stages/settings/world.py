"""Declare the stage world: its settings, figures and checks."""

from typing import TYPE_CHECKING, Any

from pipeline.config.section import Section, setting
from pipeline.config.sections import OF_WORLD
from pipeline.stage import Stage, StageRun

if TYPE_CHECKING:
    from stages.settings.experiment import Experiment


class WorldSettings(Section):
    """Choose the sizes of the embedded world."""

    documents: int = setting(15000, "number of pretraining documents", "documents", ge=100)
    demonstrations: int = setting(
        1500, "number of demonstrations, written by simulated labelers of mixed quality", "rows", ge=20
    )
    prompts: int = setting(2000, "number of prompts for rankings and PPO", "prompts", ge=20)
    evaluation_prompts: int = setting(400, "number of prompts that nothing trains on", "prompts", ge=20)


def needs(experiment: "Experiment") -> list[str]:
    """Return the stages that must be done first: none."""
    return []


def check(experiment: "Experiment") -> list[str]:
    """Return a line for each kind of world data with a split, skip or limit."""
    return [
        f"data.{kind}: world takes no split, skip or limit; write {kind}: world, and set its size in the section world"
        for kind in OF_WORLD
        if getattr(getattr(experiment.data, kind), "path", None) == "world"
    ]


def run(ctx: "StageRun[WorldSettings, Experiment]") -> dict[str, Any]:
    """Run the stage. Its libraries are imported only now."""
    from stages.world import run as run_stage

    return run_stage(ctx)


STAGE = Stage(
    name="world",
    summary="Write the embedded world: documents, demonstrations and prompts.",
    settings=WorldSettings,
    run=run,
    needs=needs,
    headline=("documents", "demonstrations", "prompts", "evaluation_prompts"),
    check=check,
)
