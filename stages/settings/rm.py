"""Declare the stage rm: its settings, metrics, inputs and checks."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import field_validator

from pipeline.config.section import setting
from pipeline.stage import Stage, StageRun
from stages.settings.checks import check_data, over_context, over_folder_context
from stages.settings.peft import StagePeft, missing_package, peft_setting, stage_problems
from stages.settings.policies import simulates_labelers
from stages.settings.reward_base import RewardBaseSettings, has_own_base, own_names, trunk_stages, with_own_base
from stages.settings.rounds import start_problems
from stages.settings.training import ACCUMULATION, SCALER_METRICS, TIE_METRICS, PreferenceTraining, check_ties

if TYPE_CHECKING:
    from stages.settings.experiment import Experiment

METRICS = {
    "loss": "ranking loss per prompt, in nats, of this step's batch (weighted as ranking_weight says)",
    "accuracy": "fraction of pairs whose preferred response scores higher, averaged over prompts (evaluations.jsonl: "
    "over all held-out pairs; equal scores count half)",
    "margin": "mean score difference between the preferred and the other response",
    **TIE_METRICS,
    "grad_norm": "norm of the gradient before clipping",
    **SCALER_METRICS,
    "lr": "learning rate of the step",
}


class RMSettings(PreferenceTraining):
    """Choose how the reward model learns from rankings of K responses."""

    base: RewardBaseSettings | None = setting(
        None,
        "base model of the reward model, where it is another than the policy's (the paper: 6B beside 175B): a folder, "
        "a Hub id, package:NAME, or a mapping. Its tokenizer may differ: then all that scores reads texts, and PPO's "
        "value model starts as the policy with a new head. null: the reward model starts from sft's model",
    )

    learning_rate: float = setting(
        1e-5, "peak learning rate (the paper: 9e-6); with adapters about ten times as much", "per step", gt=0
    )
    head_learning_rate: float | None = setting(
        None,
        "peak learning rate of the scalar head, which is new and has much to learn from few rankings; null: "
        "learning_rate",
        "per step",
        gt=0,
    )
    head_init: Literal["normal", "zero"] | None = setting(
        None,
        "how a new scalar head starts. normal: drawn, of variance 1 / (width + 1) (Stiennon 2020); zero: every "
        "response scores 0 at first, so that a few dozen steps do not have to undo a random head first. Members of an "
        "ensemble then differ by the order of their rankings, and by their adapters if they have any. null: normal",
    )
    gradient_accumulation_steps: int = setting(2, f"{ACCUMULATION} (the paper: 64 prompts per step)", ge=1)
    loss_type: Literal["sigmoid", "plackett_luce", "davidson", "davidson_luce"] = setting(
        "sigmoid",
        "sigmoid: all pairs of a ranking (the paper); plackett_luce: the likelihood of the whole order; davidson and "
        "davidson_luce: the same two with ties, which sigmoid and plackett_luce leave out",
    )
    ranking_weight: Literal["equal", "choices"] = setting(
        "equal",
        "weight of a ranking in the loss. equal: every prompt counts the same (the paper); choices: K − 1, the choices "
        "that a ranking of K responses states, so that many pairs do not drown a few long rankings",
    )
    label_smoothing: float = setting(0.0, "assumed fraction of flipped labels (only with sigmoid)", ge=0, lt=0.5)
    margin_coef: float = setting(
        0.0,
        "weight of the score difference that a pair should have (Llama 2; only with sigmoid): the ranking's `margin`, "
        "or else, where it has `scores`, the difference of the two",
        ge=0,
    )
    ensemble: int = setting(
        1,
        "number of models trained, each with its own seeds; PPO takes their mean or minimum (ppo.reward_ensemble)",
        ge=1,
    )
    held_out: bool | None = setting(
        None,
        "train one more model with its own seed on the same rankings, as held_out/model. No policy is optimised "
        "against it, and evaluate scores every response with it too. It takes as long as the first model, and shares "
        "the mistakes in the rankings with it: a judge that learns from other rankings tells more "
        "(rankings.judge_fraction). null: only if people ranked (data.rankings) and no rankings were kept for a judge",
    )
    start_from: str | None = setting(
        None,
        "folder of a reward model that training starts from, head and all, such as the last round's (models that only "
        "judge start as without it); null: SFT with a new head",
    )
    bias_demonstrations: int = setting(256, "number of demonstrations whose mean score is shifted to 0", "rows", ge=1)
    peft: StagePeft = peft_setting()

    @field_validator("base", mode="before")
    @classmethod
    def _a_name_alone(cls, given: Any) -> Any:
        return {"name_or_path": given} if isinstance(given, str) else given


def needs(experiment: "Experiment") -> list[str]:
    """Return the stages that must be done first.

    The world knows the tasks of the prompts that its labelers ranked.
    """
    stages = ["sft", "rankings", *trunk_stages(experiment)]
    if has_own_base(experiment):
        stages.remove("sft")  # only its prompts' samples count, and rankings has those
    return ["world", *stages] if simulates_labelers(experiment) else stages


def reads(experiment: "Experiment") -> list[str]:
    """Return the kinds of data it reads."""
    return ["demonstrations"]


def check(experiment: "Experiment") -> list[str]:
    """Return a line for each combination of settings that cannot work."""
    lines = [own_names(line) for line in over_context(with_own_base(experiment), "rm")]
    lines, settings = lines + stage_problems(experiment, "rm"), experiment.rm
    lines += start_problems(experiment, "rm", settings.start_from)
    if settings.loss_type != "sigmoid":
        for key in ("label_smoothing", "margin_coef"):
            if getattr(settings, key):
                lines.append(f"rm.{key}: has no effect with loss_type {settings.loss_type}; use sigmoid, or 0")
    return lines + check_ties(settings, "rm", [settings.loss_type])


def folders(experiment: "Experiment") -> dict[str, Path]:
    """Return the user's folder that decides what is trained: where it starts."""
    start = experiment.rm.start_from
    return {} if start is None else {"rm.start_from": Path(start).expanduser()}


def missing_requirements(experiment: "Experiment") -> list[str]:
    """Return a line for each thing that this machine lacks, and each length over the context."""
    return missing_package(experiment, "rm") + over_folder_context(with_own_base(experiment), "rm")


def run(ctx: "StageRun[RMSettings, Experiment]") -> dict[str, Any]:
    """Run the stage. Its libraries are imported only now."""
    from stages.rm import run as run_stage

    return run_stage(ctx)


STAGE = Stage(
    name="rm",
    summary="Train the reward model on rankings.",
    settings=RMSettings,
    run=run,
    needs=needs,
    reads=reads,
    metrics=METRICS,
    headline=("accuracy", "accuracy_ceiling"),
    check=check,
    missing_requirements=missing_requirements,
    check_data=check_data,
    folders=folders,
    fixed=(("rm.per_device_train_batch_size", "rm.gradient_accumulation_steps"), "rm.max_length", "rm.on_too_long"),
    shared=True,
)
