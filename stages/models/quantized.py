"""Quantize frozen linear layers with bitsandbytes, for adapters to train on.

4 bits: NF4 with quantized scales (QLoRA, Dettmers 2023). 8 bits: one scale per row (LLM.int8(),
Dettmers 2022).

The weight is dequantized for each product, forward and backward. LLM.int8() also rounds
activations, which would make a row's numbers depend on the other rows of its batch, and would train
a model that no dequantized weights reproduce.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipeline.errors import UserError
from stages.models.packages import MISSING

BLOCK, SCALES = 64, 256  # weights that share a scale, and scales that share one, as in the paper


class Quantized(nn.Linear):
    """A linear layer, (…, in) → (…, out), with a quantized weight.

    What it holds are plain tensors, so that it can be moved, copied and shared (`share_frozen`)
    like any layer. None of them trains.
    """

    def __init__(self, layer: nn.Linear, bits: int) -> None:
        nn.Module.__init__(self)  # nn.Linear's would allocate a float weight
        self.in_features, self.out_features, self.bits = layer.in_features, layer.out_features, bits
        self.bias = layer.bias
        for name, x in quantized_tensors(layer.weight.detach(), bits).items():
            setattr(self, name, nn.Parameter(x, requires_grad=False))

    def dequantized(self) -> Tensor:
        """Return the weight, (out, in), in float32."""
        functional = bitsandbytes_functions()
        if self.bits == 8:
            return functional.int8_vectorwise_dequant(self.weight, self.scales)
        known = {"absmax": self.scales, "code": self.code, "blocksize": SCALES}
        absmax = functional.dequantize_blockwise(self.absmax, **known) + self.offset
        state = functional.QuantState(absmax, (len(absmax), BLOCK), None, BLOCK, "nf4", torch.float32)
        flat = functional.dequantize_4bit(self.weight, state).flatten()
        return flat[: self.out_features * self.in_features].view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Return x · Wᵀ + b in autocast's dtype."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return _Product.apply(x.to(dtype), self)


class _Product(torch.autograd.Function):
    """Compute x · Wᵀ + b and dequantize W again in the backward pass.

    Kept between the passes, the dequantized weights of all layers would be the whole model in
    floats.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, layer.dequantized().to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return grad @ ctx.layer.dequantized().to(grad.dtype), None


@torch.no_grad()
def quantized_tensors(weight: Tensor, bits: int) -> dict[str, Tensor]:
    """Quantize a weight, on the device that it is on.

    Models are loaded on the CPU, so the bytes do not depend on the device that trains.

    Args:
        weight: (out, in).
        bits: 4 or 8.

    Returns:
        The tensors that `Quantized` holds. 8 bits: `weight`, int8 (out, in), and `scales` (out,). 4
        bits: `weight`, two values per byte in whole blocks; `absmax`, a byte for each BLOCK of
        them; `scales`, `offset` (1,) and the table `code` (256,), which turn absmax into floats.
    """
    functional = bitsandbytes_functions()
    if bits == 8:
        whole, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        return {"weight": whole, "scales": scales}
    # One block per row: on a CPU, bitsandbytes 0.50.2 takes wrong scales for rows of 16, 32, 48,
    # 80 … weights.
    rows = F.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    nibbles, first = functional.quantize_4bit(rows, blocksize=BLOCK, quant_type="nf4")
    with torch.device("cpu"):  # stages/tools/memory.py makes models on the meta device
        code = functional.create_dynamic_map()
    offset, code = first.absmax.mean().view(1), code.to(weight.device)  # a scalar could not be sharded
    absmax, second = functional.quantize_blockwise(first.absmax - offset, code=code, blocksize=SCALES)
    return {"weight": nibbles, "absmax": absmax, "scales": second.absmax, "offset": offset, "code": code}


def quantize(model: nn.Module, bits: int, apart_from: Sequence[str] = ()) -> None:
    """Quantize every linear layer of a model except its output embedding or scalar head.

    Args:
        model: The model; changed.
        bits: 4 or 8.
        apart_from: Names of modules that train in full, with all below them.
    """
    apart = [model.get_output_embeddings(), getattr(model, "score", None), getattr(model, "classifier", None)]
    found = [
        name
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear
        and all(layer is not x for x in apart)
        and not any(f"{name}.".startswith(f"{kept}.") for kept in apart_from)
    ]
    if not found:
        raise UserError(
            f"model.peft.method: qlora quantizes nn.Linear layers, and this {model.config.model_type} model has none; "
            f"use lora"
        )
    for name in found:
        model.set_submodule(name, Quantized(model.get_submodule(name), bits))


@torch.no_grad()
def dequantize(model: nn.Module) -> None:
    """Turn quantized layers back into linear ones, with the float32 weights they computed with.

    The model may have adapters.
    """
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, Quantized)]:
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        linear.weight, linear.bias = nn.Parameter(layer.dequantized(), requires_grad=False), layer.bias
        model.set_submodule(name, linear.train(layer.training))


def bitsandbytes_functions() -> Any:
    """Return bitsandbytes' functions; raise UserError if it is not installed."""
    try:
        import bitsandbytes.functional as functional
    except ImportError as problem:
        raise UserError(MISSING) from problem
    return functional
