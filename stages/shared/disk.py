"""Estimate what a stage will write to disk: published weights and checkpoints."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from pipeline.store.files import free_bytes, human_bytes
from stages.models.adalora import triplets_of
from stages.models.adapters import is_adapted, trainable_parameters, unwrapped
from stages.shared.provenance import Provenance
from stages.shared.publishing import publish_dtype
from stages.training.session import Session


@dataclass(frozen=True)
class Written:
    """Bytes on disk when a stage is done."""

    models: int
    """Bytes of the folders that it publishes."""
    checkpoint: int
    """Bytes of one checkpoint."""
    kept: int
    """Number of checkpoints that stay."""

    @property
    def in_all(self) -> int:
        """Bytes of everything."""
        return self.models + self.checkpoint * self.kept


def written(
    published: Sequence[nn.Module],
    trained: Sequence[nn.Module],
    *,
    sets: int = 0,
    saves: int = 0,
    keep: int = 1,
    copies: int = 1,
    bytes_per_weight: int = 4,
) -> Written:
    """Compute what a stage writes.

    Args:
        published: The models that it publishes, with their adapters: each gets a folder with whole
            weights, and one with the adapter.
        trained: Those of them that train. A checkpoint holds their trained weights and AdamW's two
            moments (and AdaLoRA's two averages).
        sets: Further sets of the first one's trained weights in a checkpoint (best, average).
        saves: Checkpoints saved before the end.
        keep: The most of them that stay.
        copies: How often each of `published` is published (an ensemble, a second start).
        bytes_per_weight: Bytes of a published weight; weights that train are float32.
    """
    models = sum(copies * (_weights(unwrapped(m)) * bytes_per_weight + _adapter_bytes(m)) for m in published)
    sizes = [_trained_bytes(m) for m in trained]
    times = [5 if triplets_of(m) else 3 for m in trained]
    checkpoint = sum(n * size for n, size in zip(times, sizes, strict=True)) + sets * sizes[0]
    return Written(models, checkpoint, min(keep, saves))


def _weights(model: nn.Module) -> int:
    """Count the weights of a model without its adapters."""
    return sum(_weights_in(p) for name, p in model.named_parameters() if not _is_adapters(name))


def _weights_in(parameter: nn.Parameter) -> int:
    """Count the weights in a parameter; bitsandbytes holds two 4-bit weights in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def _trained_bytes(model: nn.Module) -> int:
    """Return the bytes of the weights that train, in float32."""
    return sum(4 * p.numel() for p in trainable_parameters(model).values())


def _adapter_bytes(model: nn.Module) -> int:
    """Return the bytes of the adapter that is saved by itself; 0 without one."""
    return _trained_bytes(model) if is_adapted(model) else 0


def _is_adapters(name: str) -> bool:
    """Return whether a parameter is an adapter's, or the original of a head that peft copied."""
    return any(part in name for part in (".lora_", ".ia3_", ".soft_", ".original_module."))


def say_written(
    session: Session,
    provenance: Provenance,
    published: Sequence[nn.Module],
    trained: Sequence[nn.Module],
    steps: int,
    *,
    sets: int = 0,
    copies: int = 1,
) -> None:
    """Print what the stage will write, before its first step.

    Args:
        session: The run; its checkpoints say how often they are saved and how many stay.
        provenance: What the models are made of; its folder is where they are written.
        published: As `written` takes them.
        trained: As `written` takes them.
        steps: Steps of the whole stage.
        sets: As `written` takes them.
        copies: As `written` takes them.
    """
    store = session.checkpoints
    sources = [provenance.inputs[stage] / "model" for stage in ("sft", "base") if stage in provenance.inputs]
    is_half = bool(sources) and publish_dtype(provenance, sources[0]) is not None
    total = written(
        published,
        trained,
        sets=sets,
        copies=copies,
        saves=(steps - 1) // store.every if store.every else 0,
        keep=store.keep,
        bytes_per_weight=2 if is_half else 4,
    )
    line = f"writes {human_bytes(total.models)} of weights"
    if total.kept:
        plural = "s" if total.kept > 1 else ""
        line += f" and keeps {total.kept} checkpoint{plural} of {human_bytes(total.checkpoint)}"
        line += f": {human_bytes(total.in_all)} in all"
        if store.max_share is not None:
            line += ", at most"
    free = free_bytes(provenance.publish)
    line += f"; {human_bytes(free)} are free"
    if free <= total.in_all + total.checkpoint:  # one more is written before the oldest is removed
        line += "; make room, or lower checkpoints.keep"
    session.say(line)
