"""What recipes and cards may say of views and of each defense, with defaults."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator

from certipatch.rules.clopper_pearson import MAX_SAMPLES
from certipatch.rules.double_mask import Fallback

Side = Annotated[int, Field(ge=1, le=4096)]
PerAxis = Annotated[int, Field(ge=1, le=256)]
Fill = Annotated[float, Field(ge=0, le=1)]
Gap = Annotated[float, Field(ge=0, lt=1)]

RENAMED = {
    "sure": "min_mean_gap",
    "maps": "all_margins",
    "finer": "subdivisions",
    "confident": "exit_gap",
    "whole": "fallback: unmasked (or majority)",
}
"""Earlier names of the settings of double masking."""


class ViewSettings(BaseModel):
    """Views in a recipe or card."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["columns", "rows", "cross", "blocks", "random-pixels", "random-columns"]
    width: Side | None = None
    stride: Side = 1
    wrap: bool = True
    count: int = Field(default=1, ge=1, le=8)
    keep: int | None = Field(default=None, ge=1, le=4096**2)
    """Of random views: how many pixels or columns are shown."""

    @property
    def random(self) -> bool:
        """Whether views are drawn, not numbered."""
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


class Settings(BaseModel):
    """Settings of a defense in a recipe or card."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SmoothingSettings(Settings):
    """Derandomized smoothing."""

    threshold: float | None = Field(default=0.3, ge=0, lt=1)
    margin: Literal["location", "paper"] = "location"


class RandomizedSettings(Settings):
    """Randomized ablation; the paper's."""

    samples: int = Field(default=10_000, ge=1, le=MAX_SAMPLES)
    samples_to_pick: int = Field(default=1_000, ge=1, le=MAX_SAMPLES)
    alpha: float = Field(default=0.05, gt=0, lt=1)
    seed: int = Field(default=0, ge=0, lt=2**31)


class PatchGuardSettings(Settings):
    """PatchGuard. ``patch`` is what it is built for where no threat is given, or where it is ``fixed``, always."""

    evidence: Literal["logits", "confidence", "sigmoid", "prediction"] | None = None
    threshold: float = Field(default=0.0, ge=0, le=1)
    clip: float | None = Field(default=None, gt=0)
    patch: Side = 5
    fixed: bool = False


class ClippedBagNetSettings(Settings):
    """Clipped BagNet."""

    scale: float = Field(default=0.05, gt=0)
    shift: float = 1.0


class BagCertSettings(Settings):
    """BagCert."""

    threshold: float = Field(default=0.3, ge=0, lt=1)


class DetectionSettings(Settings):
    """PatchGuard++."""

    threshold: float = Field(default=0.5, ge=0, lt=1)
    patch: Side = 5


class GradientSettings(Settings):
    """Local gradients smoothing; the paper's."""

    window: int = Field(default=15, ge=1, le=4096)
    overlap: int = Field(default=5, ge=0, le=4096)
    threshold: float = Field(default=0.1, ge=0, le=1)
    smoothing: float = Field(default=2.3, ge=0)


class WatermarkSettings(Settings):
    """Digital watermarking."""

    share: float = Field(default=0.1, gt=0, lt=1)
    neighbours: float = Field(default=0.4, ge=0, le=1)
    size: int | None = Field(default=None, ge=1, le=4095)


class MaskSettings(Settings):
    """Masks over the picture. ``patch`` is what they are made for where no threat is given."""

    masks: PerAxis | tuple[PerAxis, PerAxis] | None = None
    stride: Side | tuple[Side, Side] | None = None
    fill: Fill | tuple[Fill, ...] | None = None
    patch: Side = 5


class DoubleMaskingSettings(Settings):
    """Double masking. A mask wins only if its mean gap reaches ``min_mean_gap``. Without ``all_margins`` the search stops as
    soon as the verdict is known."""

    min_mean_gap: float = Field(default=0.0, ge=0, lt=1)
    all_margins: bool = False

    @model_validator(mode="before")
    @classmethod
    def _current_names(cls, values: Any) -> Any:
        for old, new in RENAMED.items():
            if isinstance(values, dict) and old in values:
                raise ValueError(f"{old} has a new name: use {new}")
        return values


class PatchCleanserSettings(MaskSettings, DoubleMaskingSettings):
    """PatchCleanser. Smaller masks, by ``subdivisions`` of the others, are evaluated only where the gap under the larger ones is
    below ``exit_gap``. ``fallback`` gives the label if no mask wins."""

    subdivisions: PerAxis | tuple[PerAxis, PerAxis] | None = None
    exit_gap: Gap | tuple[Gap, ...] = 0.5
    fallback: Fallback = "majority"


class PatchCURESettings(DoubleMaskingSettings):
    """PatchCURE. ``patch`` is what its masks are made for where no threat is given."""

    masks: PerAxis | tuple[PerAxis, PerAxis] | None = None
    stride: PerAxis | tuple[PerAxis, PerAxis] | None = None
    patch: Side = 5


class MinorityReportsSettings(MaskSettings):
    """Minority Reports."""

    threshold: float = Field(default=0.5, ge=0, lt=1)
