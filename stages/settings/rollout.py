"""Settings of the sampling engine of ppo, and whether that engine is installed."""

import shutil
from importlib.util import find_spec
from os.path import expanduser
from typing import Literal

from stages.settings.training import Section, setting

ENVIRONMENT = "python3 -m venv .vllm && .vllm/bin/pip install vllm"
INSTALL = (  # what to do where vLLM is missing
    f"{ENVIRONMENT} (README says which without a GPU), and launch.vllm.python: .vllm/bin/python"
)
SET_HERE = (  # of vLLM's arguments: by `engine_of`, `Vllm` and vllm_server.py
    "model", "dtype", "seed", "trust_remote_code", "logprobs_mode", "generation_config", "disable_log_stats",
    "enable_chunked_prefill",
)  # fmt: skip


class RolloutConfig(Section):
    """What samples. Log-probs of what vLLM samples are computed again by the policy itself."""

    engine: Literal["transformers", "vllm"] = setting(
        "transformers",
        "the policy itself; or vLLM, see launch.vllm (a run that resumes need not end in the same bytes then)",
    )
    max_engine_kl: float = setting(
        0.01, "KL of what vLLM samples from to the policy above which it has failed", "nats a token", gt=0
    )
    on_failure: Literal["stop", "transformers"] = setting(
        "stop", "where vLLM fails: a checkpoint and exit 3, or go on without it"
    )


def no_engine(experiment) -> list[str]:
    """A line if vLLM is to sample and launch.vllm.python has none."""
    python = experiment.launch.vllm.python
    if experiment.ppo.rollout.engine != "vllm":
        return []
    if python is None and find_spec("vllm") is None:
        return [f"ppo.rollout.engine: vllm is not installed here; {INSTALL}"]
    if python is not None and shutil.which(expanduser(python)) is None:
        return [f"launch.vllm.python: {python} is no program; {INSTALL}"]
    return []
