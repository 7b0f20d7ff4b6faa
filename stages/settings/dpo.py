"""What the stage dpo declares: its settings, metrics, inputs and checks."""

from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator

from pipeline.stage import StageRun
from stages.settings.checks import beyond_context, over_context
from stages.settings.training import ACCUMULATED, PreferenceTraining, setting

NAME = "dpo"
LossType = Literal["sigmoid", "robust", "ipo", "hinge", "plackett_luce", "sft"]
METRICS = {
    "loss": "the loss of this step's batch: the sum of its parts, each times its weight",
    **{f"loss/{name}": f"the part {name} before its weight (where there are several)" for name in get_args(LossType)},
    "rewards/chosen": "mean of β · log(π/π_ref) of the preferred responses",
    "rewards/rejected": "the same of the other responses",
    "rewards/accuracies": "share of pairs with the preferred response's reward higher",
    "rewards/margins": "mean of chosen minus rejected reward",
    "logps/chosen": "mean log-probability of the preferred responses, in nats a response",
    "logps/rejected": "the same of the other responses",
    "grad_norm": "norm of the gradient before clipping",
    "lr": "learning rate of the step",
}
HEADLINE = ("rewards/accuracies", "rewards/margins")
SHARED = True
FIXED = (("dpo.per_device_train_batch_size", "dpo.gradient_accumulation_steps"), "dpo.max_length", "dpo.on_too_long")


class Config(PreferenceTraining):
    """Direct preference optimisation over all pairs of each ranking, or over whole rankings."""

    learning_rate: float = setting(
        1e-6, "peak learning rate (trl's); with adapters about ten times as much", "per step", gt=0
    )
    gradient_accumulation_steps: int = setting(2, ACCUMULATED, ge=1)
    beta: float = setting(0.1, "how strongly the policy is held to the reference", gt=0)
    loss_type: Annotated[list[LossType], BeforeValidator(lambda x: [x] if isinstance(x, str) else x)] = setting(
        ["sigmoid"],
        "one, or several that are added up: sigmoid, robust, ipo, hinge on pairs (ipo sums log-ratios over tokens, as "
        "Azar 2023; trl averages them), plackett_luce on the whole order, sft on the responses ranked first",
    )
    loss_weights: list[float] | None = setting(None, "of each of several losses; null: 1 each")
    label_smoothing: float = setting(0.0, "share of labels taken to be flipped (sigmoid and robust)", ge=0, lt=0.5)
    sample_tokens: int = setting(48, "length of the generations kept in samples.jsonl; 0: none", "tokens", ge=0)

    def losses(self) -> dict[str, float]:
        """Each loss and its weight."""
        return dict(zip(self.loss_type, self.loss_weights or [1.0] * len(self.loss_type), strict=True))


def needs(experiment) -> list[str]:
    return ["sft", "rankings"]


def reads(experiment) -> list[str]:
    return []


def check(experiment) -> list[str]:
    c, wrong = experiment.dpo, over_context(experiment, "dpo")
    names = c.loss_type
    if not names or len(set(names)) < len(names):
        wrong.append(f"dpo.loss_type: {names} names no loss, or one twice; name each once")
    if c.loss_weights is not None and len(c.loss_weights) != len(names):
        wrong.append(f"dpo.loss_weights: {len(c.loss_weights)} for {len(names)} of dpo.loss_type; give one for each")
    if c.label_smoothing and not {"sigmoid", "robust"} & set(names):
        wrong.append(f"dpo.label_smoothing: has no meaning with loss_type {', '.join(names)}; use sigmoid, or 0")
    return wrong


def lacks(experiment) -> list[str]:
    return beyond_context(experiment, "dpo")


def run(ctx: StageRun) -> dict:
    """Run the stage; its libraries are imported only now."""
    from stages.dpo import run as run_stage

    return run_stage(ctx)
