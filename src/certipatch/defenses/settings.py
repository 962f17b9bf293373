"""What recipes and cards may say of views and of each defense, with defaults."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator

from certipatch.rules.clopper_pearson import MAX_SAMPLES

Side = Annotated[int, Field(ge=1, le=4096)]
PerAxis = Annotated[int, Field(ge=1, le=256)]
Fill = Annotated[float, Field(ge=0, le=1)]
Lead = Annotated[float, Field(ge=0, lt=1)]


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


class PatchCleanserSettings(MaskSettings):
    """PatchCleanser. Without ``maps`` it stops as soon as the verdict is known. Only masks so ``sure`` win. Masks that are
    ``finer`` are looked at where what is said under the others is not so ``confident``. Where no mask wins, the ``whole`` picture
    decides instead of the majority."""

    sure: float = Field(default=0.0, ge=0, lt=1)
    maps: bool = False
    finer: PerAxis | tuple[PerAxis, PerAxis] | None = None
    confident: Lead | tuple[Lead, ...] = 0.5
    whole: bool = False


class PatchCURESettings(Settings):
    """PatchCURE. ``patch`` is what its masks are made for where no threat is given."""

    masks: PerAxis | tuple[PerAxis, PerAxis] | None = None
    stride: PerAxis | tuple[PerAxis, PerAxis] | None = None
    patch: Side = 5
    sure: float = Field(default=0.0, ge=0, lt=1)
    maps: bool = False


class MinorityReportsSettings(MaskSettings):
    """Minority Reports."""

    threshold: float = Field(default=0.5, ge=0, lt=1)
