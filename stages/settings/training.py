"""Settings that several stages share, under trl's names. Config objects stop at the stage files."""

import math
from typing import Literal

from pydantic import BaseModel, Field

from pipeline.config.validation import STRICT

TooLong = Literal["error", "drop", "truncate"]
Schedule = Literal["constant", "linear", "cosine", "cosine_with_min_lr"]
ACCUMULATED = "micro-batches a step; a step's batch is per_device_train_batch_size times this"
DECAY = "AdamW's decoupled weight decay of all that trains but norms and biases (by name, as transformers)"


def setting(default, description: str, unit: str = "", **bounds):
    """A field of a section: default, meaning, unit and bounds, as `rlhf run STAGE --help` lists them."""
    return Field(default, description=description, json_schema_extra={"unit": unit}, validate_default=True, **bounds)


class Section(BaseModel):
    """A section of the YAML: typed, and an unknown key is an error."""

    model_config = STRICT


def too_long():
    """The field `on_too_long` of a stage that reads rows of prompt and response."""
    return setting("error", "what happens to a row longer than max_length; drop and truncate are counted and said")


def too_long_prompt():
    """The same of a stage that samples responses to prompts."""
    return setting(
        "error", "what happens to a prompt that leaves no room for response_length; truncate means drop, none is cut"
    )


class Training(Section):
    """What base, sft, rm and dpo have in common."""

    learning_rate: float = setting(1e-5, "peak learning rate", "per step", gt=0)
    lr_scheduler_type: Schedule = setting(
        "cosine_with_min_lr", "shape of the learning rate after the warm-up; cosine_with_min_lr ends at a tenth"
    )
    warmup_steps: int = setting(0, "linear warm-up from 0", "optimizer steps", ge=0)
    num_train_epochs: float = setting(1.0, "passes over the data (ignored if max_steps is given)", "epochs", gt=0)
    max_steps: int | None = setting(None, "stop after so many steps", "optimizer steps", ge=1)
    per_device_train_batch_size: int = setting(8, "rows (rm, dpo: prompts) in one forward and backward", "rows", ge=1)
    gradient_accumulation_steps: int = setting(1, ACCUMULATED, ge=1)
    adam_beta2: float = setting(0.95, "AdamW's second β; the first is 0.9 (the paper: 0.9, 0.95)", gt=0, lt=1)
    max_grad_norm: float = setting(1.0, "clip the gradient's norm to this", gt=0)
    weight_decay: float = setting(0.0, DECAY, ge=0)
    max_length: int = setting(512, "longest row, prompt and response together", "tokens", ge=8)
    keep: Literal["best", "last"] = setting("last", "publish the last weights, or the best by the held-out figure")
    patience: int | None = setting(None, "stop after so many evaluations without a better one", "evaluations", ge=1)
    eval_steps: int = setting(50, "evaluate on held-out rows every so many steps", "optimizer steps", ge=1)


class PreferenceTraining(Training):
    """What rm and dpo have in common: a row is a prompt with all its responses."""

    on_too_long: TooLong = too_long()
    per_device_train_batch_size: int = setting(
        8, "prompts, with all their responses, in one forward and backward", "prompts", ge=1
    )
    per_device_train_tokens: int | None = setting(
        None,
        "in one forward and backward as many prompts as have so many tokens (a prompt counts once), in place of "
        "per_device_train_batch_size; changes memory, not the gradient",
        "tokens",
        ge=1,
    )


def batch_of_each(size: int, accumulated: int, processes: int) -> tuple[int, int]:
    """(rows of a micro-batch, micro-batches a step) of each process, so that all together take one process's batch.
    ValueError where the rows cannot be split evenly."""
    fewer = math.gcd(accumulated, processes)
    if size % (processes // fewer):
        raise ValueError(f"{size} × {accumulated} rows are no even share for {processes} processes")
    return size // (processes // fewer), accumulated // fewer


def total_steps(config: Training, rows: int) -> int:
    """Optimizer steps of a run over `rows` rows; the last, smaller batch of an epoch is filled from the next one."""
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return config.max_steps or max(1, round(config.num_train_epochs * rows / batch))
