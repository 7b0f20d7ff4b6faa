"""Let a stage change the section model.peft for itself: `ppo.peft: {r: 8}`, or `rm.peft: full`."""

import copy
from importlib import util
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import create_model
from pydantic.fields import FieldInfo

from pipeline.config.checks import OF_METHODS, PREFIX, SOFT, cut_adapter_problems, peft_problems
from pipeline.config.section import Section, setting
from pipeline.config.sections import ModelSettings, PeftSettings, local_folder
from stages.models.packages import MISSING

if TYPE_CHECKING:
    from stages.settings.experiment import Experiment

TRAINING = ("sft", "rm", "ppo", "dpo")
"""The stages that may train adapters."""


class _Changes(Section):
    """Change keys of model.peft for one stage; a key that is null is as there."""

    is_listed: ClassVar[bool] = False


def _unset(info: FieldInfo) -> tuple[Any, FieldInfo]:
    """Return a setting with null for its default."""
    info = copy.copy(info)
    annotation: Any = info.annotation
    info.annotation, info.default = annotation | None, None
    return annotation | None, info


_FIELDS: dict[str, Any] = {name: _unset(info) for name, info in PeftSettings.model_fields.items()}
PeftChanges = create_model("PeftChanges", __base__=_Changes, __doc__=_Changes.__doc__, **_FIELDS)

if TYPE_CHECKING:  # a checker of types cannot see the fields of a class that is made when it runs
    StagePeft = _Changes | Literal["full"] | None
else:
    StagePeft = PeftChanges | Literal["full"] | None


def peft_setting() -> Any:
    """Return the setting `peft` of a stage."""
    return setting(
        None,
        "keys of model.peft that differ in this stage, such as {r: 8}; with another method, settings that it does not "
        "have are left out. full: train all weights here; null: as model.peft",
    )


def model_of(experiment: "Experiment", stage: str) -> ModelSettings:
    """Return the section `model` as a stage reads it, with its own adapter.

    Args:
        experiment: The validated experiment.
        stage: The stage; only those of TRAINING can change anything.
    """
    return experiment.model.model_copy(update={"peft": peft_of(experiment, stage)})


def peft_of(experiment: "Experiment", stage: str) -> PeftSettings | None:
    """Return how a stage trains adapters; None if it trains all weights.

    Args:
        experiment: The validated experiment.
        stage: As of `model_of`.
    """
    stage = "sft" if stage == "rm_sft" else stage  # it sees its settings in the section sft
    given, own = experiment.model.peft, getattr(experiment, stage).peft if stage in TRAINING else None
    if own is None or own == "full":
        return given if own is None else None
    values = {} if given is None else {key: getattr(given, key) for key in PeftSettings.model_fields}
    changes = {key: value for key in PeftSettings.model_fields if (value := getattr(own, key)) is not None}
    method = changes.get("method", values.get("method"))
    if method != values.get("method"):
        values = {key: value for key, value in values.items() if method in OF_METHODS.get(key, (method,))}
    return PeftSettings(**values | changes)


def stage_problems(experiment: "Experiment", stage: str) -> list[str]:
    """Return a line for each mistake in the adapter settings of a stage.

    Args:
        experiment: The validated experiment.
        stage: One of TRAINING.
    """
    own, peft = getattr(experiment, stage).peft, peft_of(experiment, stage)
    if peft is None:
        return []
    if own is None:
        return prefix_problems(experiment, stage, "model.peft")
    place = f"{stage}.peft"
    lines = peft_problems(peft, place) + prefix_problems(experiment, stage, place)
    lines += cut_adapter_problems(experiment, peft, place)
    return lines + own_problems(experiment, stage, peft)


def prefix_problems(experiment: "Experiment", stage: str, place: str) -> list[str]:
    """Return a line if a stage trains a prefix that its policy cannot begin with.

    Args:
        experiment: The validated experiment.
        stage: One of TRAINING.
        place: The key that its adapter settings stand under.
    """
    peft, of_sft, given = peft_of(experiment, stage), peft_of(experiment, "sft"), experiment.model.name_or_path
    if stage not in ("ppo", "dpo") or peft is None or peft.method not in PREFIX:
        return []
    folder = local_folder(given)  # of a model that may have a prefix
    if (of_sft is not None and of_sft.method in PREFIX) or (folder and (folder / "adapter_config.json").is_file()):
        return []
    return [
        f"{place}.method: {peft.method} begins away from sft's model, which {stage} has to begin as; train sft with "
        f"{peft.method} too, or use another method in {stage}"
    ]


def own_problems(experiment: "Experiment", stage: str, peft: PeftSettings) -> list[str]:
    """Return a line for each adapter setting that a stage cannot have for itself.

    Args:
        experiment: The validated experiment.
        stage: One of TRAINING.
        peft: Its adapter, which its own settings changed.
    """
    own, place, given, lines = getattr(experiment, stage).peft, f"{stage}.peft", experiment.model.peft, []
    if own.lora_dropout and stage != "sft":
        lines.append(f"{place}.lora_dropout: {own.lora_dropout} has no effect; only sft trains with dropout")
    for key in ("prompt_tuning_init", "prompt_tuning_init_text"):
        if (value := getattr(own, key)) is not None:
            lines.append(
                f"{place}.{key}: {value} has no effect in {stage}, since `base` adds the soft prompt; set "
                f"model.peft.{key}"
            )
    from_scratch = experiment.model.name_or_path is None  # a given model may have one already
    if from_scratch and peft.method in SOFT and (given is None or given.method not in SOFT):
        lines.append(
            f"{place}.method: {peft.method} trains a soft prompt that `base` adds, and model.peft asks for none; set "
            f"model.peft.method: {peft.method}, and {stage}.peft where the stages differ"
        )
    return lines


def missing_package(experiment: "Experiment", stage: str) -> list[str]:
    """Return a line if a stage needs the package of QLoRA, and it is not installed.

    Args:
        experiment: The validated experiment.
        stage: One of TRAINING.
    """
    peft = peft_of(experiment, stage)
    return [MISSING] if peft is not None and peft.method == "qlora" and util.find_spec("bitsandbytes") is None else []
