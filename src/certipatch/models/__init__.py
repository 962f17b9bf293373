"""Networks. Each says with ``encoding`` what it reads: ``null``, ``fill``, ``crop``, or ``all-views``."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from certipatch.errors import InputError
from certipatch.models.crop import CropNet
from certipatch.models.resnet import ResNet18
from certipatch.models.strip import StripNet
from certipatch.views import Bands, Blocks, Views

__all__ = ["CropNet", "ModelSettings", "ResNet18", "StripNet", "create", "descriptions"]

NETWORKS = {"strip": StripNet, "crop": CropNet, "resnet18": ResNet18}


class ModelSettings(BaseModel):
    """A network in a recipe or card. Sizes are bounded, so that no file can ask for a network that fills memory."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["strip", "crop", "resnet18"]
    widths: tuple[Annotated[int, Field(ge=1, le=4096)], ...] | None = Field(default=None, min_length=1, max_length=8)
    depth: int | None = Field(default=None, ge=1, le=32)


def create(
    settings: ModelSettings, views: Views, in_channels: int, num_classes: int, image_size: tuple[int, int]
) -> nn.Module:
    """The network that ``settings`` describe, with fresh weights. ValueError where it cannot read such views."""
    sizes = settings.model_dump(exclude={"name"}, exclude_none=True)
    if settings.name == "resnet18":
        return ResNet18(in_channels, num_classes, **sizes)
    if not isinstance(views, Bands | Blocks):
        raise InputError(f"the {settings.name} network reads columns, rows or blocks; use resnet18 for other views")
    if settings.name == "crop":
        return CropNet(views, in_channels, num_classes, **sizes)
    return StripNet(views, in_channels, num_classes, image_size, **sizes)


def descriptions() -> dict[str, str]:
    """One line about every network."""
    return {name: (network.__doc__ or "").splitlines()[0] for name, network in NETWORKS.items()}
