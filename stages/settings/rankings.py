"""Declare the stage rankings: its settings, inputs and checks."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.section import Section, setting
from pipeline.stage import Stage, StageRun
from stages.settings.checks import check_data, no_room_for_prompt, over_context, over_folder_context
from stages.settings.policies import ranks_by_scorers, simulates_labelers
from stages.settings.rollout import OF_FINISHED, EngineSettings, missing_engine
from stages.settings.scorers.scorer import Scorer, missing_of_scorers, scorer_files, scorer_problems, scorer_stages
from stages.settings.training import TOO_LONG_PROMPT, TooLong

if TYPE_CHECKING:
    from stages.settings.experiment import Experiment


class RankingsSettings(Section):
    """Choose how responses are sampled and ranked.

    If people ranked (data.rankings), only validation_fraction and judge_fraction are used.
    """

    num_prompts: int | None = setting(None, "number of prompts whose responses are ranked; null: all", "prompts", ge=2)
    samples_per_prompt: int = setting(6, "K, the number of responses to each prompt (the paper: 4 to 9)", ge=2)
    validation_fraction: float = setting(
        0.1, "fraction of the prompts held out for the reward model's accuracy", gt=0, lt=1
    )
    judge_fraction: float | None = setting(
        None,
        "fraction of the prompts whose rankings are kept to train a judge that no policy climbs (rm/judge/model); 0: "
        "none. By labeler, where that leaves two on each side, otherwise by prompt; in the embedded world so many "
        "prompts are ranked in addition. null: 0.2 of people's rankings if PPO or best of n is compared and at least "
        "100 prompts would be kept; none in the embedded world, which has a gold scorer",
        ge=0,
        lt=1,
    )
    response_length: int = setting(128, "largest length of a response, EOS included", "tokens", ge=1)
    max_length: int = setting(512, "largest length of prompt and response together", "tokens", ge=8)
    on_too_long: TooLong = setting("error", TOO_LONG_PROMPT)
    temperature: float = setting(1.0, "sampling temperature", gt=0)
    top_k: int | None = setting(
        None, "draw only from so many of the likeliest tokens; null: from all, as PPO does", "tokens", ge=1
    )
    top_p: float | None = setting(
        None, "draw only from the likeliest tokens with this probability in all; null: from all", gt=0, le=1
    )
    agreement: float = setting(
        0.726,
        "how often two simulated labelers agree on a pair of different responses (InstructGPT: 72.6 %); sets their "
        "noise",
        gt=0.5,
        lt=1,
    )
    labelers_per_prompt: int = setting(
        1,
        "number of simulated labelers, or of labelers with scorer_agreement, who rank the responses to a training "
        "prompt independently",
        ge=1,
        le=5,
    )
    rank_unfinished: bool | None = setting(
        None,
        "whether labelers rank responses that were cut off at response_length too. false: they are not judged (rank "
        "null), and no model learns from them; ppo.missing_eos_score says what they are worth, but DPO, which has no "
        "such score, may leave off ending its answers. null: true",
    )
    batch_size: int = setting(32, "number of prompts sampled at a time", "prompts", ge=1)
    scorer: list[Scorer] | None = setting(
        None,
        "what ranks the responses in place of people: a list of scorers, as [{rule: words, at_most: 50}] "
        "(stages/scorers/README.md); the best weighted sum is rank 1. null: people, or simulated labelers",
    )
    tie_within: float | None = setting(None, "largest difference of two scores of scorer that are a tie; null: 0", ge=0)
    scorer_agreement: float | None = setting(
        None,
        "how often two labelers agree who see the score of scorer with noise of their own (InstructGPT: 0.726); sets "
        "the noise. Different responses of the same score count too: on them they agree half the time. Two rank a "
        "prompt that is held out, labelers_per_prompt any other. null: ranks follow the score itself",
        gt=0.5,
        lt=1,
    )
    rollout: EngineSettings | None = setting(None, OF_FINISHED)


def needs(experiment: "Experiment") -> list[str]:
    """Return the stages that must be done first."""
    return ["sft", *scorer_stages(experiment.rankings.scorer or [])]


def reads(experiment: "Experiment") -> list[str]:
    """Return the kinds of data it reads: prompts to sample from, or rankings by people."""
    return ["prompts"] if samples_responses(experiment) else ["rankings"]


def samples_responses(experiment: "Experiment") -> bool:
    """Return whether responses of SFT are ranked, and not rankings imported."""
    return simulates_labelers(experiment) or ranks_by_scorers(experiment)


def folders(experiment: "Experiment") -> dict[str, Path]:
    """Return the files and folders of the user that decide the scores."""
    return scorer_files("rankings.scorer", experiment.rankings.scorer or [])


def check(experiment: "Experiment") -> list[str]:
    """Return a line for each combination of settings that cannot work."""
    lines = scorer_lines(experiment) + judge_lines(experiment)
    if not samples_responses(experiment):
        return lines  # nothing is sampled
    return lines + no_room_for_prompt(experiment, "rankings") + over_context(experiment, "rankings")


def judge_lines(experiment: "Experiment") -> list[str]:
    """Return a line where the shares leave nothing to train on."""
    settings = experiment.rankings
    if simulates_labelers(experiment) or settings.validation_fraction + (settings.judge_fraction or 0.0) < 1:
        return []  # in the embedded world a judge gets prompts of its own
    return [
        f"rankings.judge_fraction: {settings.judge_fraction} and validation_fraction {settings.validation_fraction} "
        f"leave nothing to train on; lower one of them"
    ]


def scorer_lines(experiment: "Experiment") -> list[str]:
    """Return a line for each mistake in what ranks."""
    settings = experiment.rankings
    if settings.scorer is None:
        return [
            f"rankings.{key}: has no effect without rankings.scorer; set it, or leave this out"
            for key in ("tie_within", "scorer_agreement")
            if getattr(settings, key) is not None
        ]
    lines = scorer_problems("rankings.scorer", settings.scorer)
    if settings.scorer_agreement is None and settings.labelers_per_prompt > 1:
        lines.append("rankings.labelers_per_prompt: a scorer without scorer_agreement ranks a prompt once; set it to 1")
    if "agreement" in settings.model_fields_set:
        lines.append(
            "rankings.agreement: is that of the embedded world's labelers; beside rankings.scorer set scorer_agreement"
        )
    if "rm" in scorer_stages(settings.scorer):
        lines.append("rankings.scorer: rm is trained on these rankings; name the folder of another reward model")
    if settings.scorer_agreement is not None and settings.tie_within is not None:
        lines.append("rankings.tie_within: with scorer_agreement no two scores are equal; leave one of them out")
    if experiment.data.rankings is not None:
        lines.append("rankings.scorer: has no effect beside data.rankings; leave one of them out")
    return lines


def missing_requirements(experiment: "Experiment") -> list[str]:
    """Return a line for each thing that this machine lacks, and each length over the context."""
    if experiment.data.rankings is not None:
        return []  # nothing is sampled
    lines = missing_engine(experiment, "rankings")
    lines += missing_of_scorers("rankings.scorer", experiment.rankings.scorer or [])
    return lines + over_folder_context(experiment, "rankings")


def run(ctx: "StageRun[RankingsSettings, Experiment]") -> dict[str, Any]:
    """Run the stage. Its libraries are imported only now."""
    from stages.rankings import run as run_stage

    return run_stage(ctx)


STAGE = Stage(
    name="rankings",
    summary="Sample responses and let simulated labelers rank them, or import rankings by people.",
    settings=RankingsSettings,
    run=run,
    needs=needs,
    reads=reads,
    headline=("rankings", "pairs", "labeler_agreement"),
    check=check,
    missing_requirements=missing_requirements,
    folders=folders,
    check_data=check_data,
    without={
        "rankings": "set rankings.scorer (scorers rank), or data.prompts: world (simulated labelers know only the "
        "embedded world's prompts)"
    },
    fixed=("rankings.samples_per_prompt", "rankings.response_length", "rankings.max_length", "rankings.on_too_long"),
    shared=True,
)
