"""Write and read folders of models with adapters that cannot be merged into weights.

Such a folder has the base model's weights in base/, a folder by itself, and beside it
adapter_config.json and adapter_model.safetensors. A prefix is written in peft's format. peft has no
bottleneck adapters, so these have a format of ours, which peft refuses. The folder's own
config.json has no weights beside it: whatever does not know the adapter stops there, and does not
take the base model for the trained one.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from stages.models.bottleneck import FORMS, BottleneckShape, add_bottlenecks, bottleneck_shape, bottlenecks
from stages.models.prefix import PrefixShape, flat_prefix, peft_config, prefix_shape, set_prefix

BASE = "base"  # folder of the base model's weights
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
IN_PLACE = (*FORMS, "prefix_tuning")  # methods whose adapters stay in the model
PREFIX, BOTTLENECK = "PREFIX_TUNING", "BOTTLENECK"  # values of peft_type


def is_adapter_folder(folder: Path) -> bool:
    """Return whether a folder holds a model with an adapter that stays in it."""
    return (folder / CONFIG_FILE).is_file() and (folder / BASE).is_dir()


def weights_folder(folder: Path) -> Path:
    """Return where the weights of a published folder are: in base/ if it has an adapter."""
    return folder / BASE if is_adapter_folder(folder) else folder


def method_in(model: nn.Module) -> str | None:
    """Return the method of the adapter that stays in a model; None without one."""
    shape = bottleneck_shape(model)
    if shape is not None:
        return shape.method
    return "prefix_tuning" if prefix_shape(model) is not None else None


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of the adapter that stays in a model, by name; {} without one."""
    modules: dict[int, nn.Module] = {id(module): module for module in bottlenecks(model).values()}
    if prefix_shape(model) is not None:
        modules[id(model.base_model.prefix)] = model.base_model.prefix
    own = {id(p) for module in modules.values() for p in module.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) in own}


def without_adapter(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a model's state without its adapter: the base model's own.

    Args:
        model: The model.
        state: Its weights by name.
    """
    adapter = adapter_parameters(model)
    return {name: x for name, x in state.items() if name not in adapter}


def write_adapter(model: nn.Module, folder: Path, base: str) -> None:
    """Write the adapter of a model beside the weights that are in folder/base already.

    Args:
        model: A model with an adapter that stays in it.
        folder: The folder.
        base: What adapter_config.json calls the folder of the weights.
    """
    from safetensors.torch import save_file

    for path in (folder / BASE).iterdir():
        if path.suffix == ".py" or path.name in ("config.json", "generation_config.json"):
            shutil.copy(path, folder / path.name)
    shape = prefix_shape(model)
    if shape is not None:
        head = next((name for name in ("score", "classifier") if hasattr(model, name)), None)
        task = "CAUSAL_LM" if head is None else "SEQ_CLS"
        config = peft_config(shape, projection=False, task_type=task, inference_mode=True)
        settings = {key: value for key, value in config.to_dict().items() if key != "auto_mapping"}
        tensors = {"prompt_embeddings": flat_prefix(model)}
        if head is not None:  # in base/ too; peft loads no adapter of such a model without it
            tensors |= {f"base_model.{head}.{name}": p for name, p in getattr(model, head).named_parameters()}
    else:
        found = bottleneck_shape(model)
        assert found is not None
        settings, tensors = {"peft_type": BOTTLENECK, **vars(found)}, dict(adapter_parameters(model))
    settings["base_model_name_or_path"] = base
    text = json.dumps(settings, indent=2, sort_keys=True, default=str)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    whole = {name: x.detach().cpu().float().contiguous() for name, x in tensors.items()}
    save_file(whole, folder / WEIGHTS_FILE, metadata={"format": "pt"})


@torch.no_grad()
def with_adapter_of(model: nn.Module, folder: Path) -> nn.Module:
    """Add the adapter in a folder to the model that was loaded from its base/.

    Args:
        model: The model; changed.
        folder: The folder; one without an adapter leaves the model as it is.

    Returns:
        The model, in eval mode.

    Raises:
        UserError: The adapter cannot be read, or is not one of this model.
    """
    if not is_adapter_folder(folder):
        return model
    from safetensors.torch import load_file

    settings = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    tensors = load_file(folder / WEIGHTS_FILE)
    if settings.get("peft_type") == PREFIX:
        set_prefix(model, prefix_in(settings), tensors["prompt_embeddings"])
    elif settings.get("peft_type") == BOTTLENECK:
        add_bottlenecks(model, bottleneck_in(settings))
        load_bottlenecks(model, tensors, folder)
    else:
        raise UserError(
            f"{folder / CONFIG_FILE}: holds an adapter of type {settings.get('peft_type')}, which cannot stay beside "
            f"its weights; merge it into them with peft"
        )
    return model.eval()


def prefix_in(settings: dict[str, Any]) -> PrefixShape:
    """Return the shape of the prefix that peft's settings describe."""
    heads = settings["num_attention_heads"]
    return PrefixShape(settings["num_virtual_tokens"], settings["num_layers"], heads, settings["token_dim"] // heads)


def bottleneck_in(settings: dict[str, Any]) -> BottleneckShape:
    """Return the shape of the bottleneck adapters that our settings describe."""
    return BottleneckShape(settings["method"], settings["size"], settings["activation"], settings["scale"])


def load_bottlenecks(model: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    """Copy the weights of bottleneck adapters into a model.

    Args:
        model: A model with adapters; changed.
        tensors: The weights by name.
        folder: Where they are from, for the error line.

    Raises:
        UserError: They are not weights of this model.
    """
    parameters = adapter_parameters(model)
    odd = sorted(set(parameters) ^ set(tensors)) or [n for n, p in parameters.items() if p.shape != tensors[n].shape]
    if odd:
        raise UserError(
            f"{folder / WEIGHTS_FILE}: does not fit the model in {BASE}/ ({odd[:2]}); make the folder again"
        )
    for name, p in parameters.items():
        p.copy_(tensors[name])
