"""Ask a kind of device for what torch spells differently on each: cpu, cuda, mps.

cuda also means AMD's GPUs: a ROCm build of torch calls them so. mps is Apple's GPU. It has no
float64 and no record of its peak memory, and torch.distributed has no backend for it. torch is
imported inside the functions: a config is checked without it.
"""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def kind_of(asked: str) -> str:
    """Return "cpu", "cuda" or "mps", as launch.device asks; "auto" takes the first GPU kind."""
    if asked != "auto":
        return asked
    return next((kind for kind in ("cuda", "mps") if is_there(kind)), "cpu")


def is_there(kind: str) -> bool:
    """Return whether torch can compute on a kind of device on this machine."""
    import torch

    if kind == "cuda":
        return torch.cuda.is_available()
    return kind == "cpu" or torch.backends.mps.is_available()


def in_use() -> str:
    """Return the kind of device that this process has computed on; never import torch."""
    torch = sys.modules.get("torch")
    if torch is None:
        return "cpu"
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() and torch.mps.current_allocated_memory() > 0 else "cpu"


def count(kind: str) -> int:
    """Return the number of GPUs of a kind; 0 for the CPU, and for a kind that is not there."""
    import torch

    if kind == "cpu" or not is_there(kind):
        return 0
    return torch.cuda.device_count() if kind == "cuda" else 1


def name(kind: str, index: int = 0) -> str:
    """Return what a device is called, as "NVIDIA H200" or "Apple M3 Max"; the CPU is "cpu"."""
    import torch

    if kind == "cuda":
        return torch.cuda.get_device_name(index)
    if kind == "mps":
        return getattr(torch.backends.mps, "get_name", lambda: "Apple GPU")()
    return "cpu"


def total_memory(kind: str, index: int = 0) -> int | None:
    """Return the bytes of memory that a GPU has; None for the CPU.

    Apple's GPU shares the machine's memory: it is what the system recommends to use at most.
    """
    import torch

    if kind == "cuda":
        return torch.cuda.get_device_properties(index).total_memory
    return torch.mps.recommended_max_memory() if kind == "mps" else None


def reset_peak(kind: str) -> None:
    """Start measuring a GPU's peak memory again.

    Apple's has no such record: its unused memory is given back, from where `peak` counts up.
    """
    import torch

    if kind == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        empty_cache(kind)


def peak(kind: str) -> int | None:
    """Return the most bytes of a GPU that tensors have held since `reset_peak`; None for the CPU.

    Of Apple's GPU it is what torch holds now, its unused memory included, which only grows.
    """
    import torch

    if kind == "cuda":
        return torch.cuda.max_memory_allocated()
    return torch.mps.driver_allocated_memory() if kind == "mps" else None


def empty_cache(kind: str) -> None:
    """Give back the memory of a GPU that torch holds and does not use."""
    import torch

    if kind == "cuda":
        torch.cuda.empty_cache()
    elif kind == "mps":
        torch.mps.empty_cache()


def random_state(kind: str) -> "torch.Tensor":
    """Return the state of the device's random numbers, as bytes on the CPU."""
    import torch

    if kind == "cuda":
        return torch.cuda.get_rng_state()
    return torch.mps.get_rng_state() if kind == "mps" else torch.get_rng_state()


def set_random_state(kind: str, state: "torch.Tensor") -> None:
    """Continue the device's random numbers from a state of `random_state`."""
    import torch

    if kind == "cuda":
        torch.cuda.set_rng_state(state)
    elif kind == "mps":
        torch.mps.set_rng_state(state)
    else:
        torch.set_rng_state(state)


def in_float64(x: "torch.Tensor") -> "torch.Tensor":
    """Return a tensor in float64: where it is, or on the CPU if its device has no float64."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def computes_in(kind: str, dtype: str) -> bool:
    """Try whether a device computes a product and its gradient in "bfloat16" or "float16".

    With float16 the scaled gradient is also unscaled, as every optimizer step will.
    """
    import warnings

    import torch

    wanted = getattr(torch, dtype)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # autocast only warns of a dtype that it does not know
            weight = torch.ones(8, 8, device=kind, requires_grad=True)
            with torch.autocast(kind, wanted):
                product = weight @ weight
            scaler = torch.amp.GradScaler(kind, init_scale=2.0, enabled=dtype == "float16")
            scaler.scale(product.float().sum()).backward()
            scaler.unscale_(torch.optim.SGD([weight]))
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return False
    return product.dtype == wanted and weight.grad is not None and bool((weight.grad == 16).all())


def has_native_bfloat16(kind: str) -> bool:
    """Return whether a device has instructions for bfloat16; Apple's GPU is tried.

    torch computes bfloat16 on GPUs before Ampere, too, by slow emulation: that does not count.
    """
    import torch

    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "mps":
        return computes_in(kind, "bfloat16")
    cpu = torch.cpu.get_capabilities()
    return bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16") or cpu.get("bf16"))
