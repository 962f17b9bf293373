"""Networks. Each says with ``encoding`` what it reads: ``null``, ``fill``, ``crop``, ``all-views`` or ``picture``."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from certipatch.errors import InputError
from certipatch.models.bagnet import BagNet, SmallBagNet
from certipatch.models.cascade import Cascade
from certipatch.models.cnn import CNN
from certipatch.models.conv import ConvNet, CrossConvNet
from certipatch.models.crop import CropNet
from certipatch.models.efficientnet import EfficientNetLite
from certipatch.models.ensemble import Ensemble, Filled
from certipatch.models.mlp import MLP
from certipatch.models.receptive_field import receptive_fields
from certipatch.models.resnet import ResNet18
from certipatch.models.shared_front import SharedBagNet, SharedFront, SharedViT
from certipatch.models.specialists import Specialists
from certipatch.models.strip import CrossNet, StripNet
from certipatch.models.vit import ViT
from certipatch.views import Bands, Blocks, Cross, RandomViews, Views

__all__ = [
    "CNN",
    "LOCAL",
    "MLP",
    "BagNet",
    "Cascade",
    "ConvNet",
    "CropNet",
    "CrossConvNet",
    "CrossNet",
    "EfficientNetLite",
    "Ensemble",
    "Filled",
    "ModelSettings",
    "ResNet18",
    "SharedBagNet",
    "SharedFront",
    "SharedViT",
    "SmallBagNet",
    "Specialists",
    "StripNet",
    "ViT",
    "create",
    "descriptions",
    "receptive_fields",
]

NETWORKS = {
    "strip": StripNet,
    "crop": CropNet,
    "conv": ConvNet,
    "resnet18": ResNet18,
    "bagnet": BagNet,
    "small-bagnet": SmallBagNet,
    "mlp": MLP,
    "cnn": CNN,
    "efficientnet-lite0": EfficientNetLite,
    "vit": ViT,
    "shared-bagnet": SharedBagNet,
    "shared-vit": SharedViT,
    "ensemble": Ensemble,
    "cascade": Cascade,
    "specialists": Specialists,
}
LOCAL = ("bagnet", "small-bagnet")  # networks of local logits, whose views are their receptive fields
MEMBERS = ("conv", "resnet18", "mlp", "cnn", "efficientnet-lite0")  # networks whose answers may be averaged


class ModelSettings(BaseModel):
    """A network in a recipe or card. Sizes are bounded, so that no file can ask for a network that fills memory."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal[
        "strip",
        "crop",
        "conv",
        "resnet18",
        "bagnet",
        "small-bagnet",
        "mlp",
        "cnn",
        "efficientnet-lite0",
        "vit",
        "shared-bagnet",
        "shared-vit",
        "ensemble",
        "cascade",
        "specialists",
    ]
    widths: tuple[Annotated[int, Field(ge=1, le=4096)], ...] | None = Field(default=None, min_length=1, max_length=8)
    depth: int | None = Field(default=None, ge=1, le=32)
    """Residual blocks per stage; of a CNN: its convolutions, 2, 4 or 5; of a conv network: those of each stage, at least
    2; of a ViT: its blocks."""
    depths: tuple[Annotated[int, Field(ge=1, le=32)], ...] | None = Field(default=None, min_length=4, max_length=4)
    """Of a BagNet: blocks of each stage."""
    field: int | None = Field(default=None, ge=1, le=64)
    """Of a BagNet: receptive field in pixels."""
    resize: int | None = Field(default=None, ge=1, le=1024)
    """Of a BagNet: side in pixels that pictures are resized to inside the network."""
    kernel: int | None = Field(default=None, ge=1, le=64)
    """Of a CNN: side of the first convolution."""
    stride: int | None = Field(default=None, ge=1, le=4)
    """Of a conv network: step of its first convolution."""
    mirror: bool | None = None
    """Of a conv network, EfficientNet or cascade: mirror images, too, give an answer; the mean counts."""
    temperature: float | None = Field(default=None, gt=0, le=100)
    """Of a conv network: what its logits are divided by, once it is trained."""
    null_encoding: bool | None = None
    """Of a conv network of whole pictures: hidden pixels are zeros in twice the channels, which no pixel is."""
    patch: int | None = Field(default=None, ge=1, le=64)
    """Of a ViT: side of a token in pixels."""
    dim: int | None = Field(default=None, ge=1, le=1280)
    """Of a ViT: channels of a token."""
    heads: int | None = Field(default=None, ge=1, le=32)
    """Of a ViT: heads of each attention."""
    window: int | None = Field(default=None, ge=1, le=64)
    """Of a shared ViT: side in tokens of the windows that its front attends within."""
    local: int | None = Field(default=None, ge=1, le=32)
    """Of a shared ViT: blocks of its front; ``depth`` are those behind."""
    members: tuple["ModelSettings", ...] | None = Field(default=None, min_length=2, max_length=8)
    """Of an ensemble, a cascade or specialists: its networks."""
    confident: float | None = Field(default=None, gt=0, le=1)
    """Of a cascade: the lead in confidence from which the first network's answer is enough."""

    @model_validator(mode="after")
    def _members(self) -> "ModelSettings":
        known = (*MEMBERS, "ensemble", "cascade") if self.name == "specialists" else MEMBERS
        for member in self.members or ():
            if member.name not in known:
                raise ValueError(f"the {self.name} cannot have {member.name} as a member; use {', '.join(known)}")
        return self


def create(
    settings: ModelSettings,
    views: Views | RandomViews | None,
    in_channels: int,
    num_classes: int,
    image_size: tuple[int, int],
) -> nn.Module:
    """The network that ``settings`` describe, with fresh weights. ValueError where it cannot read such views."""
    sizes = settings.model_dump(exclude={"name"}, exclude_none=True)
    try:
        if settings.name in ("ensemble", "cascade", "specialists"):
            own = {"members", "confident", "mirror"} if settings.name == "cascade" else {"members"}
            if settings.members is None or not own >= set(sizes):
                raise InputError(
                    f"a network {settings.name} has members, networks with a name and sizes each, and no sizes of its own"
                )
            parts = [create(member, views, in_channels, num_classes, image_size) for member in settings.members]
            del sizes["members"]
            return NETWORKS[settings.name](parts, **sizes)
        if settings.name == "bagnet":
            return BagNet(in_channels, num_classes, **sizes)
        if settings.name == "small-bagnet":
            return SmallBagNet(in_channels, num_classes, image_size, **sizes)
        if settings.name == "conv" and isinstance(views, Cross):
            return CrossConvNet(views, in_channels, num_classes, image_size, **sizes)
        if settings.name == "conv":
            return ConvNet(views, in_channels, num_classes, image_size, **sizes)
        if settings.name in ("shared-bagnet", "shared-vit"):
            return NETWORKS[settings.name](in_channels, num_classes, image_size, **sizes)
        if settings.name == "vit":
            return ViT(views, in_channels, num_classes, image_size, **sizes)
        if settings.name == "resnet18":
            return ResNet18(in_channels, num_classes, **sizes)
        if settings.name in ("mlp", "cnn", "efficientnet-lite0"):
            if views is not None:
                raise InputError(f"the {settings.name} network reads whole pictures; leave views out")
            if settings.name == "efficientnet-lite0":
                return EfficientNetLite(in_channels, num_classes, **sizes)
            return NETWORKS[settings.name](in_channels, num_classes, image_size, **sizes)
        if settings.name == "strip" and isinstance(views, Cross):
            return CrossNet(views, in_channels, num_classes, image_size, **sizes)
        if not isinstance(views, Bands | Blocks):
            raise InputError(f"the {settings.name} network reads columns, rows or blocks; use resnet18 for other views")
        if settings.name == "crop":
            return CropNet(views, in_channels, num_classes, **sizes)
        return StripNet(views, in_channels, num_classes, image_size, **sizes)
    except TypeError as error:
        raise InputError(f"model {settings.name}: {str(error).split('() ')[-1]}") from None


def descriptions() -> dict[str, str]:
    """One line about every network."""
    return {name: (network.__doc__ or "").splitlines()[0] for name, network in NETWORKS.items()}
