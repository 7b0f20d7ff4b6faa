"""PPO's sampling engine: what `ppo.rollout` and `launch.vllm` ask for, found, started, or refused with a remedy."""

import sys
from collections.abc import Callable
from os.path import expanduser
from pathlib import Path

from data.streams import derive_seed
from pipeline.errors import UserError
from pipeline.stage import StageRun
from stages.models.roles import Roles
from stages.rollouts.vllm import EngineLost, Vllm
from stages.settings.rollout import INSTALL
from stages.shared.runtime import dtype_of


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
