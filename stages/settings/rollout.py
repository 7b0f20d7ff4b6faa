"""Define the settings of the engine that samples, and check that it is installed."""

import shutil
from importlib.util import find_spec
from os.path import expanduser
from typing import TYPE_CHECKING, Any, Literal

from pydantic import field_validator

from pipeline.config.checks import IN_PLACE
from pipeline.config.section import Section, setting
from stages.settings.peft import peft_of

if TYPE_CHECKING:
    from stages.settings.experiment import Experiment

ENVIRONMENT = "python3 -m venv .vllm && .vllm/bin/pip install vllm"
INSTALL = (  # what to do where vLLM is missing
    f"{ENVIRONMENT} (stages/README.md: which without a GPU), and launch.vllm.python: .vllm/bin/python"
)
SET_BY_PPO = (  # arguments of vLLM that `make_vllm`, `Vllm` and vllm_server.py set
    "model",
    "dtype",
    "seed",
    "trust_remote_code",
    "logprobs_mode",
    "generation_config",
    "disable_log_stats",
    "enable_chunked_prefill",
    "enable_lora",
    "max_lora_rank",
    "max_loras",
    "max_cpu_loras",
    "enable_sleep_mode",
)


CLIP_MAX = 3.0  # of the weights of a correction, as trl's vllm_importance_sampling_clip_max


class EngineSettings(Section):
    """Choose what samples the responses of a policy."""

    engine: Literal["transformers", "vllm"] = setting(
        "transformers",
        "transformers: the policy itself; vllm: see launch.vllm (a resumed run may then not produce the same bytes)",
    )
    max_engine_kl: float = setting(
        0.01,
        "largest KL between the distribution that another engine samples from and the policy; above it the engine "
        "counts as failed",
        "nats per token",
        gt=0,
    )
    on_failure: Literal["stop", "transformers"] = setting(
        "stop", "what to do if vLLM fails; stop: save a checkpoint and exit 3; transformers: continue without vLLM"
    )


class RolloutSettings(EngineSettings):
    """Choose what samples the responses.

    The policy recomputes the log-probabilities of responses that vLLM sampled.
    """

    correction: Literal["token", "sequence"] | None = setting(
        None,
        "weigh what another engine sampled by the policy's probability over the engine's in the policy's loss: of each "
        "token (low variance) or of the whole response (unbiased, for short ones); none or null: no weights. The "
        "policy's own samples need none",
    )
    correction_clip_max: float | None = setting(
        None, f"largest weight of the correction; null: {CLIP_MAX:g}, as trl's vllm_importance_sampling_clip_max", gt=0
    )
    correction_clip_min: float | None = setting(None, "smallest weight of the correction; null: 0", ge=0)
    correction_outliers: Literal["truncate", "mask"] | None = setting(
        None,
        "what becomes of a weight beyond these; truncate: it becomes the bound; mask: it becomes 0; null: truncate. "
        "sampling/importance_sampling_outliers counts them",
    )

    @field_validator("correction", mode="before")
    @classmethod
    def _none_is_null(cls, value: Any) -> Any:
        return None if value == "none" else value


def correction_problems(settings: RolloutSettings) -> list[str]:
    """Return a line for each setting of the correction that would have no effect or is at odds."""
    if settings.correction is None:
        return [
            f"ppo.rollout.{key}: has no effect without a correction; set ppo.rollout.correction, or leave it out"
            for key in ("correction_clip_max", "correction_clip_min", "correction_outliers")
            if getattr(settings, key) is not None
        ]
    largest = CLIP_MAX if settings.correction_clip_max is None else settings.correction_clip_max
    if settings.correction_clip_min is not None and settings.correction_clip_min >= largest:
        return [
            f"ppo.rollout.correction_clip_min: {settings.correction_clip_min:g} is not below the largest weight "
            f"{largest:g}; use less, at most 1"
        ]
    return []


def no_vllm(method: str) -> str:
    """Return why vLLM cannot sample from a model with an adapter that stays in it."""
    return (
        f"vllm runs its own code of the model, which has no place for the adapter of {method}, and it cannot be merged "
        f"into weights; use transformers"
    )


def hand_over_problems(experiment: "Experiment") -> list[str]:
    """Return a line for each way of handing PPO's weights to vLLM that cannot work."""
    launch, peft, lines = experiment.launch.vllm, peft_of(experiment, "ppo"), []
    if not uses_vllm(experiment, "ppo"):
        return []
    if peft is not None and peft.method in IN_PLACE:
        return [f"ppo.rollout.engine: {no_vllm(peft.method)}"]
    if launch.hand_over == "memory" and (launch.devices is not None or launch.tensor_parallel_size > 1):
        lines.append(
            "launch.vllm.hand_over: memory works only on the GPU that the weights are on; use files, or leave out "
            "devices and tensor_parallel_size"
        )
    if launch.adapter_alone and (peft is None or peft.method != "lora"):
        method = "null" if peft is None else peft.method
        lines.append(
            f"launch.vllm.adapter_alone: vLLM takes only LoRA, and model.peft.method is {method}; use lora, or leave "
            f"it out"
        )
    return lines


OF_FINISHED = (
    "what samples the responses, with these keys of ppo.rollout, such as {engine: vllm}; null: the policy itself. The "
    "engine's distribution is compared with the policy's on a few prompts before it is used"
)
"""Meaning of `rankings.rollout` and `evaluate.rollout`."""


def uses_vllm(experiment: "Experiment", stage: str) -> bool:
    """Return whether vLLM samples the responses of a stage."""
    rollout = getattr(experiment, stage).rollout
    return rollout is not None and rollout.engine == "vllm"


def sampling_with_vllm(experiment: "Experiment") -> list[str]:
    """Return the stages whose responses vLLM samples."""
    stages = ["rankings", "ppo", "evaluate"]
    if experiment.data.rankings is not None:
        stages.remove("rankings")  # nothing is sampled
    return [stage for stage in stages if uses_vllm(experiment, stage)]


def missing_engine(experiment: "Experiment", stage: str) -> list[str]:
    """Return a line if a stage is to sample with vLLM, and it is not installed."""
    if not uses_vllm(experiment, stage):
        return []
    return missing_vllm(experiment, f"{stage}.rollout.engine")


def missing_vllm(experiment: "Experiment", key: str) -> list[str]:
    """Return a line if vLLM is not installed.

    Args:
        experiment: The validated experiment.
        key: The setting that asks for it.
    """
    python = experiment.launch.vllm.python
    if python is None and find_spec("vllm") is None:
        return [f"{key}: vllm is not installed here; {INSTALL}"]
    if python is not None and shutil.which(expanduser(python)) is None:
        return [f"launch.vllm.python: {python} is not a program; {INSTALL}"]
    return []
