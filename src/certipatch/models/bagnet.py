"""BagNets (Brendel & Bethge 2019): networks that see the image through small windows only.

Every cell of the last feature map depends on a small receptive field; a linear layer on each cell gives local logits,
and their mean is the global logit. ``BagNet`` is ResNet-50 with most 3x3 kernels turned into 1x1 and no padding;
``SmallBagNet`` is the same idea for images of 28x28 or 32x32 pixels as they are.
"""

from typing import Annotated, ClassVar, Literal

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from certipatch.errors import InputError
from certipatch.models.layers import Crop, Position, Resize
from certipatch.models.settings import Depth, NetworkSettings, Pixels, Widths
from certipatch.views import RandomViews, Views

Depths = Annotated[tuple[Depth, ...], Field(min_length=4, max_length=4)]
"""Blocks of each stage of a BagNet."""


class BagNetSettings(NetworkSettings):
    """BagNet-9, -17 or -33: local logits of small receptive fields in ResNet-50's layout."""

    local_logits: ClassVar[bool] = True
    name: Literal["bagnet"] = "bagnet"
    receptive_field: Pixels = 17
    """Side in pixels: 9, 17 or 33."""
    widths: Widths = (64, 128, 256, 512)
    depths: Depths = (3, 4, 6, 3)
    resize: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Side in pixels that images are resized to inside the network; they stay as they are if absent."""

    def build(
        self, views: Views | RandomViews | None, channels: int, classes: int, image_size: tuple[int, int]
    ) -> nn.Module:
        return BagNet(channels, classes, **self.sizes())


class SmallBagNetSettings(NetworkSettings):
    """A BagNet for small pictures: local logits of 10 or 12 pixels a side."""

    local_logits: ClassVar[bool] = True
    name: Literal["small-bagnet"] = "small-bagnet"
    receptive_field: Pixels = 12
    """Side in pixels: 10 or 12."""
    widths: Widths = (64, 128, 256, 512)

    def build(
        self, views: Views | RandomViews | None, channels: int, classes: int, image_size: tuple[int, int]
    ) -> nn.Module:
        return SmallBagNet(channels, classes, image_size, **self.sizes())


class _Local(nn.Module):
    """A network whose ``local`` part maps images to a map of local logits (B, K, h, w)."""

    encoding = "all-views"
    local: nn.Sequential

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B V K"]:
        """Local logits; cell (i, j) of the map is view i·w + j. Their mean over V equals the global logits."""
        return self.local(images).flatten(2).transpose(1, 2)


class Bottleneck(nn.Module):
    """1x1, k x k without padding, 1x1, around a shortcut cut to the same cells.

    Args:
        inputs: channels in.
        planes: channels inside; four times as many go out.
        kernel: 1 or 3.
        stride: of the middle convolution and of the shortcut.
    """

    def __init__(self, inputs: int, planes: int, kernel: int, stride: int):
        super().__init__()
        outputs = 4 * planes
        self.body = nn.Sequential(
            nn.Conv2d(inputs, planes, 1, bias=False),
            nn.BatchNorm2d(planes),
            nn.ReLU(inplace=True),
            nn.Conv2d(planes, planes, kernel, stride, bias=False),
            nn.BatchNorm2d(planes),
            nn.ReLU(inplace=True),
            nn.Conv2d(planes, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        shortcut: list[nn.Module] = [Crop(kernel // 2)] if kernel > 1 else []
        if stride > 1 or inputs != outputs:
            shortcut += [nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)]
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x):  # no types: it is traced with stand-ins for tensors
        return F.relu(self.body(x) + self.shortcut(x))


class BagNet(_Local):
    """BagNet-9, -17 or -33: ResNet-50's layout with receptive fields of 9, 17 or 33 pixels and a stride of 8.

    Args:
        in_channels: C of the images.
        num_classes: K.
        receptive_field: 9, 17 or 33: how many of the four stages begin with a 3x3 kernel.
        widths: planes of each stage; (64, 128, 256, 512) is ResNet-50's.
        depths: blocks of each stage; (3, 4, 6, 3) is ResNet-50's.
        resize: images are resized (bicubic) to this side first, as Xiang et al. 2021 do with CIFAR-10 (192).
    """

    KERNELS: ClassVar[dict[int, tuple[int, ...]]] = {9: (1, 1, 0, 0), 17: (1, 1, 1, 0), 33: (1, 1, 1, 1)}

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        receptive_field: int = 17,
        widths: tuple[int, ...] = (64, 128, 256, 512),
        depths: tuple[int, ...] = (3, 4, 6, 3),
        resize: int | None = None,
    ):
        super().__init__()
        if receptive_field not in self.KERNELS:
            raise InputError(f"a BagNet's receptive field is 9, 17 or 33 pixels, not {receptive_field}")
        layers: list[nn.Module] = [] if resize is None else [Resize(resize)]
        layers += [
            nn.Conv2d(in_channels, widths[0], 3, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
        ]
        inputs = widths[0]
        for planes, depth, large, stride in zip(
            widths, depths, self.KERNELS[receptive_field], (2, 2, 2, 1), strict=True
        ):
            for number in range(depth):
                first = number == 0
                layers.append(Bottleneck(inputs, planes, 3 if first and large else 1, stride if first else 1))
                inputs = 4 * planes
        layers.append(nn.Conv2d(inputs, num_classes, 1))
        self.local = nn.Sequential(*layers)


class SmallBagNet(_Local):
    """A BagNet for small pictures: 3x3 convolutions, one of them after 2x2 pooling, then 1x1 convolutions.

    Args:
        in_channels: C of the images.
        num_classes: K.
        image_size: (H, W) in pixels; every cell knows its position, so that one network serves one size.
        receptive_field: side in pixels, 10 or 12 (stride 2); one 3x3 convolution more makes the difference.
        widths: channels before pooling, of the first and the second stage after it, and of the 1x1 layers.

    Zero padding keeps a cell for every 2x2 pixels, so that border cells see less of the image, never more.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        image_size: tuple[int, int],
        receptive_field: int = 12,
        widths: tuple[int, ...] = (64, 128, 256, 512),
    ):
        super().__init__()
        if receptive_field not in (10, 12):
            raise InputError(f"a small BagNet's receptive field is 10 or 12 pixels, not {receptive_field}")
        if len(widths) != 4:
            raise InputError(f"a small BagNet has four widths, not {len(widths)}")
        layers: list[nn.Module] = [_conv(in_channels, widths[0], 3), _conv(widths[0], widths[1], 3)]
        if receptive_field == 12:
            layers.append(_conv(widths[1], widths[1], 3))
        cells = (image_size[0] // 2, image_size[1] // 2)
        layers += [
            nn.MaxPool2d(2),
            nn.Conv2d(widths[1], widths[2], 3, padding=1, bias=False),
            Position(widths[2], *cells),
        ]
        layers += [nn.BatchNorm2d(widths[2]), nn.GELU()]
        layers += [_conv(widths[2], widths[3], 1), _conv(widths[3], widths[3], 1), nn.Conv2d(widths[3], num_classes, 1)]
        self.local = nn.Sequential(*layers)


def _conv(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.GELU()
    )
