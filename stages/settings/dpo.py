"""Declare the stage dpo: its settings, metrics, inputs and checks."""

from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BeforeValidator

from pipeline.config.section import setting
from pipeline.stage import Stage, StageRun
from stages.settings.checks import over_context, over_folder_context
from stages.settings.peft import StagePeft, missing_package, peft_setting, stage_problems
from stages.settings.training import ACCUMULATION, SCALER_METRICS, TIE_METRICS, PreferenceTraining, check_ties

if TYPE_CHECKING:
    from stages.settings.experiment import Experiment

LossType = Literal["sigmoid", "robust", "ipo", "hinge", "plackett_luce", "davidson", "davidson_luce", "sft", "kto"]
METRICS = {
    "loss": "loss of this step's batch: the sum of its parts, each times its weight",
    **{
        f"loss/{name}": f"the part {name} before its weight (if there are several)"
        for name in get_args(LossType)
        if name != "kto"
    },
    "rewards/chosen": "mean of β · log(π/π_ref) of the preferred responses (with kto: of the good ones)",
    "rewards/rejected": "the same for the other responses",
    "rewards/accuracies": "fraction of pairs whose preferred response has the higher reward",
    "rewards/margins": "mean of the chosen minus the rejected reward",
    "logps/chosen": "mean log-probability of the preferred responses, in nats per response",
    "logps/rejected": "the same for the other responses",
    **TIE_METRICS,
    "kl": "with kto: its estimate of KL(π ‖ π_ref), in nats per response, not below 0",
    "grad_norm": "norm of the gradient before clipping",
    **SCALER_METRICS,
    "lr": "learning rate of the step",
}


def as_list(value: Any) -> Any:
    """Return a single text as a list of one."""
    return [value] if isinstance(value, str) else value


class DPOSettings(PreferenceTraining):
    """Choose how the policy learns from the pairs of each ranking, or from whole rankings."""

    learning_rate: float = setting(
        1e-6, "peak learning rate (trl's default); with adapters about ten times as much", "per step", gt=0
    )
    gradient_accumulation_steps: int = setting(2, ACCUMULATION, ge=1)
    beta: float = setting(0.1, "β, how strongly the policy is kept close to the reference", gt=0)
    loss_type: Annotated[list[LossType], BeforeValidator(as_list)] = setting(
        ["sigmoid"],
        "one loss, or several that are added: sigmoid, robust, ipo, hinge on pairs (ipo sums log-ratios over tokens, "
        "as in Azar 2023; trl averages them), plackett_luce on the whole order, davidson (pairs) and davidson_luce "
        "(whole order) with ties, which the others leave out, sft on the responses ranked first; kto, alone, on good "
        "and bad responses: as they are labelled, or ranked first and last",
    )
    loss_weights: list[float] | None = setting(None, "weight of each of several losses; null: 1 for each")
    label_smoothing: float = setting(
        0.0, "assumed fraction of flipped labels (only with sigmoid and robust)", ge=0, lt=0.5
    )
    desirable_weight: float | None = setting(None, "weight of good responses with kto; null: 1", gt=0)
    undesirable_weight: float | None = setting(None, "weight of bad responses with kto; null: 1", gt=0)
    sample_tokens: int = setting(48, "length of the samples kept in samples.jsonl; 0: none", "tokens", ge=0)
    peft: StagePeft = peft_setting()

    def losses(self) -> dict[str, float]:
        """Return the weight of each loss."""
        return dict(zip(self.loss_type, self.loss_weights or [1.0] * len(self.loss_type), strict=True))

    def label_weights(self) -> tuple[float, float]:
        """Return kto's weights of good and of bad responses."""
        return self.desirable_weight or 1.0, self.undesirable_weight or 1.0


def needs(experiment: "Experiment") -> list[str]:
    """Return the stages that must be done first."""
    return ["sft", "rankings"]


def check(experiment: "Experiment") -> list[str]:
    """Return a line for each combination of settings that cannot work."""
    settings, lines = experiment.dpo, over_context(experiment, "dpo") + stage_problems(experiment, "dpo")
    names = settings.loss_type
    if not names or len(set(names)) < len(names):
        lines.append(f"dpo.loss_type: {names} is empty or names a loss twice; name each loss once")
    if settings.loss_weights is not None and len(settings.loss_weights) != len(names):
        lines.append(
            f"dpo.loss_weights: {len(settings.loss_weights)} given for {len(names)} losses in dpo.loss_type; give "
            f"one for each"
        )
    if settings.label_smoothing and not {"sigmoid", "robust"} & set(names):
        lines.append(f"dpo.label_smoothing: has no effect with loss_type {', '.join(names)}; use sigmoid, or 0")
    return lines + check_kto(settings) + check_ties(settings, "dpo", names)


def check_kto(settings: DPOSettings) -> list[str]:
    """Return a line for each setting of kto that cannot work."""
    if "kto" not in settings.loss_type:
        return [
            f"dpo.{key}: has no effect with loss_type {', '.join(settings.loss_type)}; use kto, or null"
            for key in ("desirable_weight", "undesirable_weight")
            if getattr(settings, key) is not None
        ]
    lines = []
    if len(settings.loss_type) > 1:
        others = ", ".join(name for name in settings.loss_type if name != "kto")
        lines.append(f"dpo.loss_type: kto reads labels of single responses, {others} ranks; name kto alone")
    if settings.per_device_train_batch_size * settings.gradient_accumulation_steps < 2:
        lines.append(
            "dpo.per_device_train_batch_size: 1 prompt a step leaves kto no other prompt to estimate the KL from; "
            "raise it, or gradient_accumulation_steps"
        )
    return lines


def missing_requirements(experiment: "Experiment") -> list[str]:
    """Return a line for each length over the model's context."""
    return missing_package(experiment, "dpo") + over_folder_context(experiment, "dpo")


def run(ctx: "StageRun[DPOSettings, Experiment]") -> dict[str, Any]:
    """Run the stage. Its libraries are imported only now."""
    from stages.dpo import run as run_stage

    return run_stage(ctx)


STAGE = Stage(
    name="dpo",
    summary="Train a policy on the rankings directly (direct preference optimisation).",
    settings=DPOSettings,
    run=run,
    needs=needs,
    metrics=METRICS,
    headline=("rewards/accuracies", "rewards/margins"),
    check=check,
    missing_requirements=missing_requirements,
    fixed=(("dpo.per_device_train_batch_size", "dpo.gradient_accumulation_steps"), "dpo.max_length", "dpo.on_too_long"),
    shared=True,
)
