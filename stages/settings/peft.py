"""Let a stage change the section model.peft for itself: `ppo.peft: {r: 8}`, or `rm.peft: full`."""

import copy
from importlib import util
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import create_model
from pydantic.fields import FieldInfo

from pipeline.config.checks import OF_METHODS, cut_adapter_problems, peft_problems, sharding_problems
from pipeline.config.section import Section, setting
from pipeline.config.sections import ModelSettings, PeftSettings
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
    own = getattr(experiment, stage).peft
    if own is None or own == "full":
        return []
    peft, place = peft_of(experiment, stage), f"{stage}.peft"
    assert peft is not None
    lines = peft_problems(peft, place) + sharding_problems(peft, experiment.launch.strategy, place)
    return lines + cut_adapter_problems(experiment, peft, place)


def missing_package(experiment: "Experiment", stage: str) -> list[str]:
    """Return a line if a stage needs the package of QLoRA, and it is not installed.

    Args:
        experiment: The validated experiment.
        stage: One of TRAINING.
    """
    peft = peft_of(experiment, stage)
    return [MISSING] if peft is not None and peft.method == "qlora" and util.find_spec("bitsandbytes") is None else []
