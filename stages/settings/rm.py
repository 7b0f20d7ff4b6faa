"""What the stage rm declares: its settings, metrics, inputs and checks."""

from typing import Literal

from pipeline.stage import StageRun
from stages.settings.checks import beyond_context, over_context, unreadable
from stages.settings.training import ACCUMULATED, PreferenceTraining, setting
from stages.settings.wanted import simulates

NAME = "rm"
METRICS = {
    "loss": "ranking loss a prompt, in nats, of this step's batch",
    "accuracy": "share of pairs whose preferred response scores higher, mean over prompts (evaluations.jsonl: over all "
    "held-out pairs, equal scores counting half)",
    "margin": "mean score difference between preferred and other response",
    "grad_norm": "norm of the gradient before clipping",
    "lr": "learning rate of the step",
}
HEADLINE = ("accuracy", "accuracy_ceiling")
SHARED = True
FIXED = (("rm.per_device_train_batch_size", "rm.gradient_accumulation_steps"), "rm.max_length", "rm.on_too_long")


class Config(PreferenceTraining):
    """The K-wise ranking reward model."""

    learning_rate: float = setting(
        1e-5, "peak learning rate (the paper's: 9e-6); with adapters about ten times as much", "per step", gt=0
    )
    gradient_accumulation_steps: int = setting(2, f"{ACCUMULATED} (the paper: 64 prompts a step)", ge=1)
    loss_type: Literal["sigmoid", "plackett_luce"] = setting(
        "sigmoid", "sigmoid: all pairs of a ranking (the paper); plackett_luce: the likelihood of its whole order"
    )
    label_smoothing: float = setting(0.0, "share of labels taken to be flipped (sigmoid only)", ge=0, lt=0.5)
    margin_coef: float = setting(
        0.0, "times a ranking's `margin`: the score difference that its pairs should have (Llama 2; sigmoid only)", ge=0
    )
    ensemble: int = setting(
        1, "models trained, each from seeds of its own; PPO takes their mean or minimum (ppo.reward_ensemble)", ge=1
    )
    held_out: bool | None = setting(
        None,
        "train one more model, of a seed of its own, as held_out/model: no policy is trained to please it, and "
        "evaluate scores every answer by it too, which shows over-optimisation. It takes as long as the first one. "
        "null: where people ranked (data.rankings), since the embedded world has a gold scorer",
    )
    bias_demonstrations: int = setting(256, "demonstrations that the mean score 0 is taken over", "rows", ge=1)


def needs(experiment) -> list[str]:
    world = ["world"] if simulates(experiment) else []  # it knows the tasks of what its labelers ranked
    return [*world, "sft", "rankings"]


def reads(experiment) -> list[str]:
    return ["demonstrations"]


def check(experiment) -> list[str]:
    c = experiment.rm
    only = "has no meaning with loss_type plackett_luce; use sigmoid, or 0"
    odd = [key for key in ("label_smoothing", "margin_coef") if getattr(c, key) and c.loss_type != "sigmoid"]
    return over_context(experiment, "rm") + [f"rm.{key}: {only}" for key in odd]


def lacks(experiment) -> list[str]:
    return beyond_context(experiment, "rm") + unreadable(experiment, reads(experiment))


def run(ctx: StageRun) -> dict:
    """Run the stage; its libraries are imported only now."""
    from stages.rm import run as run_stage

    return run_stage(ctx)
