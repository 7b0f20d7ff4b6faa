"""Hand weights to vLLM on this machine without a file of them: shared memory, or the adapter alone.

A handle names memory that another process can open: on a GPU by CUDA IPC, as vLLM's own "ipc"
transfer does (whose trainer half would need vLLM in this environment), and on a CPU in shared
memory. A handle is pickled as torch's multiprocessing pickles it.
"""

import base64
import io
from collections.abc import Iterator
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.launch import parallel
from stages.models.adapters import has_adapter, unwrapped
from stages.models.principal import as_lora, lora_config
from stages.models.publish import edit_json
from stages.models.sharding import gather_tensors

BATCH_BYTES = 2 * 2**30  # about the size of a batch of weights, which are copies where dtypes differ
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values that vLLM's max_lora_rank takes


def batches(tensors: Iterator[tuple[str, Tensor]], size: int = BATCH_BYTES) -> Iterator[tuple[dict[str, Tensor], bool]]:
    """Yield named tensors in batches of about `size` bytes, and whether a batch is the last one."""
    batch: dict[str, Tensor] = {}
    for name, x in tensors:
        if batch and sum(tensor.nbytes for tensor in batch.values()) + x.nbytes > size:
            yield batch, False
            batch = {}
        batch[name] = x
    yield batch, True


def shareable(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight in `dtype` in memory that can be shared.

    On a GPU that is the weight itself if it has the dtype. On a CPU it is a copy, because sharing
    would move the weight itself to shared memory.

    Args:
        x: The weight.
        dtype: What a weight of floating-point numbers becomes.
    """
    dtype = dtype if x.is_floating_point() else x.dtype
    return x.detach().to(dtype=dtype, copy=x.device.type == "cpu").contiguous()


def handle_of(x: Tensor) -> str:
    """Return what another process on this machine opens a tensor by; the tensor must live on."""
    before = torch.multiprocessing.get_sharing_strategy()
    # by name: the other one would pass a file descriptor, which is not text
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        pickled = io.BytesIO()
        ForkingPickler(pickled).dump(x)
    finally:
        torch.multiprocessing.set_sharing_strategy(before)
    return base64.b64encode(pickled.getvalue()).decode()


def lora_arguments(model: nn.Module) -> dict[str, Any]:
    """Return the arguments of vllm.LLM for a policy's adapter, or refuse to hand it over alone.

    Args:
        model: An adapted policy.

    Raises:
        UserError: It is not plain LoRA on linear layers inside the trunk.
    """
    config = model.peft_config["default"]
    inner = unwrapped(model)
    problem = None
    if getattr(config, "peft_type", None) != "LORA" or config.use_dora:
        problem = "only LoRA can be handed over alone"
    elif set(config.modules_to_save or ()) - {"score"}:
        problem = "vLLM takes no modules_to_save beside an adapter"
    elif any(has_adapter(end) for end in (inner.get_input_embeddings(), inner.get_output_embeddings()) if end):
        problem = "the embedding or the head has an adapter too"
    elif rank_of(model) > RANKS[-1]:
        problem = f"vLLM takes no rank above {RANKS[-1]}"
    if problem:
        raise UserError(f"launch.vllm.adapter_alone: {problem}; set it to false")
    rank = next(rank for rank in RANKS if rank >= rank_of(model))
    return {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1, "max_cpu_loras": 1}


def rank_of(model: nn.Module) -> int:
    """Return the rank of a policy's adapter as plain LoRA, which is how vLLM gets it."""
    return lora_config(model, {"r": model.peft_config["default"].r})["r"]


def write_adapter(model: nn.Module, folder: Path, dtype: torch.dtype) -> str | None:
    """Write a policy's adapter as peft's two files. All ranks gather; rank 0 writes.

    Args:
        model: A policy with a LoRA adapter.
        folder: Is created.
        dtype: Dtype of the adapter's matrices.

    Returns:
        Why it cannot be written; None if it is. Other ranks than 0 return None.
    """
    from peft import get_peft_model_state_dict

    tensors = gather_tensors(get_peft_model_state_dict(model, save_embedding_layers=False))
    if not parallel.is_rank_zero():
        return None
    tensors = as_lora(model, tensors)
    config = model.peft_config["default"]
    config.base_model_name_or_path = ""
    try:
        folder.mkdir(parents=True)
        save_file(
            {name: x.to("cpu", dtype).contiguous() for name, x in tensors.items()}, folder / "adapter_model.safetensors"
        )
        config.save_pretrained(str(folder))
        edit_json(folder / "adapter_config.json", partial(lora_config, model))
    except OSError as error:  # the disk is full
        return str(error)
    return None
