"""Linear layers whose frozen weights bitsandbytes holds in 4 bits (NF4, its scales quantised too: QLoRA, Dettmers 2023)
or in 8 (a scale a row: LLM.int8(), Dettmers 2022), for adapters to train on.

Either is made float again for each product, forward and backward: rounding the activations too, as LLM.int8() does,
would make a row's numbers hang on the rows beside it, and would train a model that no plain weights are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipeline.errors import UserError
from stages.models.packages import MISSING

BLOCK, SCALES = 64, 256  # weights that share a scale, and scales that share one, as in the paper


class Quantized(nn.Linear):
    """A linear layer, (…, in) → (…, out), its weight packed. What it holds are plain tensors, so that it moves, is
    copied and is shared (`share_frozen`) like any; none of them trains."""

    def __init__(self, layer: nn.Linear, bits: int):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bits = layer.in_features, layer.out_features, bits
        self.bias = layer.bias
        for name, x in packed(layer.weight.detach(), bits).items():
            setattr(self, name, nn.Parameter(x, requires_grad=False))

    def dequantized(self) -> Tensor:
        """The weight (out, in) in float32."""
        functional = library()
        if self.bits == 8:
            return functional.int8_vectorwise_dequant(self.weight, self.scales)
        known = {"absmax": self.scales, "code": self.code, "blocksize": SCALES}
        absmax = functional.dequantize_blockwise(self.absmax, **known) + self.offset
        state = functional.QuantState(absmax, (len(absmax), BLOCK), None, BLOCK, "nf4", torch.float32)
        flat = functional.dequantize_4bit(self.weight, state).flatten()
        return flat[: self.out_features * self.in_features].view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return _Product.apply(x.to(dtype), self)


class _Product(torch.autograd.Function):
    """x · Wᵀ + b. W is made anew for the backward pass: kept for it, all layers' would be the whole model in float."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, layer.dequantized().to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad @ ctx.layer.dequantized().to(grad.dtype), None


@torch.no_grad()
def packed(weight: Tensor, bits: int) -> dict[str, Tensor]:
    """weight (out, in) → what `Quantized` holds of it, where it lies. Models are loaded on the CPU, so that the bytes
    are the same whatever they are trained on.

    8: int8 (out, in) and `scales` (out,). 4: two weights a byte, in whole blocks; `absmax`, a byte for each BLOCK of
    them; `scales`, `offset` and the table `code` (256,), which make floats of those.
    """
    functional = library()
    if bits == 8:
        whole, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        return {"weight": whole, "scales": scales}
    # a row a block: bitsandbytes 0.50.2 takes wrong scales on a CPU where rows are of 16, 32, 48, 80 … weights
    rows = F.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    nibbles, first = functional.quantize_4bit(rows, blocksize=BLOCK, quant_type="nf4")
    with torch.device("cpu"):  # stages/tools/memory.py makes models on none
        code = functional.create_dynamic_map()
    offset, code = first.absmax.mean(), code.to(weight.device)
    absmax, second = functional.quantize_blockwise(first.absmax - offset, code=code, blocksize=SCALES)
    return {"weight": nibbles, "absmax": absmax, "scales": second.absmax, "offset": offset, "code": code}


def quantize(model, bits: int) -> None:
    """Every linear layer of a transformers model becomes Quantized, but for its output embedding or scalar head."""
    apart = [model.get_output_embeddings(), getattr(model, "score", None), getattr(model, "classifier", None)]
    found = [
        name for name, layer in model.named_modules() if type(layer) is nn.Linear and all(layer is not x for x in apart)
    ]
    if not found:
        raise UserError(
            f"model.peft.method: qlora quantizes nn.Linear layers, and this {model.config.model_type} model has none; "
            f"use lora"
        )
    for name in found:
        model.set_submodule(name, Quantized(model.get_submodule(name), bits))


@torch.no_grad()
def dequantize(model) -> None:
    """The reverse, adapted or not: plain layers, with the float32 weights that were computed with."""
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, Quantized)]:
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        linear.weight, linear.bias = nn.Parameter(layer.dequantized(), requires_grad=False), layer.bias
        model.set_submodule(name, linear.train(layer.training))


def library():
    """bitsandbytes' functions; a UserError where it is not installed."""
    try:
        import bitsandbytes.functional as functional
    except ImportError as problem:
        raise UserError(MISSING) from problem
    return functional
