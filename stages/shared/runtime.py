"""Decide how a stage computes: device, dtype, packing, sharding; check its lengths."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from pipeline.config.checks import PREFIX_TOKENS, layout_problems
from pipeline.errors import UserError
from pipeline.launch import devices, parallel
from pipeline.stage import StageRun
from stages.models.layout import Layout, layout_of
from stages.settings.checks import context_of, too_long_for
from stages.settings.reward_base import own_names

if TYPE_CHECKING:  # a session is made with this module, and models load torch
    from stages.models.adapters import AdapterSettings
    from stages.models.compiled import Compiling
    from stages.models.soft_prompts import SoftPrompt
    from stages.training.session import Session


@dataclass(frozen=True)
class Runtime:
    """Say how a stage computes: its device, its precision, and how rows go through its models."""

    device: str
    """"cpu", "cuda" or "mps"."""
    dtype: str
    """"float32", "bfloat16" or "float16": what products are computed in; trained weights stay
    float32."""
    attention: str
    """Attention kernel, as model.attn_implementation."""
    sharded: bool
    """Whether weights are held in shares: of several processes, or in the CPU's memory."""
    gradient_checkpointing: bool
    """Whether activations are recomputed in the backward pass."""
    trust_remote_code: bool
    """Whether code that a model brings may run."""
    accelerator: Any = None
    """accelerate's Accelerator (autocast, backward, device); None where trl makes its own."""
    packed: bool = False
    """Whether the responses of a prompt share one row, in which the prompt is computed once."""
    layout: Layout = field(default_factory=Layout)
    """What else is sharded or offloaded while a model trains."""
    compile: bool | None = False
    """Whether decoder layers are compiled, as model.compile; None: on a GPU where they can be."""

    def load_options(self) -> dict[str, Any]:
        """Return the keyword arguments that `load_policy` and `new_reward_model` take from here."""
        return {"attn_implementation": self.attention, "trust_remote_code": self.trust_remote_code}


def runtime_of(ctx: StageRun) -> Runtime:
    """Return how this run computes; accelerator and packing are known later."""
    model, dtype = ctx.experiment.model, dtype_of(ctx.experiment)
    if lines := layout_problems(ctx.experiment.launch, dtype):
        raise UserError(lines)
    return Runtime(
        device=device_of(ctx.experiment),
        dtype=dtype,
        attention=model.attn_implementation,
        sharded=is_sharding(ctx.experiment),
        gradient_checkpointing=model.gradient_checkpointing,
        trust_remote_code=ctx.trust_remote_code,
        layout=layout_of(ctx.experiment.launch, parallel.rank_and_world_size()[1]),
        compile=model.compile,
    )


def with_accelerator(runtime: Runtime) -> Runtime:
    """Return the runtime with an accelerator for its device and dtype."""
    return replace(runtime, accelerator=make_accelerator(runtime.device, runtime.dtype))


def make_accelerator(device: str, dtype: str) -> Any:
    """Return accelerate's Accelerator: device, backward pass, autocast to `dtype`.

    With float16 it has a gradient scaler, with which its backward pass scales every loss.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import GradientAccumulationPlugin

    from stages.models.precision import MIXED, compute_in_float16

    # We accumulate sums divided by counts of the whole batch. Without this, a setting of the
    # launcher in the environment would divide once more.
    once = GradientAccumulationPlugin(num_steps=1)
    # accelerate keeps one device and dtype a process; an earlier experiment may have had others
    if (shared := AcceleratorState._shared_state) and (
        shared.get("_mixed_precision") != MIXED[dtype] or shared["device"].type != device
    ):
        AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=MIXED[dtype], gradient_accumulation_plugin=once)
    if dtype == "float16":
        compute_in_float16(accelerator)
    return accelerator


def device_of(experiment: Any) -> str:
    """Return "cpu", "cuda" or "mps", as launch.device asks ("auto": a GPU if there is one)."""
    return devices.kind_of(experiment.launch.device)


def dtype_of(experiment: Any) -> str:
    """Return "float32", "bfloat16" or "float16", as model.dtype asks.

    "auto" gives bfloat16 where the hardware computes in it, and float16 on other CUDA GPUs.
    """
    dtype, device = experiment.model.dtype, device_of(experiment)
    if dtype != "auto":
        return dtype
    if not devices.is_there(device):  # a GPU whose memory is computed elsewhere
        device = "cpu"
    if devices.has_native_bfloat16(device):
        return "bfloat16"
    return "float16" if device == "cuda" else "float32"


def is_sharding(experiment: Any) -> bool:
    """Return whether weights are held in shares: of several processes, or in the CPU's memory."""
    return experiment.launch.divides_weights(parallel.rank_and_world_size()[1])


def saves_together(experiment: Any) -> bool:
    """Return whether several processes save together, as each has a share of something."""
    return parallel.rank_and_world_size()[1] > 1 and experiment.launch.shares_state


def check_context(session: Session, section: BaseModel, folder: Path, *lengths: str, ahead: int = 0) -> None:
    """Check that the stage's rows fit the context of a model.

    Prints a line where long rows would change the results of shorter rows beside them.

    Args:
        session: The run.
        section: The stage's settings, with max_length.
        folder: The folder of the model.
        lengths: Names of further settings that are lengths of rows.
        ahead: Tokens of a new prefix before each row; that of a model in `folder` is known.

    Raises:
        UserError: A length is more than the model's context.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stage = session.stage
    adapter = folder / "adapter_config.json"
    if not ahead and adapter.is_file():
        ahead = json.loads(adapter.read_text(encoding="utf-8")).get("num_virtual_tokens", 0)
    if lines := too_long_for(context_of(config), section, stage, *lengths, ahead=ahead):
        raise UserError(lines)
    bound, longest = bound_of_short_rows(config), section.max_length  # rows of the other lengths are all equally long
    if bound is not None and longest > bound:
        session.say(
            f"a row of more than {bound} tokens changes the results of shorter rows beside it (longrope "
            f"positions), and {stage}.max_length is {longest}; set {stage}.max_length: {bound}"
        )


def bound_of_short_rows(config: dict) -> int | None:
    """Return the longest row, in tokens, that leaves the results of other rows of its batch alone.

    longrope takes other frequencies for a whole batch once one of its rows is longer than
    original_max_position_embeddings. ("dynamic" does so beyond the context, which no row exceeds.)

    Args:
        config: A model's config.json; if it has a language model inside, that part counts.

    Returns:
        The bound; None where rows never influence each other.
    """
    bounds = []
    for section in (config, config.get("text_config") or {}):
        ropes = [rope for name in ("rope_parameters", "rope_scaling") if isinstance(rope := section.get(name), dict)]
        for by_layer_kind in list(ropes):  # some families have one rope for each kind of layer
            ropes += [rope for rope in by_layer_kind.values() if isinstance(rope, dict)]
        for rope in ropes:
            if rope.get("rope_type", rope.get("type")) in ("longrope", "su"):
                length = rope.get("original_max_position_embeddings", section.get("original_max_position_embeddings"))
                if isinstance(length, int):
                    bounds.append(length)
    return min(bounds, default=None)


def compiling_of(runtime: Runtime, session: Session) -> Compiling | None:
    """Return whether the decoder layers of rm, dpo and ppo are compiled; None if they are not.

    Args:
        runtime: How the stage computes.
        session: The run, which says where they cannot be.
    """
    from stages.models.compiled import Compiling

    together = parallel.arrangement().together > 1
    if runtime.compile is False or (runtime.compile is None and (runtime.device != "cuda" or together)):
        return None
    return Compiling(bool(runtime.compile), session.say)


def place_model(make: Callable[[], Any], runtime: Runtime, max_length: int, compiling: Compiling | None = None) -> Any:
    """Make a model that trains and move it to its device; with fsdp2, this rank's shard of it.

    Args:
        make: Returns the model, on the CPU.
        runtime: How the stage computes, with its accelerator.
        max_length: The longest row, in tokens.
        compiling: Whether its layers are compiled; None: they are not.
    """
    from stages.models.activations import offload_activations
    from stages.models.roles import make_on_device

    model = make_on_device(make, runtime.accelerator, max_length, runtime.sharded, runtime.layout, compiling)
    cut_rows_of(model)
    if runtime.gradient_checkpointing:
        model.activation_checkpointing_enable()
    if runtime.layout.offload_activations:
        offload_activations(model)
    return model


def cut_rows_of(model: Any) -> None:
    """Let a model that trains compute its part of each row, if launch.context_parallel asks for it.

    Args:
        model: The model, which was tried with packed rows.

    Raises:
        UserError: It cannot.
    """
    if parallel.arrangement().context == 1:
        return
    from stages.models.adapters import unwrapped
    from stages.models.context_parallel import FLAG
    from stages.models.forward import head_is_linear

    inner = unwrapped(model)
    check_cuts_rows(model)
    if inner.get_output_embeddings() is not None and not head_is_linear(model):
        raise UserError(
            f"launch.context_parallel: the logits of a {type(inner).__name__} are more than the unembedding times "
            f"hidden states, which rm and dpo compute in parts; set it to 1"
        )
    inner.__dict__[FLAG] = True


def check_cuts_rows(model: Any) -> None:
    """Check that a model can compute rows in parts.

    Args:
        model: The model, which was tried with packed rows.

    Raises:
        UserError: It cannot.
    """
    from stages.models.adapters import unwrapped
    from stages.models.packing import reads_packed_rows

    inner, why = unwrapped(model), None
    if not reads_packed_rows(model):
        why = "its attention has a window, or takes no other mask"
    elif bound_of_short_rows(inner.config.to_dict()) is not None:
        why = "longrope's positions depend on the length of the whole row"
    if why is not None:
        raise UserError(
            f"launch.context_parallel: a {type(inner).__name__} cannot compute rows in parts here ({why}); set it to 1"
        )


def place_frozen(load: Callable[[], Any], runtime: Runtime, max_length: int) -> Any:
    """Load a model that does not train and move it to its device; with fsdp2, this rank's shard.

    Args:
        load: Loads the model on the CPU.
        runtime: How the stage computes, with its accelerator.
        max_length: The longest row, in tokens.
    """
    from stages.models.roles import make_on_device

    return make_on_device(
        lambda: load().requires_grad_(False), runtime.accelerator, max_length, runtime.sharded, runtime.layout
    )


def note_default_rate(session: Session, section: BaseModel, *keys: str) -> None:
    """Print a line where adapters train at a default rate, which suits the training of all weights.

    To be called only where adapters train.

    Args:
        session: The run.
        section: The stage's settings.
        keys: Names of its learning rates; without any, learning_rate.
    """
    for key in keys or ("learning_rate",):
        if key not in section.model_fields_set:
            rate = getattr(section, key)
            session.say(
                f"{key} is the default {rate:g}, which suits the training of every weight; for adapters "
                f"about ten times as much is usual: {own_names(f'{session.stage}.{key}')}={10 * rate:g}"
            )


def adapter_settings(model_section: Any) -> AdapterSettings:
    """Return the section `model.peft` as plain values; method None if every weight trains."""
    from stages.models.adapters import AdapterSettings

    peft = model_section.peft
    if peft is None:
        return AdapterSettings()
    return AdapterSettings(
        method=peft.method,
        r=peft.r,
        lora_alpha=peft.lora_alpha,
        lora_dropout=peft.lora_dropout,
        target_modules=peft.target_modules,
        init_r=peft.init_r,
        bits=(peft.bits or 4) if peft.method == "qlora" else None,
        bottleneck_size=peft.bottleneck_size,
        bottleneck_activation=peft.bottleneck_activation,
        bottleneck_scale=peft.bottleneck_scale,
        num_virtual_tokens=peft.num_virtual_tokens or PREFIX_TOKENS,
        prefix_projection=bool(peft.prefix_projection),
        encoder_hidden_size=peft.encoder_hidden_size,
        exclude_modules=peft.exclude_modules,
        layers_to_transform=peft.layers_to_transform,
        modules_to_save=tuple(peft.modules_to_save or ()),
        use_rslora=bool(peft.use_rslora),
        start=peft.init_lora_weights,
        soft_prompt=soft_prompt_settings(peft),
    )


def soft_prompt_settings(peft: Any) -> SoftPrompt | None:
    """Return what the section `model.peft` says of a soft prompt; None for other methods."""
    from stages.models.soft_prompts import COUNT, SOFT_METHODS, SoftPrompt

    if peft.method not in SOFT_METHODS:
        return None
    usual = "sample_vocab" if peft.prompt_tuning_init_text is None else "text"
    return SoftPrompt(
        method=peft.method,
        count=peft.num_virtual_tokens or COUNT,
        init=peft.prompt_tuning_init or usual,
        init_text=peft.prompt_tuning_init_text,
        encoder=peft.encoder_reparameterization_type or "mlp",
        encoder_hidden_size=peft.encoder_hidden_size,
    )


def can_pack_rows(session: Session, models: list, max_length: int) -> bool:
    """Return whether all models can read packed rows, in which each prompt is computed once.

    Prints a line where they cannot.

    Args:
        session: The run.
        models: The models, on their device. All are tried, so that each knows how it is read.
        max_length: The longest row, in tokens.
    """
    from stages.models.packing import can_pack

    packs = all([can_pack(model, max_length) for model in models])
    if not packs:
        problem = "this model, or its attention kernel, cannot read packed rows"
        session.say(f"{problem}; each response gets a padded row of its own")
    return packs
