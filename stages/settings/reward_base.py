"""Declare a base model of the reward model's own (`rm.base`), and the stages that make it ready.

rm_base and rm_sft are base and sft for a second model: they run the same code on an experiment in
whose sections `model` and `sft` that model's settings stand.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import field_validator

from pipeline.config.section import Section, setting
from pipeline.config.sections import TemplateValue
from pipeline.errors import UserError
from pipeline.stage import Stage, StageRun
from stages.settings import base, sft
from stages.settings.base import SHAPE, BaseSettings
from stages.settings.checks import check_data, over_context, over_folder_context, uneven_batches
from stages.settings.sft import SFTSettings
from stages.settings.training import TooLong

if TYPE_CHECKING:
    from stages.settings.experiment import Experiment

OF_MODEL = ("name_or_path", "revision", "chat_template", "chat_template_kwargs", *SHAPE)
"""Settings of the section `model` that the second model has its own of."""
OF_SFT = re.compile(r"(?<![\w./])(?:rm_)?sft\.(?=[a-z_])")
OF_SECOND = re.compile(rf"(?<![\w./])model\.(?=(?:{'|'.join(OF_MODEL)})\b)")
AS_SFT = "; null: as in the section sft"


class RewardSFTSettings(Section):
    """Change settings of the section `sft` for the reward model's base."""

    learning_rate: float | None = setting(None, f"peak learning rate{AS_SFT}", "per step", gt=0)
    num_train_epochs: float | None = setting(None, f"passes over the demonstrations{AS_SFT}", "epochs", gt=0)
    max_steps: int | None = setting(None, f"steps after which training ends{AS_SFT}", "optimizer steps", ge=1)
    per_device_train_batch_size: int | None = setting(
        None, f"demonstrations in one forward and backward pass{AS_SFT}", "rows", ge=1
    )
    gradient_accumulation_steps: int | None = setting(None, f"micro-batches per optimizer step{AS_SFT}", ge=1)
    max_length: int | None = setting(
        None, f"largest length of a row, in tokens of this base's tokenizer{AS_SFT}", "tokens", ge=8
    )
    on_too_long: TooLong | None = setting(None, f"what to do with a longer row{AS_SFT}")


class RewardBaseSettings(Section):
    """Name the base model of the reward model, or the shape of one that is trained from scratch.

    What is null here is as in the section `model` (the shape), or none (a template).
    """

    name_or_path: str | None = setting(
        None, "a folder, a Hub id or package:NAME; null: train one from scratch on data.documents, as `base` does"
    )
    revision: str | None = setting(None, "branch, tag or commit of the Hub id; null: main")
    chat_template: str | None = setting(None, "file with a Jinja chat template that replaces the model's")
    chat_template_kwargs: dict[str, TemplateValue] | None = setting(
        None, "variables passed to the chat template every time; null: none"
    )
    hidden_size: int | None = setting(None, "width of the model, from scratch", ge=1)
    num_hidden_layers: int | None = setting(None, "number of layers, from scratch", ge=1)
    num_attention_heads: int | None = setting(None, "attention heads, from scratch; must divide hidden_size", ge=1)
    intermediate_size: int | None = setting(None, "width of the feed-forward layers, from scratch", ge=1)
    max_position_embeddings: int | None = setting(None, "context length, from scratch", "tokens", ge=2)
    vocab_size: int | None = setting(
        None, "largest vocabulary of the tokenizer trained from scratch; another one makes another tokenizer", ge=8
    )
    sft: bool | RewardSFTSettings = setting(
        True,
        "whether the base is first fine-tuned on the demonstrations, as the paper's 6B was: true, with the settings of "
        "the section sft; {learning_rate: …}: with these changed; false: rm starts from the base as it is",
    )

    @field_validator("chat_template_kwargs")
    @classmethod
    def _none_is_null(cls, given: Any) -> Any:
        return given or None


def has_own_base(experiment: "Experiment") -> bool:
    """Return whether the reward model has a base model of its own."""
    return experiment.rm.base is not None


def trains_sft(experiment: "Experiment") -> bool:
    """Return whether that base model is fine-tuned on the demonstrations."""
    own = experiment.rm.base
    return own is not None and own.sft is not False


def trunk_stage(experiment: "Experiment") -> str:
    """Return the stage whose model the reward model starts as: sft, or one for its own base."""
    if not has_own_base(experiment):
        return "sft"
    return "rm_sft" if trains_sft(experiment) else "rm_base"


def trunk_stages(experiment: "Experiment") -> list[str]:
    """Return that stage if it is one of the reward model's own base, otherwise none."""
    return [trunk_stage(experiment)] if has_own_base(experiment) else []


def with_own_base(experiment: "Experiment") -> "Experiment":
    """Return the experiment with the reward model's base in the sections `model` and `sft`.

    The experiment itself where the reward model has no base of its own.
    """
    own = experiment.rm.base
    if own is None:
        return experiment
    changed = {key: value for key in SHAPE if (value := getattr(own, key)) is not None}
    changed |= {key: getattr(own, key) for key in OF_MODEL if key not in SHAPE}
    if own.name_or_path is not None and "publish_dtype" not in experiment.model.model_fields_set:
        changed["publish_dtype"] = "as_given"
    changed["adapter"] = None  # an adapter of somebody's is on the policy's base
    changed["control_tokens"] = None  # they ask a policy for good answers
    of_sft = {} if isinstance(own.sft, bool) else {k: v for k, v in own.sft.model_dump().items() if v is not None}
    return experiment.model_copy(
        update={
            "model": experiment.model.model_copy(update=changed),
            "sft": experiment.sft.model_copy(update=of_sft | {"ppo_init": None, "conditional": None}),
        }
    )


def own_names(line: str) -> str:
    """Return a line of base or sft with the settings of the second model by their own names."""
    return OF_SFT.sub("rm.base.sft.", OF_SECOND.sub("rm.base.", line))


def check(experiment: "Experiment") -> list[str]:
    """Return a line for each setting of rm.base that cannot work."""
    own = experiment.rm.base
    if own is None:
        return []
    seen = with_own_base(experiment)
    lines = base.template_problems(seen.model)
    if own.name_or_path is None:
        width, heads = seen.model.hidden_size, seen.model.num_attention_heads
        if width % heads or width // heads % 2:
            lines.append(
                f"rm.base.num_attention_heads: {heads} heads do not share a width of {width} evenly, in parts of an "
                f"even size; change hidden_size or num_attention_heads"
            )
        if all(getattr(own, key) is None for key in SHAPE):
            lines.append(
                "rm.base: names no model and no size, so it would be another model like the policy's; give a folder, a "
                "Hub id, or {hidden_size: …, num_hidden_layers: …}, or null"
            )
        lines += over_context(seen, "base") + uneven_batches(seen, "base")
    else:
        lines += [
            f"rm.base.{key}: has no effect beside rm.base.name_or_path, whose model has a shape; leave it out"
            for key in SHAPE
            if getattr(own, key) is not None
        ]
    if trains_sft(experiment):
        lines += over_context(seen, "sft") + uneven_batches(seen, "sft")
    return [own_names(line) for line in dict.fromkeys(lines)]


def missing_of_base(experiment: "Experiment") -> list[str]:
    """Return a line where the stage is asked for and no base of the reward model is set."""
    if has_own_base(experiment):
        return []
    return ["rm.base: is null, so the reward model starts from sft's model; name a model there"]


def missing_of_sft(experiment: "Experiment") -> list[str]:
    """Return a line for each thing that rm_sft lacks on this machine."""
    if not trains_sft(experiment):
        return missing_of_base(experiment) or ["rm.base.sft: is false, so there is nothing to train; set it to true"]
    return [own_names(line) for line in over_folder_context(with_own_base(experiment), "sft")]


def reads_of_base(experiment: "Experiment") -> list[str]:
    """Return the kinds of data that rm_base reads: documents, if it trains from scratch."""
    return base.reads(with_own_base(experiment)) if has_own_base(experiment) else []


def needs_nothing(experiment: "Experiment") -> list[str]:
    """Return the stages that rm_base needs: none."""
    return []


def needs_base(experiment: "Experiment") -> list[str]:
    """Return the stages that rm_sft needs."""
    return ["rm_base"]


def reads_demonstrations(experiment: "Experiment") -> list[str]:
    """Return the kinds of data that rm_sft reads."""
    return ["demonstrations"]


def folders(experiment: "Experiment") -> dict[str, Path]:
    """Return the folder of the reward model's base and the file of its chat template, if set."""
    if not has_own_base(experiment):
        return {}
    return {own_names(key): path for key, path in base.folders(with_own_base(experiment)).items()}


def hub_model(experiment: "Experiment") -> tuple[str, str] | None:
    """Return the setting and the Hub id of the reward model's base, if it is on the Hub."""
    found = base.hub_model(with_own_base(experiment)) if has_own_base(experiment) else None
    return None if found is None else (own_names(found[0]), found[1])


def run_base(ctx: "StageRun[BaseSettings, Experiment]") -> dict[str, Any]:
    """Run the stage base for the reward model's base."""
    from stages.base import run as run_stage

    try:
        return run_stage(ctx)
    except UserError as error:
        raise UserError([own_names(line) for line in error.lines]) from error


def run_sft(ctx: "StageRun[SFTSettings, Experiment]") -> dict[str, Any]:
    """Run the stage sft for the reward model's base."""
    from stages.sft import run as run_stage

    inputs = {"base" if name == "rm_base" else name: folder for name, folder in ctx.inputs.items()}
    manifests = {"base" if name == "rm_base" else name: manifest for name, manifest in ctx.manifests.items()}
    try:
        return run_stage(replace(ctx, inputs=inputs, manifests=manifests))
    except UserError as error:
        raise UserError([own_names(line) for line in error.lines]) from error


def own_fixed(stage: Stage, name: str) -> tuple[str | tuple[str, ...], ...]:
    """Return the settings that an interrupted run keeps, in the section of a second stage.

    Args:
        stage: The stage whose code runs.
        name: The stage of the second model.
    """
    named = []
    for entry in stage.fixed:
        keys = [re.sub(rf"^{stage.name}\.", f"{name}.", key) for key in ([entry] if isinstance(entry, str) else entry)]
        named.append(keys[0] if isinstance(entry, str) else tuple(keys))
    return tuple(named)


BASE_STAGE = Stage(
    name="rm_base",
    summary="Make the base model of the reward model ready, where it has one of its own (rm.base).",
    settings=BaseSettings,
    section="base",
    view=with_own_base,
    used=has_own_base,
    run=run_base,
    needs=needs_nothing,
    reads=reads_of_base,
    metrics=base.METRICS,
    headline=base.STAGE.headline,
    check=check,
    missing_requirements=missing_of_base,
    check_data=check_data,
    folders=folders,
    hub_model=hub_model,
    without={"documents": "name a model: rm.base.name_or_path"},
    fixed=own_fixed(base.STAGE, "rm_base"),
    shared=True,
)
SFT_STAGE = Stage(
    name="rm_sft",
    summary="Fine-tune the base model of the reward model on the demonstrations (rm.base.sft).",
    settings=SFTSettings,
    section="sft",
    view=with_own_base,
    used=trains_sft,
    run=run_sft,
    needs=needs_base,
    reads=reads_demonstrations,
    metrics=sft.METRICS,
    headline=sft.STAGE.headline,
    missing_requirements=missing_of_sft,
    check_data=check_data,
    fixed=own_fixed(sft.STAGE, "rm_sft"),
    shared=True,
)
