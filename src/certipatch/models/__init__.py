"""Networks. The ``encoding`` of each network names its input: ``null``, ``fill``, ``crop``, ``all-views`` or ``picture``."""

from typing import Annotated, get_args

from pydantic import Field

from certipatch.models.bagnet import BagNet, BagNetSettings, SmallBagNet, SmallBagNetSettings
from certipatch.models.cascade import Cascade, CascadeSettings
from certipatch.models.cnn import CNN, CNNSettings
from certipatch.models.conv import ConvNet, ConvSettings, CrossConvNet
from certipatch.models.crop import CropNet, CropSettings
from certipatch.models.efficientnet import EfficientNetLite, EfficientNetLiteSettings
from certipatch.models.ensemble import Ensemble, EnsembleSettings, NullToFill
from certipatch.models.fallback_ensemble import FallbackEnsemble, FallbackEnsembleSettings
from certipatch.models.mlp import MLP, MLPSettings
from certipatch.models.receptive_field import receptive_fields
from certipatch.models.resnet import ResNet18, ResNet18Settings
from certipatch.models.settings import NetworkSettings, refuse_names
from certipatch.models.shared_front import (
    SharedBagNet,
    SharedBagNetSettings,
    SharedFront,
    SharedViT,
    SharedViTSettings,
)
from certipatch.models.strip import CrossNet, StripNet, StripSettings
from certipatch.models.vit import ViT, ViTSettings

__all__ = [
    "CNN",
    "MLP",
    "NETWORKS",
    "BagNet",
    "BagNetSettings",
    "CNNSettings",
    "Cascade",
    "CascadeSettings",
    "ConvNet",
    "ConvSettings",
    "CropNet",
    "CropSettings",
    "CrossConvNet",
    "CrossNet",
    "EfficientNetLite",
    "EfficientNetLiteSettings",
    "Ensemble",
    "EnsembleSettings",
    "FallbackEnsemble",
    "FallbackEnsembleSettings",
    "MLPSettings",
    "ModelSettings",
    "NetworkSettings",
    "NullToFill",
    "ResNet18",
    "ResNet18Settings",
    "SharedBagNet",
    "SharedBagNetSettings",
    "SharedFront",
    "SharedViT",
    "SharedViTSettings",
    "SmallBagNet",
    "SmallBagNetSettings",
    "StripNet",
    "StripSettings",
    "ViT",
    "ViTSettings",
    "descriptions",
    "receptive_fields",
]

ModelSettings = Annotated[
    StripSettings
    | CropSettings
    | ConvSettings
    | ResNet18Settings
    | BagNetSettings
    | SmallBagNetSettings
    | MLPSettings
    | CNNSettings
    | EfficientNetLiteSettings
    | ViTSettings
    | SharedBagNetSettings
    | SharedViTSettings
    | EnsembleSettings
    | CascadeSettings
    | FallbackEnsembleSettings,
    Field(discriminator="name"),
    refuse_names(),
]
"""Settings of any network, chosen by ``name``."""

NETWORKS: dict[str, type[NetworkSettings]] = {
    settings.model_fields["name"].default: settings for settings in get_args(get_args(ModelSettings)[0])
}


def descriptions() -> dict[str, str]:
    """One line about every network."""
    return {name: (settings.__doc__ or "").splitlines()[0] for name, settings in NETWORKS.items()}
