"""Define the settings of PPO's sampling engine, and check that the engine is installed."""

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


class RolloutSettings(Section):
    """Choose what samples the responses.

    The policy recomputes the log-probabilities of responses that vLLM sampled.
    """

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


def missing_engine(experiment: "Experiment") -> list[str]:
    """Return a line if vLLM is chosen and not installed."""
    python = experiment.launch.vllm.python
    if experiment.ppo.rollout.engine != "vllm":
        return []
    if python is None and find_spec("vllm") is None:
        return [f"ppo.rollout.engine: vllm is not installed here; {INSTALL}"]
    if python is not None and shutil.which(expanduser(python)) is None:
        return [f"launch.vllm.python: {python} is not a program; {INSTALL}"]
    return []
