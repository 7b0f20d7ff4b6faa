"""Define `Section`, the base class of all settings, and `setting`, which declares one of them."""

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """Validate one section of the YAML strictly: types must match, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    is_listed: ClassVar[bool] = True
    """Whether `--help` and configs/SETTINGS.md list what is inside, where it is optional."""


def setting(default: Any, description: str, unit: str = "", **bounds: Any) -> Any:
    """Declare one setting of a section.

    Args:
        default: Value where the YAML does not set it; `...` makes the setting required.
        description: Meaning, as `rlhf run STAGE --help` and configs/SETTINGS.md show it.
        unit: Unit of the value, such as "tokens".
        **bounds: Limits that pydantic checks (`ge`, `gt`, `le`, `lt`, `pattern`).
    """
    return Field(default, description=description, json_schema_extra={"unit": unit}, validate_default=True, **bounds)
