"""Choose which layers of a model get an adapter, and which modules train in full beside it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from pipeline.errors import UserError


@dataclass(frozen=True)
class Choice:
    """The settings that choose layers, as `AdapterSettings` has them."""

    target: str | list[str]
    """Ends of names, a regular expression, or "all-linear"."""
    exclude: str | list[str] | None
    """Ends of names, a regular expression, or None."""
    layers: list[int] | None
    """Indices of decoder layers; None: all."""


def layer_options(model: nn.Module, choice: Choice, scalar: bool) -> dict[str, Any]:
    """Return peft's options that choose layers.

    Args:
        model: The transformers model, without an adapter.
        choice: The settings.
        scalar: Whether it is a reward or value model, which lacks the policy's head: there a name
            may match nothing.

    Raises:
        UserError: A name or an index matches nothing.
    """
    names = [name for name, _ in model.named_modules()]
    options: dict[str, Any] = {"target_modules": choice.target}
    excluded = choice.exclude
    if not scalar:
        check_names("target_modules", [] if choice.target == "all-linear" else choice.target, names)
        check_names("exclude_modules", choice.exclude or [], names)
    if choice.target == "all-linear":
        own = own_layers(model)
        excluded = also_excluded(choice.exclude, own) if own else choice.exclude
    if choice.layers is not None:
        check_layers(model, choice.layers)
        options["layers_to_transform"] = choice.layers
        if choice.target == "all-linear":  # peft takes indices only beside names
            options["target_modules"] = linear_names(model)
    if excluded:
        options["exclude_modules"] = excluded
    return options


def check_names(key: str, given: str | list[str], names: list[str]) -> None:
    """Check that an expression, or each of several names, matches a module.

    Args:
        key: The setting, of model.peft.
        given: The expression or the names.
        names: Names of all modules.

    Raises:
        UserError: It matches none.
    """
    if isinstance(given, str):
        if not any(re.fullmatch(given, name) for name in names):
            raise UserError(
                f"model.peft.{key}: no module's whole name matches the expression {given!r}; names are like "
                f"{longest(names)}, and a name alone is a list: [NAME]"
            )
        return
    for one in given:
        if not any(is_named(name, one) for name in names):
            raise UserError(f"model.peft.{key}: no module is named {one}; names are like {longest(names)}")


def check_layers(model: nn.Module, layers: list[int]) -> None:
    """Check that a model has the decoder layers of these indices.

    Raises:
        UserError: It does not.
    """
    count = model.config.get_text_config().num_hidden_layers
    if max(layers) >= count:
        raise UserError(
            f"model.peft.layers_to_transform: {max(layers)}, and this model has {count} layers, 0 to {count - 1}"
        )


def is_named(name: str, end: str) -> bool:
    """Return whether a module's name is, or ends with, one or more whole parts: peft's rule."""
    return name == end or name.endswith(f".{end}")


def longest(names: list[str]) -> str:
    """Return the name with the most parts, as an example."""
    return max(names, key=_parts)


def _parts(name: str) -> int:
    return name.count(".")


def also_excluded(given: str | list[str] | None, own: list[str]) -> str | list[str]:
    """Return an exclusion that covers further layers.

    Args:
        given: What the settings exclude.
        own: Whole names of the further layers.
    """
    if isinstance(given, str):
        return "|".join([f"(?:{given})", *map(re.escape, own)])
    return [*(given or []), *own]


def linear_names(model: nn.Module) -> list[str]:
    """Return the last parts of the names of all linear layers inside decoder layers."""
    from transformers.pytorch_utils import Conv1D

    linear = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    return sorted({name.rpartition(".")[2] for name in linear if re.search(r"\.\d+\.", name)})


def own_layers(inner: nn.Module) -> list[str]:
    """Return the names of linear layers whose forward pass is the family's own.

    Llama 4's routers, for example, return two tensors. An adapter can only add to the one result of
    a plain linear layer.
    """
    return [
        name
        for name, module in inner.named_modules()
        if isinstance(module, nn.Linear)
        and type(module).__module__.startswith("transformers.models.")
        and type(module).forward is not nn.Linear.forward
    ]


def modules_in_full(model: nn.Module, given: Sequence[str], scalar: bool) -> list[str]:
    """Return the whole names of the modules that train in full.

    peft itself would compare ends of names letter by letter: "norm" would be every
    "input_layernorm".

    Args:
        model: The transformers model, without an adapter.
        given: Names, or ends of names.
        scalar: As of `layer_options`.

    Raises:
        UserError: A name matches nothing.
    """
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    if not scalar:
        check_names("modules_to_save", list(given), names)
    return [name for name in names if name != "score" and any(is_named(name, one) for one in given)]


def trains_ends(model: nn.Module, saved: list[str]) -> bool:
    """Return whether embedding and head train in full.

    Args:
        model: The transformers model, without an adapter.
        saved: Whole names of the modules that train in full.
    """
    modules = {id(model.get_submodule(name)) for name in saved}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is embedding.weight:
        return id(embedding) in modules or id(head) in modules
    return id(embedding) in modules and id(head) in modules


def trains_tied(model: nn.Module, saved: list[str]) -> bool:
    """Return whether the one weight of embedding and head trains in full.

    Args:
        model: As of `trains_ends`.
        saved: As of `trains_ends`.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return head is not None and head.weight is embedding.weight and trains_ends(model, saved)
