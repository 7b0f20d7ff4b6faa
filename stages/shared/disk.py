"""What a stage will write to disk, said when its models are made: published weights and checkpoints."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.stage import StageRun
from pipeline.store.files import free_bytes, human_bytes
from stages.models.adalora import triplets_of
from stages.models.adapters import is_adapted, plain, trainable
from stages.shared.publishing import publish_dtype


@dataclass(frozen=True)
class Written:
    """Bytes on disk when a stage is done. models: of the folders that it publishes; checkpoint: of one of them; kept:
    how many checkpoints stay."""

    models: int
    checkpoint: int
    kept: int

    @property
    def in_all(self) -> int:
        return self.models + self.checkpoint * self.kept


def written(
    published: Sequence,
    trained: Sequence,
    *,
    sets: int = 0,
    saves: int = 0,
    keep: int = 1,
    copies: int = 1,
    bytes_per_weight: int = 4,
) -> Written:
    """Compute what a stage writes.

    Args:
        published: the models that it publishes, adapters and all: each gets a folder with whole weights, and an adapter
            one with the adapter.
        trained: those of them that train; a checkpoint holds what trains of each and AdamW's two moments of it (and
            AdaLoRA's two averages).
        sets: further sets of the first one's trained weights in a checkpoint (the best so far, an average).
        saves: how many checkpoints are saved before the end.
        keep: how many of them stay.
        copies: how often each of `published` is published (an ensemble, a second start).
        bytes_per_weight: of published weights; what trains is float32.
    """
    models = sum(copies * (_weights(plain(m)) * bytes_per_weight + _adapter(m)) for m in published)
    sizes = [sum(4 * p.numel() for p in trainable(m).values()) for m in trained]
    times = [5 if triplets_of(m) else 3 for m in trained]
    checkpoint = sum(n * size for n, size in zip(times, sizes, strict=True)) + sets * sizes[0]
    return Written(models, checkpoint, min(keep, saves))


def _weights(model) -> int:
    """Weights of a model without its adapters."""
    return sum(_count(p) for name, p in model.named_parameters() if not _is_adapters(name))


def _count(parameter) -> int:
    """Numbers in a parameter, also of one that bitsandbytes holds in 4 bits, two to a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def _adapter(model) -> int:
    """Bytes of the adapter that is saved apart; 0 without one."""
    return sum(4 * p.numel() for p in trainable(model).values()) if is_adapted(model) else 0


def _is_adapters(name: str) -> bool:
    """Whether a parameter is peft's: of an adapter, or the original of a head that is trained in a copy."""
    return ".lora_" in name or ".ia3_" in name or ".original_module." in name


def say_written(ctx: StageRun, published: Sequence, trained: Sequence, steps: int, **options) -> None:
    """Say what the stage will write, before its first step.

    Args:
        ctx: the stage's context; its checkpoints say how often they are saved and how many stay.
        published, trained, options: as of `written`.
        steps: of the whole stage.
    """
    store = ctx.checkpoints
    sources = [ctx.inputs[stage] / "model" for stage in ("sft", "base") if stage in ctx.inputs]
    is_half = bool(sources) and publish_dtype(ctx, sources[0]) is not None
    found = written(
        published,
        trained,
        saves=(steps - 1) // store.every if store.every else 0,
        keep=store.keep,
        bytes_per_weight=2 if is_half else 4,
        **options,
    )
    line = f"writes {human_bytes(found.models)} of weights"
    if found.kept:
        line += f" and keeps {found.kept} checkpoint{'s' * (found.kept > 1)} of {human_bytes(found.checkpoint)}"
        line += f": {human_bytes(found.in_all)} in all" + ", at most" * (store.max_share is not None)
    room = free_bytes(ctx.publish)
    short = "" if room > found.in_all + found.checkpoint else "; make room, or lower checkpoints.keep"
    ctx.tracker.say(f"{ctx.stage}: {line}; {human_bytes(room)} are free{short}")
