"""Turn the settings of rollout engines into the plain values that engines are built from."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pipeline.config.sections import LaunchSettings
from pipeline.launch import parallel
from stages.rollouts.engine import EngineRules, EngineSpec
from stages.rollouts.frozen import FrozenSampler
from stages.settings.rollout import EngineSettings
from stages.shared.runtime import Runtime

MOST_ROWS = 256
"""Responses that another engine samples at a time, at most, for stages that do not train;
launch.vllm.options may set another number (max_num_seqs)."""


def engine_spec(
    name: str,
    model: Path,
    runtime: Runtime,
    launch: LaunchSettings,
    *,
    work: Path,
    pad_id: int,
    max_length: int,
    batch_size: int,
) -> EngineSpec:
    """Return what an engine is built from.

    Args:
        name: Name of the engine, as in `ENGINES`.
        model: Folder of the model that is sampled from, or of the first of several.
        runtime: How the stage computes, with its accelerator.
        launch: The section launch, which may have a section for the engine.
        work: The stage's folder: for the engine's temporary files and its log.
        pad_id: Token id that pads rows.
        max_length: The longest prompt and response together, in tokens.
        batch_size: How many responses to sample at a time.
    """
    section = getattr(launch, name, None)  # launch.vllm, for example
    return EngineSpec(
        model=model,
        scratch=work / f".tmp-{name}",
        log=work / f"{name}.log",
        device=runtime.accelerator.device,
        dtype=runtime.dtype,
        autocast=runtime.accelerator.autocast,
        pad_id=pad_id,
        max_length=max_length,
        batch_size=batch_size,
        timeout=0.9 * launch.timeout,  # before the other ranks lose patience with rank 0
        trust_remote_code=runtime.trust_remote_code,
        launch={} if section is None else section.model_dump(),
    )


def engine_rules(settings: EngineSettings) -> EngineRules:
    """Return when an engine counts as lost."""
    return EngineRules(max_engine_kl=settings.max_engine_kl, stop_if_lost=settings.on_failure == "stop")


def make_frozen_sampler(
    stage: str, rollout: EngineSettings, spec: EngineSpec, say: Callable[[str], None]
) -> FrozenSampler:
    """Return what samples from finished policies, not started yet.

    Args:
        stage: Name of the stage, for messages.
        rollout: Its section rollout.
        spec: What engines are built from; its batch_size is of one process, and another engine
            than the policy itself serves all of them.
        say: Prints a line.
    """
    rows = min(MOST_ROWS, spec.batch_size * parallel.rank_and_world_size()[1])
    return FrozenSampler(stage, rollout.engine, replace(spec, batch_size=rows), engine_rules(rollout), say)
