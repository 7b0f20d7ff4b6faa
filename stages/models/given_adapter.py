"""Merge an adapter that somebody has trained elsewhere into the model that it was trained on."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from torch import nn

from pipeline.errors import UserError
from stages.models.adapter_folder import is_adapter_folder
from stages.models.adapters import is_adapted

PLACE = "model.adapter"
IN_FRONT = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "ADAPTION_PROMPT")
"""peft's types that put vectors before a text, and change no weight."""
HARMLESS = ("unsloth_fixed",)
"""Entries of other programs in adapter_config.json that change no number."""
KEEPS_BASE = (True, False, None, "gaussian", "eva")
"""Values of init_lora_weights under which an adapter belongs on the untouched base model."""


def merge_given(model: nn.Module, folder: Path, name: str) -> tuple[nn.Module, str]:
    """Merge an adapter into its base model.

    Args:
        model: The base model; changed.
        folder: Where peft saved the adapter.
        name: The base model's name, model.name_or_path.

    Returns:
        The model, and a line that says what was merged.

    Raises:
        UserError: It is no adapter of this model, or none that can be merged.
    """
    from peft import PeftConfig, PeftModel

    recorded = read_config(folder)
    base = recorded.get("base_model_name_or_path") or ""
    check_kind(recorded, folder)
    if on_the_hub(name) and on_the_hub(base) and name.lower() != base.lower():
        raise UserError(
            f"{PLACE}: {folder} was trained on {base}, and model.name_or_path is {name}; name that model, or correct "
            f"base_model_name_or_path in its adapter_config.json if both are the same weights"
        )
    try:
        config = PeftConfig.from_pretrained(str(folder))
        adapted = PeftModel.from_pretrained(model, str(folder), config=config, torch_device="cpu", use_safetensors=True)
    except (ValueError, TypeError, KeyError, RuntimeError, OSError) as error:
        text = " ".join(str(error).split())[:300]
        raise UserError(
            f"{PLACE}: {folder} does not fit {name} ({text}); name the model that it was trained on in "
            f"model.name_or_path{f', {base}' if base else ''}"
        ) from error
    check_tensors(adapted, folder, name)
    if not is_adapted(adapted):
        raise UserError(
            f"{PLACE}: {folder} is of a type that cannot be merged into weights; merge it with its own tool"
        )
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"{PLACE}: {folder} cannot be merged ({' '.join(str(error).split())[:200]})") from error
    merged.requires_grad_(True)
    line = f"merged the adapter {folder.name} ({recorded['peft_type']}) into {name}"
    if base and base != name:
        line += f"; it names {base} as its base, and its weights fit"
    return merged, line


def on_the_hub(name: str) -> bool:
    """Return whether a model's name reads like a Hub id, and is no folder here."""
    return re.fullmatch(r"(?!\.)[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def read_config(folder: Path) -> dict[str, Any]:
    """Return what adapter_config.json holds.

    Raises:
        UserError: It is no JSON object of peft.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{PLACE}: {folder}/adapter_config.json cannot be read ({error}); save the adapter again"
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise UserError(f"{PLACE}: {folder}/adapter_config.json is not peft's; save the adapter with peft")
    return config


def check_kind(config: dict[str, Any], folder: Path) -> None:
    """Check that an adapter changes the weights of a language model.

    Args:
        config: Of the adapter.
        folder: Named in errors.

    Raises:
        UserError: It does not.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind, task = config["peft_type"], config.get("task_type")
    if is_adapter_folder(folder):
        raise UserError(
            f"{PLACE}: {folder} is a whole model with its adapter; name it in model.name_or_path, and leave {PLACE} out"
        )
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    if known is None:
        raise UserError(
            f"{PLACE}: {folder} is of a type that the installed peft does not have ({kind}); merge it with its own tool"
        )
    if kind in IN_FRONT:
        raise UserError(f"{PLACE}: {folder} is {kind}, which cannot be merged into weights; take one that can, as LoRA")
    if task not in (None, "CAUSAL_LM"):
        raise UserError(
            f"{PLACE}: {folder} was trained for {task}, and the base is a language model; take a CAUSAL_LM adapter"
        )
    start = config.get("init_lora_weights", True)
    if start not in KEEPS_BASE:
        raise UserError(
            f"{PLACE}: {folder} belongs on weights that its start ({start}) had changed, not on the base model; save "
            f"it with peft's path_initial_model_for_weight_conversion"
        )
    fields = {field.name for field in dataclasses.fields(known)}
    if odd := sorted(name for name, value in config.items() if value and name not in {*fields, *HARMLESS}):
        raise UserError(
            f"{PLACE}: {folder}/adapter_config.json has settings that the installed peft does not know and would leave "
            f"out ({', '.join(odd)}); update peft, or merge the adapter with the version that saved it"
        )


def check_tensors(adapted: nn.Module, folder: Path, name: str) -> None:
    """Check that the file held each tensor of the adapter and no other; peft only warns.

    Args:
        adapted: The model with the adapter.
        folder: Of the adapter.
        name: The base model's name.

    Raises:
        UserError: It did not.
    """
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        found = set(file.keys())
    wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    known = wanted | set(adapted.state_dict())  # rows of an embedding that grew are saved under their own name
    if odd := sorted(wanted - found) or sorted(found - known):
        what = "lacks" if odd[0] in wanted else "has no layer for"
        owner = folder if odd[0] in wanted else name
        raise UserError(
            f"{PLACE}: {owner} {what} {odd[0]} and {len(odd) - 1} more; name the model that the adapter was trained on "
            f"in model.name_or_path"
        )
