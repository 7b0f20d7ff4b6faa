"""What a stage computes with: device, dtype, packing, sharding, and the context of its model."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.launch import parallel
from pipeline.stage import StageRun
from stages.settings.checks import context_of, too_long_for


@dataclass(frozen=True)
class Runtime:
    """How a stage computes: where, in which numbers, and how rows go through its models."""

    device: str
    """"cpu" or "cuda"."""
    dtype: str
    """"float32" or "bfloat16": what products are computed in; trained weights stay float32."""
    attention: str
    """Attention kernel, as model.attn_implementation."""
    sharded: bool
    """Whether each of several processes holds a shard of the weights that train (fsdp2)."""
    gradient_checkpointing: bool
    """Whether activations are recomputed in the backward pass."""
    trust_remote_code: bool
    """Whether code that a model brings may run."""
    accelerator: Any = None
    """accelerate's Accelerator (autocast, backward, device); None where trl makes its own."""
    packed: bool = False
    """Whether the responses of a prompt share one row, in which the prompt is computed once."""


def runtime_of(ctx: StageRun) -> Runtime:
    """Return how this run computes. The accelerator, and whether rows are packed, are known later."""
    model = ctx.experiment.model
    return Runtime(
        device=device_of(ctx.experiment),
        dtype=dtype_of(ctx.experiment),
        attention=model.attn_implementation,
        sharded=is_sharding(ctx),
        gradient_checkpointing=model.gradient_checkpointing,
        trust_remote_code=ctx.trust_remote_code,
    )


def device_of(experiment) -> str:
    """ "cpu" or "cuda", as launch.device asks ("auto": a GPU if there is one)."""
    import torch

    asked = experiment.launch.device
    return ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked


def dtype_of(experiment) -> str:
    """ "float32" or "bfloat16", as model.dtype asks ("auto": bfloat16 where the hardware computes in it)."""
    import torch

    asked = experiment.model.dtype
    if asked != "auto":
        return asked
    if experiment.launch.device != "cpu" and torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    cpu = torch.cpu.get_capabilities()
    return "bfloat16" if cpu.get("avx512_bf16") or cpu.get("amx_bf16") or cpu.get("bf16") else "float32"


def check_context(ctx: StageRun, folder: Path, *lengths: str) -> None:
    """UserError if the stage's max_length, or another of its lengths that is named, is more than the model in `folder`
    can read; a line if it is more than leaves shorter rows as they are."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if lines := too_long_for(context_of(config), ctx.config, ctx.stage, *lengths):
        raise UserError(lines)
    bound, longest = bound_of_short_rows(config), ctx.config.max_length  # others' rows are all as long
    if bound is not None and longest > bound:
        ctx.tracker.say(
            f"{ctx.stage}: a row of more than {bound} tokens changes the numbers of shorter rows beside it (longrope "
            f"positions), and {ctx.stage}.max_length is {longest}; set {ctx.stage}.max_length: {bound}"
        )


def bound_of_short_rows(config: dict) -> int | None:
    """Return the longest row, in tokens, of a batch in which each row's numbers are its own; None where that is any.

    longrope takes other frequencies for a whole batch once one of its rows is longer than
    original_max_position_embeddings. ("dynamic" does so beyond the context, which no row may be.)

    Args:
        config: A model's config.json; of one with a language model inside, that part's settings count.
    """
    found = []
    for part in (config, config.get("text_config") or {}):
        ropes = [rope for name in ("rope_parameters", "rope_scaling") if isinstance(rope := part.get(name), dict)]
        ropes += [rope for kinds in ropes for rope in kinds.values() if isinstance(rope, dict)]  # of kinds of layers
        for rope in ropes:
            if rope.get("rope_type", rope.get("type")) in ("longrope", "su"):
                length = rope.get("original_max_position_embeddings", part.get("original_max_position_embeddings"))
                found += [length] * isinstance(length, int)
    return min(found, default=None)


def is_sharding(ctx: StageRun) -> bool:
    """Whether each of several processes holds a part of what trains (launch.strategy: fsdp2)."""
    return parallel.rank_and_world_size()[1] > 1 and ctx.experiment.launch.strategy == "fsdp2"


def place(ctx: StageRun, make: Callable, accelerator):
    """make(), a model that trains, on its device; or this process's part of it."""
    from stages.models.roles import settled

    model = settled(make, accelerator, ctx.config.max_length, is_sharding(ctx))
    if ctx.experiment.model.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model


def note_default_rate(ctx: StageRun, *keys: str) -> None:
    """Say so where adapters train and a learning rate is the default, which suits the training of every weight. keys:
    of the stage's learning rates; by default learning_rate."""
    if ctx.experiment.model.peft is None:
        return
    for key in keys or ("learning_rate",):
        if key not in ctx.config.model_fields_set:
            rate = getattr(ctx.config, key)
            ctx.tracker.say(
                f"{ctx.stage}: {key} is the default {rate:g}, which suits the training of every weight; for adapters "
                f"about ten times as much is usual: {ctx.stage}.{key}={10 * rate:g}"
            )


def adapter_settings(model_section) -> dict | None:
    """The `model.peft` section as keyword arguments; None where every weight trains."""
    peft = model_section.peft
    return (
        None
        if peft is None
        else {
            "method": peft.method,
            "r": peft.r,
            "lora_alpha": peft.lora_alpha,
            "lora_dropout": peft.lora_dropout,
            "target_modules": peft.target_modules,
            "init_r": peft.init_r,
            "bits": (peft.bits or 4) if peft.method == "qlora" else None,
        }
    )


def packing(ctx: StageRun, *models) -> bool:
    """Whether rows go through `models` packed, with each prompt computed once; a line says so where they cannot."""
    from stages.models.packing import can_pack

    packs = all([can_pack(model, ctx.config.max_length) for model in models])
    if not packs:
        problem = "this model, or its attention kernel, cannot read packed rows"
        ctx.tracker.say(f"{ctx.stage}: {problem}; each response gets a padded row of its own")
    return packs
