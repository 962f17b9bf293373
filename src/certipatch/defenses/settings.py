"""The settings of views, and the base class of every defense's settings. A defense's own are in its file."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_serializer, model_validator

from certipatch.errors import InputError, problem
from certipatch.plumbing.settings import Settings

Side = Annotated[int, Field(ge=1, le=4096)]
PerAxis = Annotated[int, Field(ge=1, le=256)]
Fill = Annotated[float, Field(ge=0, le=1)]
Gap = Annotated[float, Field(ge=0, lt=1)]


class ViewSettings(BaseModel):
    """Views in a recipe or card."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["columns", "rows", "cross", "blocks", "random-pixels", "random-columns"]
    width: Side | None = None
    stride: Side = 1
    wrap: bool = True
    count: int = Field(default=1, ge=1, le=8)
    keep: int | None = Field(default=None, ge=1, le=4096**2)
    """Number of visible pixels or columns in each random view."""

    @property
    def random(self) -> bool:
        """True if views are drawn, not numbered."""
        return self.name.startswith("random-")

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        needed, foreign = ("keep", self.width) if self.random else ("width", self.keep)
        if getattr(self, needed) is None:
            raise ValueError(f"{self.name} need a {needed}")
        if foreign is not None or (self.random and (self.stride, self.wrap, self.count) != (1, True, 1)):
            raise ValueError(
                f"{self.name} are described by their {needed}, not by {'width' if self.random else 'keep'}"
            )
        return self

    @model_serializer
    def values(self) -> dict[str, Any]:
        """The settings that ``views.create`` takes."""
        if self.random:
            return {"name": self.name, "keep": self.keep}
        return {name: getattr(self, name) for name in ("name", "width", "stride", "wrap", "count")}


class DefenseSettings(Settings):
    """The settings of a defense, with their defaults and limits: in a card, a recipe, ``--set``, and its constructor.

    A field ``patch`` is the side of the patch that a defense is built for if no threat is given.
    """

    @classmethod
    def checked(cls, **values: Any) -> Self:
        """The settings that a constructor was given. InputError that names the one that does not fit."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            place, words = problem(error, cls.model_fields)
            first = place.partition(".")[0]
            given = f", not {values[first]!r}" if first in values else ""
            raise InputError(f"{place}{': ' * bool(place)}{words}{given}"[:300]) from None


class MaskSettings(DefenseSettings):
    """Masks over the image. They are made for ``patch`` if no threat is given."""

    masks: PerAxis | tuple[PerAxis, PerAxis] | None = None
    stride: Side | tuple[Side, Side] | None = None
    fill: Fill | tuple[Fill, ...] | None = None
    patch: Side = 5


class DoubleMaskingSettings(DefenseSettings):
    """Double masking. A mask wins only if its mean gap reaches ``min_mean_gap``. Without ``all_margins`` the search stops as
    soon as the verdict is known."""

    renamed: ClassVar[dict[str, str]] = {
        "sure": "min_mean_gap",
        "maps": "all_margins",
        "finer": "subdivisions",
        "confident": "exit_gap",
        "whole": "fallback: unmasked (or majority)",
    }

    min_mean_gap: float = Field(default=0.0, ge=0, lt=1)
    all_margins: bool = False
