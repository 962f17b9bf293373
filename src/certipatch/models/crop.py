"""Crop network: gets the band alone, and works on it in two dimensions until it collapses."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from certipatch.models.resnet import stages
from certipatch.models.settings import Depth, NetworkSettings, Widths, bands_or_blocks
from certipatch.views import Bands, Blocks, RandomViews, Views


class CropSettings(NetworkSettings):
    """Logits of one band or block from its pixels and its position alone."""

    name: Literal["crop"] = "crop"
    widths: Widths = (64, 128, 256)
    depth: Depth = 2
    """Residual blocks per stage."""

    def build(
        self, views: Views | RandomViews | None, channels: int, classes: int, image_size: tuple[int, int]
    ) -> nn.Module:
        return CropNet(bands_or_blocks(self.name, views), channels, classes, **self.sizes())


class CropNet(nn.Module):
    """Logits of one band from its H x s pixels and its position: a fraction s/W of a NULL-encoded image's work.

    Args:
        views: the bands or blocks that the network serves, one per view.
        in_channels: C of the images.
        num_classes: K.
        widths: channels of each stage; each but the first halves the band's length, and its width while it has one.
        depth: residual blocks per stage.

    ``forward`` maps cropped views (N, C + 1, length, s), for blocks (N, C + 2, s, s), to logits (N, K).
    """

    encoding = "crop"

    def __init__(
        self,
        views: Bands | Blocks,
        in_channels: int,
        num_classes: int,
        widths: tuple[int, ...] = (64, 128, 256),
        depth: int = 2,
    ):
        super().__init__()
        positions = 1 if isinstance(views, Bands) else 2
        strides, width = [(1, 1)], views.width
        for _ in widths[1:]:
            strides.append((2, 2 if width > 1 else 1))
            width = (width + 1) // 2
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels + positions, widths[0], 3, 1, 1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
        )
        self.body = stages(widths, depth, (3, 3), strides)
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, views: Float[Tensor, "N C1 h w"]) -> Float[Tensor, "N K"]:
        return self.head(self.body(self.stem(views)).mean((2, 3)))
