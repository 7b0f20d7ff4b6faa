"""Declare the stage base: its settings, metrics, inputs and checks."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.template_text import variable_problem
from pipeline.config.section import setting
from pipeline.config.sections import ModelSettings, is_hub_id, local_folder
from pipeline.stage import Stage, StageRun
from stages.settings.checks import check_data, over_context, uneven_batches
from stages.settings.training import SCALER_METRICS, WEIGHT_DECAY, Training

if TYPE_CHECKING:
    from stages.settings.experiment import Experiment

METRICS = {
    "loss": "cross-entropy per token, in nats, of this step's batch (evaluations.jsonl: of held-out documents)",
    "perplexity": "exp(loss) on held-out documents",
    "grad_norm": "norm of the gradient before clipping",
    **SCALER_METRICS,
    "lr": "learning rate of the step",
}
SHAPE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
FIXED: tuple[str | tuple[str, ...], ...] = (
    ("base.per_device_train_batch_size", "base.gradient_accumulation_steps"),
    "base.max_length",
    *(f"model.{key}" for key in SHAPE),  # vocab_size changes the rows, too
)


class BaseSettings(Training):
    """Train a base model; used only if model.name_or_path is null.

    A pretrained model is converted and published as it is.
    """

    learning_rate: float = setting(2e-3, "peak learning rate", "per step", gt=0)
    per_device_train_batch_size: int = setting(
        48, "rows of max_length tokens in one forward and backward pass", "rows", ge=1
    )
    warmup_steps: int = setting(20, "length of the linear warm-up from 0", "optimizer steps", ge=0)
    weight_decay: float = setting(0.01, WEIGHT_DECAY, ge=0)
    max_length: int = setting(64, "length of a packed row", "tokens", ge=8)


def needs(experiment: "Experiment") -> list[str]:
    """Return the stages that must be done first: none."""
    return []


def reads(experiment: "Experiment") -> list[str]:
    """Return the kinds of data it reads: documents, if the model is trained from scratch."""
    return ["documents"] if experiment.model.name_or_path is None else []


def folders(experiment: "Experiment") -> dict[str, Path]:
    """Return the folders of base model and adapter, and the file of its chat template, if set."""
    paths = {
        "model.name_or_path": local_folder(experiment.model.name_or_path),
        "model.chat_template": template_file(experiment.model),
        "model.adapter": adapter_folder(experiment.model),
    }
    return {key: path for key, path in paths.items() if path is not None}


def template_file(model: ModelSettings) -> Path | None:
    """Return the file that model.chat_template names, if it is set."""
    return None if model.chat_template is None else Path(model.chat_template).expanduser()


def adapter_folder(model: ModelSettings) -> Path | None:
    """Return the folder that model.adapter names, if it is set."""
    return None if model.adapter is None else Path(model.adapter).expanduser()


def hub_model(experiment: "Experiment") -> tuple[str, str] | None:
    """Return the setting and the Hub id of the base model, if it is on the Hub."""
    name = experiment.model.name_or_path
    return ("model.name_or_path", name) if name is not None and is_hub_id(name) else None


def check(experiment: "Experiment") -> list[str]:
    """Return a line for each combination of settings that cannot work."""
    lines = over_context(experiment, "base")
    if reads(experiment):
        lines += uneven_batches(experiment, "base")
    return lines + template_problems(experiment.model)


def template_problems(model: ModelSettings) -> list[str]:
    """Return a line for each setting of the chat template that cannot work."""
    if model.name_or_path is None:
        what = "has no effect on a model from scratch, which has its own chat template"
        return [
            f"model.{key}: {what}; leave it out, or name a base model in model.name_or_path"
            for key in ("chat_template", "chat_template_kwargs")
            if getattr(model, key) is not None
        ]
    lines = []
    for name, value in (model.chat_template_kwargs or {}).items():
        if (problem := variable_problem(name)) is not None:
            lines.append(f"model.chat_template_kwargs: {name!r} {problem}")
        elif contains_null(value):
            lines.append(
                f"model.chat_template_kwargs: {name} is or contains null, which means the same as not setting it; "
                f"leave it out"
            )
    return lines


def contains_null(value: object) -> bool:
    """Return whether a value from a YAML file is null or contains one."""
    if isinstance(value, dict):
        return any(contains_null(item) for item in value.values())
    if isinstance(value, list):
        return any(contains_null(item) for item in value)
    return value is None


def run(ctx: "StageRun[BaseSettings, Experiment]") -> dict[str, Any]:
    """Run the stage. Its libraries are imported only now."""
    from stages.base import run as run_stage

    return run_stage(ctx)


STAGE = Stage(
    name="base",
    summary="Train a base model from scratch, or convert a pretrained one.",
    settings=BaseSettings,
    run=run,
    needs=needs,
    reads=reads,
    metrics=METRICS,
    headline=("perplexity", "parameters"),
    check=check,
    check_data=check_data,
    folders=folders,
    hub_model=hub_model,
    without={"documents": "start from a base model: model.name_or_path"},
    fixed=FIXED,
    shared=True,
)
