"""Define the settings that several stages share; they have trl's names."""

import math
from collections.abc import Sequence
from typing import Literal

from pipeline.config.section import Section, setting
from stages.training.schedule import Schedule
from stages.training.selection import Selection

TooLong = Literal["error", "drop", "truncate"]
SchedulerType = Literal["constant", "linear", "cosine", "cosine_with_min_lr"]
ACCUMULATION = "micro-batches per optimizer step; the batch of a step is per_device_train_batch_size times this"
WEIGHT_DECAY = "AdamW's decoupled weight decay, for all trained weights except norms and biases (as in transformers)"
TOO_LONG_ROW = "what to do with a row longer than max_length; dropped and truncated rows are counted and reported"
TIE_LOSSES = ("davidson", "davidson_luce")
"""Losses of rm and dpo that count ties; all others leave them out."""
SCALER_METRICS = {
    "grad_scale": "with model.dtype float16: what losses are multiplied by before the backward pass; halved when "
    "gradients overflow, doubled after 2000 steps without that",
    "steps_skipped_by_scaler": "optimizer steps so far that were skipped because gradients overflowed float16; many "
    "in a row, or grad_scale near 1, mean that the model does not train in float16",
}
TIE_METRICS = {
    "ties": "share of a prompt's comparisons that are ties (with davidson its pairs, with davidson_luce its choices)",
    "ties_expected": "the same as the model expects it, from scores and tie_strength",
    "tie_strength": "ν of a tie of two responses: of those with equal scores, ν/(2 + ν) are tied",
}
TOO_LONG_PROMPT = (
    "what to do with a prompt that leaves no room for response_length; truncate drops it too: prompts are never cut"
)


class Training(Section):
    """Hold the settings that base, sft, rm and dpo have in common."""

    learning_rate: float = setting(1e-5, "peak learning rate", "per step", gt=0)
    lr_scheduler_type: SchedulerType = setting(
        "cosine_with_min_lr",
        "shape of the learning rate after the warm-up; cosine_with_min_lr ends at a tenth of the peak",
    )
    warmup_steps: int = setting(0, "length of the linear warm-up from 0", "optimizer steps", ge=0)
    num_train_epochs: float = setting(1.0, "passes over the data (ignored if max_steps is set)", "epochs", gt=0)
    max_steps: int | None = setting(
        None, "number of steps after which training ends; null: see num_train_epochs", "optimizer steps", ge=1
    )
    per_device_train_batch_size: int = setting(
        8, "rows (rm, dpo: prompts) in one forward and backward pass", "rows", ge=1
    )
    gradient_accumulation_steps: int = setting(1, ACCUMULATION, ge=1)
    adam_beta2: float = setting(0.95, "AdamW's β₂; β₁ is 0.9 (the paper: 0.9 and 0.95)", gt=0, lt=1)
    max_grad_norm: float = setting(1.0, "norm to which the gradient is clipped", gt=0)
    weight_decay: float = setting(0.0, WEIGHT_DECAY, ge=0)
    max_length: int = setting(512, "largest length of a row, prompt and response together", "tokens", ge=8)
    keep: Literal["best", "last"] = setting(
        "last", "weights to publish: the last, or the best by the held-out evaluation"
    )
    patience: int | None = setting(
        None, "evaluations without improvement after which training ends; null: never", "evaluations", ge=1
    )
    eval_steps: int = setting(50, "steps between two held-out evaluations", "optimizer steps", ge=1)

    def schedule(self, steps: int) -> Schedule:
        """Return the learning rate as a function of the step, for a training of that many steps."""
        return Schedule(self.learning_rate, self.lr_scheduler_type, self.warmup_steps, steps)

    def selection(self, judge: str, higher_is_better: bool) -> Selection:
        """Return how held-out evaluations choose the published weights and end training early.

        Args:
            judge: Name of the held-out figure that is compared.
            higher_is_better: Direction of that figure.
        """
        return Selection(self.keep, self.patience, judge, higher_is_better, self.eval_steps)


class PreferenceTraining(Training):
    """Hold the settings of rm and dpo, whose rows are prompts with all their responses."""

    on_too_long: TooLong = setting("error", TOO_LONG_ROW)
    per_device_train_batch_size: int = setting(
        8, "prompts, with all their responses, in one forward and backward pass", "prompts", ge=1
    )
    per_device_train_tokens: int | None = setting(
        None,
        "tokens in one forward and backward pass, in place of per_device_train_batch_size (a shared prompt counts "
        "once); changes memory, not the gradient",
        "tokens",
        ge=1,
    )
    tie_strength: float | None = setting(
        None,
        "how readily labelers call a tie, for davidson and davidson_luce: of two responses of equal score, the share "
        "ν/(2 + ν) is tied (davidson_luce: ν for ties of any number of responses); null: learned, one number for "
        "each number of responses that are tied",
        gt=0,
    )
    tie_learning_rate: float | None = setting(
        None, "peak learning rate of the logarithm of a learned tie_strength; null: 0.01", "per step", gt=0
    )


def check_ties(section: PreferenceTraining, name: str, losses: Sequence[str]) -> list[str]:
    """Return a line for each setting of ties that cannot work.

    Args:
        section: The settings of the stage.
        name: The stage: rm or dpo.
        losses: Names of its losses.
    """
    named, lines = [loss for loss in losses if loss in TIE_LOSSES], []
    if not named:
        for key in ("tie_strength", "tie_learning_rate"):
            if getattr(section, key) is not None:
                losses_named = f"{name}.loss_type {', '.join(losses)}"
                lines.append(f"{name}.{key}: has no effect with {losses_named}; use {' or '.join(TIE_LOSSES)}, or null")
        return lines
    if len(named) > 1:
        lines.append(f"{name}.loss_type: {' and '.join(named)} are two models of the same ties; name one of them")
    if section.tie_strength is not None and section.tie_learning_rate is not None:
        lines.append(f"{name}.tie_learning_rate: has no effect beside {name}.tie_strength; set one of them to null")
    return lines


def batch_of_each(size: int, accumulated: int, processes: int) -> tuple[int, int]:
    """Return the batch of each process so that all together compute one process's batch.

    Args:
        size: Rows of a micro-batch if there is one process.
        accumulated: Micro-batches per step if there is one process.
        processes: Number of processes.

    Returns:
        (rows of a micro-batch, micro-batches per step) of each process.

    Raises:
        ValueError: If the rows cannot be split evenly.
    """
    fewer = math.gcd(accumulated, processes)
    if size % (processes // fewer):
        raise ValueError(f"{size} × {accumulated} rows cannot be split evenly among {processes} processes")
    return size // (processes // fewer), accumulated // fewer


def total_steps(settings: Training, rows: int) -> int:
    """Return the number of optimizer steps of a training over `rows` rows.

    The last, smaller batch of an epoch is filled up with rows of the next epoch.
    """
    batch = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    return settings.max_steps or max(1, round(settings.num_train_epochs * rows / batch))
