"""What the stage base declares: its settings, metrics, inputs and checks."""

from pathlib import Path

from data.template_text import variable_problem
from pipeline.config.sections import is_hub_id, local_folder
from pipeline.stage import StageRun
from stages.settings.checks import over_context, uneven, unreadable
from stages.settings.training import DECAY, Training, setting

NAME = "base"
METRICS = {
    "loss": "cross-entropy a token, in nats, of this step's batch (evaluations.jsonl: of held-out documents)",
    "perplexity": "exp(loss) on held-out documents",
    "grad_norm": "norm of the gradient before clipping",
    "lr": "learning rate of the step",
}
HEADLINE = ("perplexity", "parameters")
WITHOUT = {"documents": "start from a model: model.name_or_path"}
SHARED = True
SHAPE = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
         "max_position_embeddings")  # fmt: skip
FIXED = (
    ("base.per_device_train_batch_size", "base.gradient_accumulation_steps"),
    "base.max_length",
    *(f"model.{key}" for key in SHAPE),  # vocab_size also cuts the rows
)


class Config(Training):
    """Only read when model.name_or_path is null: a pretrained model is converted and published as it is."""

    learning_rate: float = setting(2e-3, "peak learning rate", "per step", gt=0)
    per_device_train_batch_size: int = setting(
        48, "rows of max_length tokens in one forward and backward", "rows", ge=1
    )
    warmup_steps: int = setting(20, "linear warm-up from 0", "optimizer steps", ge=0)
    weight_decay: float = setting(0.01, DECAY, ge=0)
    max_length: int = setting(64, "length of a packed row", "tokens", ge=8)


def needs(experiment) -> list[str]:
    return []


def reads(experiment) -> list[str]:
    return ["documents"] if experiment.model.name_or_path is None else []


def folders(experiment) -> dict:
    """The model's folder, and the file of its chat template."""
    folder, template = local_folder(experiment.model.name_or_path), template_file(experiment.model)
    found = {"model.name_or_path": folder, "model.chat_template": template}
    return {key: path for key, path in found.items() if path is not None}


def template_file(m) -> Path | None:
    """The file that `model.chat_template` names. m: the section `model`."""
    return None if m.chat_template is None else Path(m.chat_template).expanduser()


def hub_model(experiment) -> tuple[str, str] | None:
    name = experiment.model.name_or_path
    return ("model.name_or_path", name) if name is not None and is_hub_id(name) else None


def check(experiment) -> list[str]:
    wrong = over_context(experiment, "base") + (uneven(experiment, "base") if reads(experiment) else [])
    return wrong + template_problems(experiment.model)


def template_problems(m) -> list[str]:
    """Lines for settings of a chat template that cannot be. m: the section `model`."""
    given = [key for key in ("chat_template", "chat_template_kwargs") if getattr(m, key) is not None]
    if m.name_or_path is None:
        what = "has no meaning for a model from scratch, which has a chat template of its own"
        return [f"model.{key}: {what}; leave it out, or name a model in model.name_or_path" for key in given]
    lines = []
    for name, value in (m.chat_template_kwargs or {}).items():
        if (problem := variable_problem(name)) is not None:
            lines.append(f"model.chat_template_kwargs: {name!r} {problem}")
        elif holds_null(value):
            what = "is null, or holds one, which is as if it were not there"
            lines.append(f"model.chat_template_kwargs: {name} {what}; leave it out")
    return lines


def holds_null(value: object) -> bool:
    """Return whether a value of a YAML is null, or has one inside."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return value is None or any(map(holds_null, inside))


def lacks(experiment) -> list[str]:
    return unreadable(experiment, reads(experiment))


def run(ctx: StageRun) -> dict:
    """Run the stage; its libraries are imported only now."""
    from stages.base import run as run_stage

    return run_stage(ctx)
