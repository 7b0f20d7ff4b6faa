"""Publish a trained model: weights in the right dtype, the adapter beside them, a model card."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from pipeline.config.checks import IN_PLACE
from pipeline.config.sections import is_hub_id
from stages.shared.cards import ModelCard, card_text
from stages.shared.provenance import Provenance


def publish_model(
    provenance: Provenance,
    model: nn.Module,
    tokenizer: Any,
    folder: Path,
    card: ModelCard,
    temperature: float | None = None,
) -> None:
    """Write a model to a folder that transformers loads; its adapter is merged, and kept beside it.

    Args:
        provenance: What the model was made of.
        model: The model, whole.
        tokenizer: Its tokenizer.
        folder: The folder to write, inside `provenance.publish`.
        card: What its card says. Its `source` is the model that the stage began with, and its
            `adapter` the base that the adapter names.
        temperature: The temperature that a policy was trained to be sampled at; None: no policy.
    """
    from stages.models.adapter_folder import BASE, method_in
    from stages.models.adapters import name_of_base, save_merged, unwrapped
    from stages.models.control_tokens import control_ids
    from stages.models.soft_prompts import soft_prompt_ids

    published, inner = artifact_of(provenance, folder), unwrapped(model)
    card = replace(
        card,
        in_place=method_in(inner),
        soft_prompt=len(soft_prompt_ids(inner)),
        control_tokens=tuple(tokenizer.convert_ids_to_tokens(control_ids(inner))),
    )
    save_merged(
        model,
        tokenizer,
        folder,
        card=card_text(provenance, card),
        base=card.adapter or ("", None),
        temperature=temperature,
        dtype=publish_dtype(provenance, card.source),
        name_of_weights=name_of_base(published / BASE, published),
    )


def artifact_of(provenance: Provenance, folder: Path) -> Path:
    """Return where a folder that is being written will be moved.

    Args:
        provenance: What the model was made of.
        folder: The folder, inside `provenance.publish`.
    """
    return provenance.publish.parent / folder.relative_to(provenance.publish)


def publish_dtype(provenance: Provenance, source: Path) -> str | None:
    """Return the dtype that a stage writes weights in (model.publish_dtype); None for float32.

    Args:
        provenance: What the model was made of.
        source: The folder of the model that the stage began with.
    """
    from stages.models.publish import dtype_of_folder

    dtype = provenance.model.publish_dtype
    return dtype_of_folder(source) if dtype == "as_given" else dtype


def adapter_base(provenance: Provenance, folder: Path, source: Path) -> tuple[str, str | None] | None:
    """Name the base model of a published adapter.

    The model of the stage `base` goes by its name on the Hub if it has the same rows of embeddings
    as the one there.

    Args:
        provenance: What the model was made of.
        folder: The folder that the adapter's model is published in.
        source: The folder of the base model.

    Returns:
        A Hub id and its commit, or a path and None; None where no adapter is trained.
    """
    from stages.models.adapters import FOLDER, name_of_base

    peft = provenance.model.peft
    if peft is None or peft.method in ("bitfit", "prompt_tuning", "p_tuning", *IN_PLACE):  # nothing beside the weights
        return None
    base, name = provenance.manifests.get("base"), provenance.model.name_or_path
    is_base = base is not None and source.parent == provenance.inputs["base"]
    if is_base and base["metrics"].get("same_rows_as_given") and name is not None and is_hub_id(name):
        return name, base["config"]["model"].get("revision")
    return name_of_base(source, artifact_of(provenance, folder) / FOLDER), None
