"""Describe settings to people: one row per setting, with its type in plain words."""

import json
import types
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

WORDS = {float: "number", int: "integer", str: "text", bool: "true or false", type(None): "null", Any: "anything"}


@dataclass(frozen=True)
class SettingRow:
    """One setting, as the help and configs/SETTINGS.md show it."""

    key: str
    """Full name, such as "ppo.kl_coef"."""
    type: str
    """Type in plain words, such as "number or null"."""
    default: str
    """Default as YAML; "required" if there is none."""
    unit: str
    """Unit, or "" where the value is a plain number or a choice."""
    meaning: str
    """What the setting does."""


def describe(section: type[BaseModel], name: str) -> list[SettingRow]:
    """Return one row for each setting of a section, including the sections inside it.

    A setting that is one of several sections, such as a scorer, has no rows for what is inside.

    Args:
        section: Class of the section.
        name: Its name in the YAML, such as "ppo"; "" for the top level.
    """
    rows = []
    for key, info in fields_of(section).items():
        full = f"{name}.{key}" if name else key
        default = info.get_default(call_default_factory=True)
        inner = section_in(info.annotation)
        if inner is None or not isinstance(default, BaseModel):
            extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
            shown = "required" if default is PydanticUndefined else show_default(default)
            unit, meaning = str(extra.get("unit", "")), info.description or ""
            rows.append(SettingRow(full, type_name(info.annotation), shown, unit, meaning))
        if inner is not None and getattr(inner, "is_listed", True) and len(set(sections_in(info.annotation))) == 1:
            rows += describe(inner, full)
    return rows


def fields_of(section: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the fields of a section by the keys of a YAML; `from`, `with` are Python's words."""
    return {info.alias or name: info for name, info in section.model_fields.items()}


def section_in(annotation: Any) -> type[BaseModel] | None:
    """Return the first section class in a type annotation, such as X in `X | None`."""
    return next(iter(sections_in(annotation)), None)


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the section classes in a type annotation; of a choice of several, each."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections_in(part)]


def show_default(value: Any) -> str:
    """Return a default as a user would write it in YAML."""
    if isinstance(value, float) and value and not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def type_name(annotation: Any) -> str:
    """Return a type in plain words, such as "number or null" or "best | last"."""
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation in WORDS:
        return WORDS[annotation]
    if origin is Annotated:
        return type_name(args[0])
    if origin is Literal:
        return " | ".join(str(arg) for arg in args)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_name(arg) for arg in args))
    if origin is dict:
        return "mapping"
    if origin in (list, tuple):
        items = dict.fromkeys(type_name(arg) for arg in args if arg is not Ellipsis)
        return f"list of {' or '.join(items)}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return getattr(annotation, "__name__", str(annotation))
