"""The base class of the settings in recipes and cards: an old key is refused in one line, with the new one."""

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


class Settings(BaseModel):
    """Settings without unknown keys. Subclasses share the old keys of their base: those count whose new key they have."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    renamed: ClassVar[dict[str, str]] = {}
    """Old keys and new ones, or ``key: value`` on either side."""

    @model_validator(mode="before")
    @classmethod
    def _check_given_keys(cls, values: Any) -> Any:
        if isinstance(values, dict):
            cls.check_keys(values)
        return values

    @classmethod
    def check_keys(cls, values: dict[str, Any]) -> None:
        """PydanticCustomError on an old key, or on an old value of a key."""
        fields = cls.model_fields
        given = {*values, *(f"{key}: {value}" for key, value in values.items() if isinstance(value, str))}
        for old, new in cls.renamed.items():
            if old in given and old not in fields and new.partition(":")[0] in fields:
                raise PydanticCustomError(
                    "unknown_setting", "{old} has a new name: use {new}", {"old": old, "new": new}
                )
