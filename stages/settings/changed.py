"""Find the settings that differ from their defaults."""

from typing import Any

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from pipeline.config.help import fields_of, section_in


def defaults_of(section: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Return the defaults of a section as manifests record settings.

    Args:
        section: The type of the section, or of the whole experiment.
        prefix: The dotted key of the section, "" for an experiment.

    Returns:
        Dotted key → default. Of a section that is null by default (`model.peft`), the defaults that
        hold once it is set are there too.
    """
    defaults: dict[str, Any] = {}
    for name, field in fields_of(section).items():
        if field.is_required():
            continue
        key = f"{prefix}.{name}" if prefix else name
        default = field.get_default(call_default_factory=True)
        optional = section_in(field.annotation)
        if isinstance(default, BaseModel):
            defaults |= defaults_of(type(default), key) | flat(default.model_dump(mode="json"), key)
        else:
            defaults[key] = to_jsonable_python(default)
            if optional is not None:
                defaults |= defaults_of(optional, key)
    return defaults


def changed(recorded: dict[str, Any], defaults: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Return the settings of a section that differ from their defaults.

    Args:
        recorded: The section as a manifest records it: plain values, sections inside it as dicts.
        defaults: Dotted key → default, as `defaults_of` returns them.
        prefix: The dotted key of the section.

    Returns:
        Dotted key → value, in the order of `recorded`. A section that is null by default and was
        set with nothing but defaults is {}.
    """
    differing: dict[str, Any] = {}
    for name, value in recorded.items():
        key = f"{prefix}.{name}"
        parts = {part: item for part, item in flat(value, key).items()
                 if part not in defaults or item != defaults[part]}  # fmt: skip
        is_null_by_default = key in defaults and defaults[key] is None
        if not parts and isinstance(value, dict) and is_null_by_default:
            parts = {key: {}}
        differing |= parts
    return differing


def flat(value: Any, prefix: str) -> dict[str, Any]:
    """Return nested settings by dotted key; an empty section is one key."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {key: item for name, inner in value.items() for key, item in flat(inner, f"{prefix}.{name}").items()}
