"""Compute in 16 bits: the gradient scaler of float16, and frozen weights that are cast once.

Under autocast a linear layer casts its weight at each use. If no optimizer changes the weight,
casting it once gives the same numbers at half the memory.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from pipeline.errors import UserError
from stages.models.adapters import is_adapted, plain_name, unwrapped
from stages.models.ensemble import members

MIXED = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
"""model.dtype → accelerate's name for it."""
DTYPES = {name: dtype for dtype, name in MIXED.items()}
"""accelerate's name → model.dtype."""
CAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""accelerate's name → the dtype that autocast casts to."""
FIRST_SCALE = 2.0**16
"""Factor of the loss before the first step, as torch has it."""
GROWTH_STEPS = 2000
"""Steps without an overflow after which the factor is doubled, as torch has it."""


def compute_in_float16(accelerator: Any) -> None:
    """Give accelerate's Accelerator, made for "fp16", autocast to float16 and a gradient scaler.

    On a CPU accelerate has neither, though torch computes both; so one code runs everywhere. The
    scaler is torch's. The norm and cosine of gradients are taken of unscaled ones, or divided by
    the scale, which is exact: it is a power of two.
    """
    device = accelerator.device
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler(device.type, init_scale=FIRST_SCALE, growth_interval=GROWTH_STEPS)
    # the scale is a tensor from the first use on, which a process without rows would not come to
    accelerator.scaler.scale(torch.zeros((), device=device))


def casting(device: str, dtype: str) -> AbstractContextManager:
    """Return autocast to a dtype.

    Args:
        device: "cpu", "cuda" or "mps".
        dtype: "float32" (nothing is cast), "bfloat16" or "float16".
    """
    is_cast = dtype != "float32"
    return torch.autocast(device, getattr(torch, dtype) if is_cast else torch.bfloat16, enabled=is_cast)


def require_finite(x: torch.Tensor, what: str) -> None:
    """Check that all numbers are finite. Those of a model that does not train have no other check.

    Args:
        x: The numbers.
        what: What they are, and whose: "dpo: log-probabilities of the reference".

    Raises:
        UserError: One is not.
    """
    if not x.isfinite().all():
        raise UserError(
            f"{what} are not finite: float16 overflows above 65504, or a weight is damaged; set model.dtype: bfloat16 "
            f"or float32"
        )


def frozen(model: nn.Module, dtype: str) -> nn.Module:
    """Freeze a model that only predicts, and hold its weights in the dtype that it computes in.

    Args:
        model: In float32; changed. Whether it packs rows is tried before, in float32 (`can_pack`).
        dtype: "float32", "bfloat16" or "float16", which products are computed in.
    """
    model.requires_grad_(False)
    if dtype != "float32":
        cast_frozen(model, getattr(torch, dtype))
    return model


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the frozen weights that autocast would cast at each use, in place."""
    for member in members(model):
        for p in castable(member):
            if not p.requires_grad:
                p.data = p.data.to(dtype)


def castable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that may be cast if they are frozen.

    They are those of linear layers, except the scalar head, which computes in float32, and a head
    that is also the embedding. Under DoRA there are none: its norms are those of the float32
    weights.
    """
    if is_adapted(model) and any(getattr(c, "use_dora", False) for c in model.peft_config.values()):
        return []
    inner = unwrapped(model)
    apart = [inner.get_input_embeddings(), getattr(inner, "score", None), getattr(inner, "classifier", None)]
    kept = {id(p) for module in apart if module is not None for p in module.parameters()}
    linear = [module for module in inner.modules() if type(module) is nn.Linear]
    return [p for module in linear for p in module.parameters() if id(p) not in kept]


def uncast(model: nn.Module, reload: Callable[[], nn.Module]) -> None:
    """Restore in float32 what `cast_frozen` has cast.

    Args:
        model: The model; changed.
        reload: Loads the model that it was made from, in float32.
    """
    named = unwrapped(model).named_parameters()
    cast = [(name, p) for name, p in named if p.is_floating_point() and p.dtype != torch.float32]  # integers: quantized
    if cast:
        known = {plain_name(name): p for name, p in unwrapped(reload()).named_parameters()}
        for name, p in cast:
            p.data = known[plain_name(name)].data.to(p.device)
