"""Define `Experiment`, the whole of a validated config, and list the stages."""

from pydantic import Field

from pipeline.config.section import Section
from pipeline.config.sections import Common
from pipeline.stage import Stage
from stages.settings import (
    base,
    dpo,
    evaluate,
    lm_eval,
    ppo,
    rankings,
    refusals,
    report,
    reward_base,
    reward_bench,
    rm,
    sft,
    world,
)
from stages.settings.base import BaseSettings
from stages.settings.dpo import DPOSettings
from stages.settings.evaluate import EvaluateSettings
from stages.settings.lm_eval import LMEvalSettings
from stages.settings.playground import PlaygroundSettings
from stages.settings.ppo import PPOSettings
from stages.settings.rank import RankSettings
from stages.settings.rankings import RankingsSettings
from stages.settings.refusals import RefusalsSettings
from stages.settings.report import ReportSettings
from stages.settings.reward_bench import RewardBenchSettings
from stages.settings.rm import RMSettings
from stages.settings.rounds import RoundsSettings
from stages.settings.sft import SFTSettings
from stages.settings.world import WorldSettings

# Each stage comes after the stages that it may need.
STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        *(module.STAGE for module in (world, base, sft, rankings)),
        *(reward_base.BASE_STAGE, reward_base.SFT_STAGE),  # only with rm.base
        *(module.STAGE for module in (rm, ppo, dpo, evaluate, report)),
    )
}
# Stages that run only where the user asks for them (`rlhf evaluate --lm-eval`); report shows them.
TESTS: dict[str, Stage] = {module.STAGE.name: module.STAGE for module in (lm_eval, reward_bench, refusals)}
# Sections of commands that are no stages: of what people say in a browser.
PEOPLE: dict[str, type[Section]] = {"rank": RankSettings, "playground": PlaygroundSettings, "rounds": RoundsSettings}


class Experiment(Common):
    """Hold one experiment: the common sections, one per stage, and those of PEOPLE."""

    world: WorldSettings = Field(default_factory=WorldSettings)
    base: BaseSettings = Field(default_factory=BaseSettings)
    sft: SFTSettings = Field(default_factory=SFTSettings)
    rankings: RankingsSettings = Field(default_factory=RankingsSettings)
    rm: RMSettings = Field(default_factory=RMSettings)
    ppo: PPOSettings = Field(default_factory=PPOSettings)
    dpo: DPOSettings = Field(default_factory=DPOSettings)
    evaluate: EvaluateSettings = Field(default_factory=EvaluateSettings)
    lm_eval: LMEvalSettings = Field(default_factory=LMEvalSettings)
    reward_bench: RewardBenchSettings = Field(default_factory=RewardBenchSettings)
    refusals: RefusalsSettings = Field(default_factory=RefusalsSettings)
    report: ReportSettings = Field(default_factory=ReportSettings)
    rank: RankSettings = Field(default_factory=RankSettings)
    playground: PlaygroundSettings = Field(default_factory=PlaygroundSettings)
    rounds: RoundsSettings = Field(default_factory=RoundsSettings)
