"""Define `Experiment`, the whole of a validated config, and list the stages."""

from typing import Any

from pydantic import Field

from pipeline.config.section import Section
from pipeline.config.sections import Common
from pipeline.stage import Stage
from stages.settings import base, dpo, evaluate, ppo, rankings, report, rm, sft, world
from stages.settings.base import BaseSettings
from stages.settings.dpo import DPOSettings
from stages.settings.evaluate import EvaluateSettings
from stages.settings.ppo import PPOSettings
from stages.settings.rankings import RankingsSettings
from stages.settings.report import ReportSettings
from stages.settings.rm import RMSettings
from stages.settings.sft import SFTSettings
from stages.settings.world import WorldSettings

# Each stage comes after the stages that it may need.
STAGES: dict[str, Stage] = {
    module.STAGE.name: module.STAGE for module in (world, base, sft, rankings, rm, ppo, dpo, evaluate, report)
}


class Experiment(Common):
    """Hold one experiment: the common sections and one section per stage."""

    world: WorldSettings = Field(default_factory=WorldSettings)
    base: BaseSettings = Field(default_factory=BaseSettings)
    sft: SFTSettings = Field(default_factory=SFTSettings)
    rankings: RankingsSettings = Field(default_factory=RankingsSettings)
    rm: RMSettings = Field(default_factory=RMSettings)
    ppo: PPOSettings = Field(default_factory=PPOSettings)
    dpo: DPOSettings = Field(default_factory=DPOSettings)
    evaluate: EvaluateSettings = Field(default_factory=EvaluateSettings)
    report: ReportSettings = Field(default_factory=ReportSettings)


def changed_settings(section: Section) -> dict[str, tuple[Any, Any]]:
    """Return the settings of a section that differ from their defaults.

    Args:
        section: The section; sections inside it are compared setting by setting.

    Returns:
        {setting: (default, value)}, with dotted names for the sections inside.
    """
    changed: dict[str, tuple[Any, Any]] = {}
    for key, info in type(section).model_fields.items():
        value, default = getattr(section, key), info.get_default(call_default_factory=True)
        if isinstance(value, Section) and isinstance(default, Section):
            for inner, pair in changed_settings(value).items():
                changed[f"{key}.{inner}"] = pair
        elif value != default:
            changed[key] = (default, value)
    return changed
