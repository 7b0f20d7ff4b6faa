"""List the rollout engines by the names that `rollout.engine` takes, and build their specs."""

from collections.abc import Callable
from pathlib import Path

from pipeline.config.sections import LaunchSettings
from stages.rollouts.engine import EngineRules, EngineSpec, RolloutEngine
from stages.rollouts.transformers import TransformersEngine
from stages.rollouts.vllm import make_vllm
from stages.settings.rollout import EngineSettings
from stages.shared.runtime import Runtime

ENGINES: dict[str, Callable[[EngineSpec], RolloutEngine]] = {"transformers": TransformersEngine, "vllm": make_vllm}


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
