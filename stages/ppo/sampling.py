"""PPO's sampling engine: what `ppo.rollout` and `launch.vllm` ask for, found, started, or refused with a remedy."""

import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from os.path import expanduser
from pathlib import Path
from typing import Literal

from data.streams import derive_seed
from pipeline.errors import UserError
from pipeline.stage import StageRun
from stages.models.roles import Roles
from stages.rollouts.vllm import EngineLost, Vllm
from stages.settings.training import Section, setting
from stages.shared.inputs import dtype_of

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


def engine_of(ctx: StageRun, start: Path) -> Vllm | None:
    """vLLM for the model in the folder `start`, not started yet; None where the policy samples by itself."""
    c = ctx.config
    if c.rollout.engine != "vllm":
        return None
    where, folder = ctx.experiment.launch.vllm, ctx.publish.with_name(".tmp-vllm")
    if where.folder is not None:
        folder = Path(where.folder).expanduser() / f"rlhf-{derive_seed(folder.resolve())}"  # this run's own
    return Vllm(
        start,
        folder,
        ctx.checkpoints.folder.with_name("vllm.log"),
        python=sys.executable if where.python is None else expanduser(where.python),
        devices=where.devices,
        dtype=dtype_of(ctx.experiment),
        timeout=0.9 * ctx.experiment.launch.timeout,  # before other processes lose patience with the first one
        arguments={
            "seed": 0,  # each sample has its own
            "max_model_len": c.max_length,
            "max_num_seqs": c.local_rollout_forward_batch_size,
            "tensor_parallel_size": where.tensor_parallel_size,
            "gpu_memory_utilization": where.gpu_memory_utilization,
            "trust_remote_code": ctx.trust_remote_code,
            **where.options,
        },
    )


def start_engine(ctx: StageRun, roles: Roles, poll: Callable[[], None]) -> None:
    """A UserError where vLLM does not start and nothing may go on without it."""
    ctx.tracker.say("ppo: vLLM starts")
    engine = roles.engine
    try:
        engine.start(roles.policy, poll)
    except EngineLost as lost:
        engine.close()
        if ctx.config.rollout.on_failure == "stop":
            remedy = "see launch.vllm and vLLM's own words"
            if "No module named 'vllm'" in str(lost):
                remedy = INSTALL
            raise UserError(f"ppo.rollout.engine: {lost}, with {engine.python}; {remedy}") from lost
        ctx.tracker.say(f"ppo: {lost}; sampling goes on without it")
