"""Start LoRA from the principal part of each weight: PiSSA (Meng 2024), OLoRA (Büyükakyüz 2024).

Both write W = (W − s·B₀A₀) + s·BA, with A = A₀ and B = B₀ at the start, and train A and B. peft
stores W − s·B₀A₀ as the base weight. Here the base weight stays W and the layer computes

    W x + s (B A x − B₀ A₀ x)

which is the same function with the same gradients. So the difference at the start is exactly 0 in
every dtype, the model with its adapter off is the reference, and models share the weights that
do not train.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import UserError
from stages.models.publish import edit_json

NAME = "default"  # of peft's adapter


class Departure:
    """Compute what an adapter adds as its difference from its start; a variant of peft's LoRA."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """Return the layer's result with s (B A x − B₀ A₀ x) added."""
        inputs = module.lora_dropout[active_adapter](x)
        learned = module.lora_B[active_adapter](module.lora_A[active_adapter](inputs))
        start = F.linear(F.linear(x, module.start_A), module.start_B)
        return result + (learned - start) * module.scaling[active_adapter]

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the weight with s (B A − B₀ A₀) added."""
        learned = module.lora_B[active_adapter].weight @ module.lora_A[active_adapter].weight
        change = (learned - module.start_B @ module.start_A) * module.scaling[active_adapter]
        return orig_weight + (change.T if module.fan_in_fan_out else change).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Add s (B A − B₀ A₀) to the weight."""
        orig_weight.data = Departure.merge_safe(module, active_adapter, orig_weight.data)


@torch.no_grad()
def start_from(model: nn.Module, how: str) -> None:
    """Start the LoRA layers of a model from their own weights.

    Args:
        model: A PeftModel with a fresh LoRA adapter; changed.
        how: "pissa" or "olora".

    Raises:
        UserError: A layer is an embedding, or smaller than the rank.
    """
    for name, layer in model.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        plain = name.removeprefix("base_model.model.")
        if NAME not in layer.lora_A:
            raise UserError(
                f"model.peft.init_lora_weights: {how} splits linear layers, and {plain} is none; leave it out of "
                f"target_modules"
            )
        right, left = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
        if len(right) > min(layer.in_features, layer.out_features):
            raise UserError(
                f"model.peft.r: {len(right)} is more than {plain} "
                f"({layer.out_features} × {layer.in_features}) has for init_lora_weights: {how}; lower it"
            )
        if not right.is_meta:  # `rlhf doctor --memory` asks for shapes only
            base = layer.get_base_layer()
            weight = base.dequantized() if hasattr(base, "dequantized") else base.weight
            split = split_pissa if how == "pissa" else split_olora
            parts = split((weight.T if layer.fan_in_fan_out else weight).double(), len(right), layer.scaling[NAME])
            left.copy_(parts[0])
            right.copy_(parts[1])
        depart(layer)


def depart(layer: Any) -> None:
    """Let a LoRA layer compute its difference from what its matrices are now."""
    layer.register_buffer("start_A", layer.lora_A[NAME].weight.detach().clone(), persistent=False)
    layer.register_buffer("start_B", layer.lora_B[NAME].weight.detach().clone(), persistent=False)
    layer.lora_variant[NAME] = Departure()


def restore_start(model: Any, rank: int, scale: float) -> None:
    """Turn plain LoRA that `as_lora` made of a start back into what it was made of.

    Args:
        model: A PeftModel with LoRA of twice the rank and the scale 1; changed.
        rank: r.
        scale: s.
    """
    for layer in model.modules():
        if not hasattr(layer, "lora_A") or NAME not in layer.lora_A:
            continue
        right, left = layer.lora_A[NAME], layer.lora_B[NAME]
        (new_right, start_right), (new_left, start_left) = (
            right.weight.data.split(rank),
            (left.weight.data / scale).split(rank, dim=1),
        )
        right.weight.data, left.weight.data = new_right.clone(), new_left.clone()
        right.out_features = left.in_features = layer.r[NAME] = rank
        layer.scaling[NAME] = scale
        layer.register_buffer("start_A", start_right.clone(), persistent=False)
        layer.register_buffer("start_B", -start_left, persistent=False)
        layer.lora_variant[NAME] = Departure()
    config = model.peft_config[NAME]
    config.r, config.lora_alpha = rank, scale * rank


def split_pissa(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Split off the largest singular values (equations 2 and 3 of the paper).

    They come from the eigenvectors of the smaller of W Wᵀ and Wᵀ W, in float64: several times
    faster than a whole decomposition, and far more precise than float32.

    Args:
        weight: W, (out, in), in float64.
        rank: r.
        scale: s.

    Returns:
        B (out, r) and A (r, in) with s·B·A the best approximation of W of that rank.
    """
    if weight.shape[0] > weight.shape[1]:
        right, left = split_pissa(weight.T, rank, scale)
        return left.T, right.T
    values, vectors = torch.linalg.eigh(weight @ weight.T)
    vectors = vectors[:, -rank:].flip(1)
    roots = (values[-rank:].flip(0).clamp_min(0).sqrt() / scale).sqrt()  # √(σ/s)
    return vectors * roots, (vectors.T @ weight) / (roots * scale).clamp_min(1e-30).unsqueeze(1)


def split_olora(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return the first r columns of Q and rows of R of W = Q R (as B and A, as in peft).

    Args:
        weight: W, (out, in), in float64.
        rank: r.
        scale: Not used: what is split off is s·B·A.
    """
    q, r = torch.linalg.qr(weight)
    return q[:, :rank], r[:rank]


def departs(model: nn.Module) -> bool:
    """Return whether LoRA layers of a model compute their difference from a start."""
    return any(hasattr(layer, "start_A") for layer in model.modules())


def as_lora(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of an adapter that plain LoRA computes the same with.

    s (BA − B₀A₀) is one product of twice the rank: [sB, −sB₀] [A; A₀].

    Args:
        model: The model; where it has no start, the tensors are returned.
        tensors: As peft saves them, whole.
    """
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "start_A")}
    plain = dict(tensors)
    for name, layer in layers.items():
        right, left = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        if left in tensors and tensors[left].numel():  # other ranks gather nothing
            scale, like = layer.scaling[NAME], tensors[left]
            plain[right] = torch.cat([tensors[right], layer.start_A.to(like)])
            plain[left] = torch.cat([like, -layer.start_B.to(like)], dim=1) * scale
    return plain


def lora_config(model: nn.Module, config: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of adapter_config.json that go with `as_lora`.

    Args:
        model: The model.
        config: The entries for the adapter as it is.
    """
    if not departs(model):
        return config
    rank = 2 * config["r"]
    return config | {"r": rank, "lora_alpha": rank, "use_rslora": False}  # their quotient is 1


def write_as_lora(model: nn.Module, folder: Path) -> None:
    """Rewrite an adapter that peft has saved as plain LoRA; without a start it stays as it is.

    Args:
        model: The model.
        folder: Holds adapter_config.json and adapter_model.safetensors.
    """
    from safetensors.torch import load_file, save_file

    if not departs(model):
        return
    path = folder / "adapter_model.safetensors"
    tensors = {name: x.contiguous() for name, x in as_lora(model, load_file(path)).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    edit_json(folder / "adapter_config.json", lambda config: lora_config(model, config))
