"""Define the settings of the engine that samples, and check that it is installed."""

import shutil
from importlib.util import find_spec
from os.path import expanduser
from typing import TYPE_CHECKING, Literal

from pipeline.config.section import Section, setting

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
)


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


OF_FINISHED = (
    "what samples the responses, with the keys of ppo.rollout, such as {engine: vllm}; null: the policy itself. The "
    "engine's distribution is compared with the policy's on a few prompts before it is used"
)
"""Meaning of `rankings.rollout` and `evaluate.rollout`."""


def uses_vllm(experiment: "Experiment", stage: str) -> bool:
    """Return whether vLLM samples the responses of a stage."""
    rollout = getattr(experiment, stage).rollout
    return rollout is not None and rollout.engine == "vllm"


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
