"""Declare the stage evaluate: its settings, inputs and checks."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.config.section import Section, setting
from pipeline.stage import Stage, StageRun
from stages.models.ensemble_folder import How
from stages.settings.checks import check_data, no_room_for_prompt, over_context, over_folder_context
from stages.settings.policies import (
    compared_policies,
    has_rankings,
    needs_reward_model,
    ranks_by_scorers,
    simulates_labelers,
)
from stages.settings.ppo import ensemble_ways
from stages.settings.rollout import OF_FINISHED, EngineSettings, missing_engine
from stages.settings.rounds import measured_files
from stages.settings.scorers.common import ScorerSection
from stages.settings.scorers.scorer import Scorer, missing_of_scorers, names_of, scorer_files, scorer_problems
from stages.settings.sft import learns_samples
from stages.settings.training import TOO_LONG_PROMPT, TooLong

if TYPE_CHECKING:
    from stages.settings.experiment import Experiment

STAGES = ("base", "sft", "ppo", "dpo")  # those that make a policy
RM_FIGURES = (
    "accuracy",
    "accuracy_ci95",
    "accuracy_ceiling",
    "accuracy_ceiling_ci95",
    "n_pairs",
    "labeler_agreement",
    "labeler_agreement_ci95",
    "ece",
    "ece_ci95",
)
FIXED = (
    "num_prompts",
    "max_length",
    "response_length",
    "on_too_long",
    "temperature",
    "top_k",
    "top_p",
    "best_of",
    "samples_per_prompt",
    "base_prompt",
    "few_shot_examples",
    "missing_eos_score",
    "reward_ensemble",
    "perplexity_rows",
    "perplexity_length",
    "greedy_prompts",
    "greedy_length",
    "best_of_by",
    "judges",
    "judge_pairs",
    "judge_repeat",
)
JUDGE_PAIRS = 200
"""Pairs of held-out rankings that each judge is shown, where the settings say nothing."""
JUDGE_REPEAT = 0.2
"""Share of prompts about which each judge is asked again, where the settings say nothing."""
RESERVED = ("gold", "kept", "reward_model", "held_out")
"""Names of judges that are there without settings."""


class EvaluateSettings(Section):
    """Choose which policies are compared, and how."""

    policies: list[str] = setting(
        ["base", "sft", "ppo", "dpo", "best_of_n"],
        "policies to compare, among base, sft, ppo, dpo, best_of_n; sft is always included. If not set: those that the "
        "data allow (dpo needs rankings; ppo and best_of_n need prompts and rankings). Without prompts rm trains a "
        "judge only if best_of_n is named",
    )
    best_of: int = setting(
        4, "n of best_of_n; 1 leaves it out; it costs as much as n policies with one sample per prompt", "samples", ge=1
    )
    samples_per_prompt: int = setting(
        1, "samples of each policy per prompt (best_of_n: always one); more samples make intervals narrower", ge=1
    )
    base_prompt: Literal["auto", "chat", "plain", "few_shot"] = setting(
        "auto",
        "how base is prompted: chat (with the chat template), plain (only the prompt, in the style of its corpus) or "
        "few_shot (after some demonstrations, as question and answer); auto: chat for a pretrained model, plain for "
        "one trained from scratch",
    )
    few_shot_examples: int = setting(4, "demonstrations shown if base_prompt is few_shot", "rows", ge=1)
    num_prompts: int | None = setting(
        128, "number of evaluation prompts to use, from the first; null: all", "prompts", ge=2
    )
    response_length: int = setting(128, "largest length of a response, EOS included", "tokens", ge=1)
    max_length: int = setting(512, "largest length of prompt and response together", "tokens", ge=8)
    on_too_long: TooLong = setting("error", TOO_LONG_PROMPT)
    temperature: float = setting(1.0, "sampling temperature", gt=0)
    top_k: int | None = setting(
        None,
        "draw only from so many of the likeliest tokens; null: from all, as PPO does. With it kl_to_sft is null, "
        "because such samples do not estimate the KL of the whole distributions",
        "tokens",
        ge=1,
    )
    top_p: float | None = setting(
        None,
        "draw only from the likeliest tokens with this probability in all; null: from all. kl_to_sft as with top_k",
        gt=0,
        le=1,
    )
    missing_eos_score: float | None = setting(
        -1.0, "score of a response without EOS; the same as ppo's; null: its own score", "reward"
    )
    reward_ensemble: How = setting(
        "mean", "how the scores of the models of rm.ensemble are combined; the same as ppo's"
    )
    batch_size: int = setting(64, "number of rows sampled and scored at a time", "rows", ge=1)
    rollout: EngineSettings | None = setting(None, OF_FINISHED)
    greedy_prompts: int | None = setting(
        None,
        "number of prompts that are also answered greedily, for the samples in the report; 0: none; null: 12",
        "prompts",
        ge=0,
    )
    greedy_length: int | None = setting(
        None,
        "largest length of those responses, EOS included; null: 4 × response_length, as far as the context allows",
        "tokens",
        ge=1,
    )
    best_of_by: Scorer | None = setting(
        None,
        "scorer that chooses the best of n samples (below), as {python: file.py:function}; it gives best_of_n no win "
        "rate; null: this experiment's reward model",
    )
    judges: list[Scorer] | None = setting(
        None,
        "further judges, side by side: a list of scorers (below), as [{judge: gpt-5-mini, base_url: ADDRESS, mode: "
        "pairwise}, {python: file.py:function}]. The page gives each one's win rates, with and without the effect of "
        "length, its biases, and its agreement with labelers and the other judges",
    )
    judge_pairs: int | None = setting(
        None,
        "pairs of held-out rankings that each of judges is shown, to see how often it agrees with the labelers; 0: "
        "none; null: 200",
        "pairs",
        ge=0,
    )
    judge_repeat: float | None = setting(
        None,
        "share of prompts about which each of judges is asked again, to see how often it says the same; 0: none; "
        "null: 0.2",
        ge=0,
        le=1,
    )
    perplexity_rows: int = setting(256, "largest number of held-out rows of pretraining text", "rows", ge=1)
    perplexity_length: int = setting(128, "length of such a row", "tokens", ge=8)

    @property
    def truncates(self) -> bool:
        """Whether responses are drawn from a part of the vocabulary only."""
        return self.top_k is not None or (self.top_p is not None and self.top_p < 1)

    @property
    def named_judges(self) -> dict[str, ScorerSection]:
        """Return the further judges by their names."""
        judges = self.judges or []
        return dict(zip(names_of(judges), judges, strict=True))

    @property
    def pairs_to_judge(self) -> int:
        """Return how many pairs of held-out rankings a judge is shown, at most."""
        if self.judges is None:
            return 0
        return JUDGE_PAIRS if self.judge_pairs is None else self.judge_pairs


def needs(experiment: "Experiment") -> list[str]:
    """Return the stages that must be done first: those of the policies, and rm as judge."""
    policies = compared_policies(experiment)
    stages = [stage for stage in STAGES if stage in policies or stage == "sft"]
    if needs_reward_model(experiment):
        stages.append("rm")
    if shows_rankings(experiment):
        stages.append("rankings")
    return stages


def shows_rankings(experiment: "Experiment") -> bool:
    """Return whether judges are shown pairs that labelers ranked; scorers that rank are none."""
    return experiment.evaluate.pairs_to_judge > 0 and has_rankings(experiment) and not ranks_by_scorers(experiment)


def folders(experiment: "Experiment") -> dict[str, Path]:
    """Return the files and folders of the user that judge; their content is in the fingerprint."""
    settings = experiment.evaluate
    found = scorer_files("evaluate.judges", settings.judges or []) | measured_files(experiment)
    return found if settings.best_of_by is None else found | settings.best_of_by.files("evaluate.best_of_by")


def selector_problems(settings: EvaluateSettings) -> list[str]:
    """Return a line for each mistake in what chooses the best of n samples."""
    chosen, key = settings.best_of_by, "evaluate.best_of_by"
    if chosen is None:
        return []
    lines = chosen.problems(key)
    if chosen.compares():
        lines.append(f"{key}.mode: pairwise gives no scores, which are needed here; set mode: grade")
    if "rm" in chosen.stages():
        lines.append(f"{key}: this experiment's reward model chooses anyway; leave it out")
    if chosen.may_drop():
        lines.append(f"{key}.on_failure: drop has no effect here; set stop")
    if chosen.weight != 1:
        lines.append(f"{key}.weight: nothing is added up here; leave it out")
    return lines


def judge_problems(settings: EvaluateSettings) -> list[str]:
    """Return a line for each mistake in the list of judges."""
    if settings.judges is None:
        return [
            f"evaluate.{key}: has no effect without evaluate.judges; leave it out"
            for key in ("judge_pairs", "judge_repeat")
            if getattr(settings, key) is not None
        ]
    lines = scorer_problems("evaluate.judges", settings.judges, as_judges=True)
    for index, (judge, name) in enumerate(zip(settings.judges, names_of(settings.judges), strict=True)):
        if "rm" in judge.stages():
            lines.append(f"evaluate.judges[{index}]: this experiment's reward model judges anyway; leave it out")
        elif name in RESERVED:
            lines.append(f"evaluate.judges[{index}]: {name} is the name of another judge; give it one (name: …)")
        if judge.weight != 1:
            lines.append(f"evaluate.judges[{index}].weight: judges are not added up; leave it out")
    return lines


def reads(experiment: "Experiment") -> list[str]:
    """Return the kinds of data it reads: prompts, text for perplexity, and all training prompts."""
    kinds = [prompt_kind(experiment)]
    if experiment.data.documents is not None:
        kinds.append("documents")
    return list(dict.fromkeys(kinds + training_prompt_kinds(experiment)))


def prompt_kind(experiment: "Experiment") -> str:
    """Return the kind of data from which the prompts come.

    Without evaluation prompts these are the demonstrations that sft held out.
    """
    return "demonstrations" if experiment.data.evaluation_prompts is None else "evaluation_prompts"


def training_prompt_kinds(experiment: "Experiment") -> list[str]:
    """Return the kinds of data whose prompts some policy or the reward model was trained on."""
    kinds, stages = ["demonstrations"], needs(experiment)
    if "rm" in stages or "dpo" in stages:
        kinds.append("rankings" if experiment.data.rankings is not None else "prompts")
    if "ppo" in stages or learns_samples(experiment):
        kinds.append("prompts")
    return list(dict.fromkeys(kinds))


def check(experiment: "Experiment") -> list[str]:
    """Return a line for each combination of settings that cannot work."""
    settings, known = experiment.evaluate, (*STAGES, "best_of_n")
    lines = [
        f"evaluate.policies: {policy!r} is not a policy; choose from {', '.join(known)}"
        for policy in settings.policies
        if policy not in known
    ]
    if "ppo" in compared_policies(experiment):
        ppos: dict[str, dict[str, Any]] = {
            "missing_eos_score": {"ppo.missing_eos_score": experiment.ppo.missing_eos_score},
            "reward_ensemble": ensemble_ways(experiment.ppo),
        }
        for key, found in ppos.items():
            own = getattr(settings, key)
            if found and own not in found.values():
                theirs, value = next(iter(found.items()))
                lines.append(
                    f"evaluate.{key}: is {own} and {theirs} is {value}, so scores would not be those that PPO "
                    f"maximised; set both to the same value"
                )
    lines += judge_problems(settings) + selector_problems(settings)
    lines += no_room_for_prompt(experiment, "evaluate")
    return lines + over_context(experiment, "evaluate", *text_lengths(experiment))


def differences_from_training(experiment: "Experiment") -> list[dict[str, Any]]:
    """Return the settings by which responses are sampled or scored otherwise than in training.

    They are allowed: people do use a policy at another temperature. But a figure measured so is not
    what training worked on, so results.json, the page and a line say it.

    Returns:
        {"setting", "value", "training": the other setting, "training_value"} of each.
    """
    settings, policies, found = experiment.evaluate, compared_policies(experiment), []

    def compare(stage: str, *keys: str, only_longer: bool = False) -> None:
        for key in keys:
            # PPO has neither top-k nor top-p: it samples from all tokens
            value, theirs = getattr(settings, key), getattr(getattr(experiment, stage), key, None)
            if value != theirs and not (only_longer and value < theirs):
                found.append({"setting": f"evaluate.{key}", "value": value, "training": f"{stage}.{key}",
                              "training_value": theirs})  # fmt: skip

    stages = needs(experiment)
    if "ppo" in policies:
        compare("ppo", "temperature", "top_k", "top_p", "response_length", "max_length")
    for stage in ("rm", "dpo"):
        if stage in stages:
            compare(stage, "max_length", only_longer=True)
    sampled = simulates_labelers(experiment) or ranks_by_scorers(experiment)
    if sampled and {"rm", "dpo"} & set(stages):
        compare("rankings", "temperature", "top_k", "top_p", "response_length")
    return found


def difference_lines(differences: list[dict[str, Any]]) -> list[str]:
    """Return a sentence for each of `differences_from_training`, without a full stop."""
    lines = []
    for found in differences:
        value, theirs = ("not set" if x is None else x for x in (found["value"], found["training_value"]))
        lines.append(f"{found['setting']} is {value} and {found['training']} {theirs}, so training saw other responses")
    return lines


def text_lengths(experiment: "Experiment") -> list[str]:
    """Return the names of the settings that limit rows of pretraining text; none without text."""
    return [] if experiment.data.documents is None else ["perplexity_length"]


def missing_requirements(experiment: "Experiment") -> list[str]:
    """Return a line for each thing that this machine lacks, and each length over the context."""
    settings = experiment.evaluate
    lines = missing_engine(experiment, "evaluate")
    lines += missing_of_scorers("evaluate.judges", settings.judges or [])
    if settings.best_of_by is not None:
        lines += settings.best_of_by.missing("evaluate.best_of_by")
    return lines + over_folder_context(experiment, "evaluate", *text_lengths(experiment))


def run(ctx: "StageRun[EvaluateSettings, Experiment]") -> dict[str, Any]:
    """Run the stage. Its libraries are imported only now."""
    from stages.evaluate import run as run_stage

    return run_stage(ctx)


STAGE = Stage(
    name="evaluate",
    summary="Compare the policies on the evaluation prompts.",
    settings=EvaluateSettings,
    run=run,
    needs=needs,
    reads=reads,
    headline=("policy", "score", "win_rate_vs_sft", "gold", "eos_rate", "judged"),
    check=check,
    missing_requirements=missing_requirements,
    check_data=check_data,
    folders=folders,
    fixed=tuple(f"evaluate.{key}" for key in FIXED),
    shared=True,
)
