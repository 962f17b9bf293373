"""ResNet-18 for small pictures: the base classifier of Levine & Feizi 2020, on NULL-encoded ablated images."""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from certipatch.models.settings import Depth, NetworkSettings, Widths
from certipatch.views import RandomViews, Views


class ResNet18Settings(NetworkSettings):
    """ResNet-18 for small pictures: logits of NULL-encoded views of any kind."""

    name: Literal["resnet18"] = "resnet18"
    widths: Widths = (64, 128, 256, 512)
    depth: Depth = 2
    """Residual blocks per stage."""

    def build(
        self, views: Views | RandomViews | None, channels: int, classes: int, image_size: tuple[int, int]
    ) -> nn.Module:
        return ResNet18(channels, classes, **self.sizes())


class Residual(nn.Module):
    """Two convolutions around a shortcut (He et al. 2016), for kernels of any odd size.

    Args:
        inputs: channels in.
        outputs: channels out.
        kernel: (rows, columns); padding keeps the size at stride 1.
        stride: (rows, columns) of the first convolution and of the shortcut.
    """

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int], stride: tuple[int, int]):
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2)
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, kernel, 1, padding, bias=False),
            nn.BatchNorm2d(outputs),
        )
        same = inputs == outputs and stride == (1, 1)
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def stages(
    widths: tuple[int, ...], depth: int, kernel: tuple[int, int], strides: list[tuple[int, int]]
) -> nn.Sequential:
    """``depth`` residual blocks for each width; the first block of stage i has ``strides[i]``."""
    blocks: list[nn.Module] = []
    inputs = widths[0]
    for outputs, stride in zip(widths, strides, strict=True):
        blocks.append(Residual(inputs, outputs, kernel, stride))
        blocks.extend(Residual(outputs, outputs, kernel, (1, 1)) for _ in range(depth - 1))
        inputs = outputs
    return nn.Sequential(*blocks)


class ResNet18(nn.Module):
    """ResNet-18 with a 3x3 stem and no pooling before the last stage, as used on CIFAR-10 and MNIST.

    Args:
        in_channels: C of the images; the network reads 2C channels, ``[x, 1 − x]`` with zeros for hidden pixels.
        num_classes: K.
        widths: channels of each stage; (64, 128, 256, 512) is ResNet-18 (11 million parameters).
        depth: residual blocks per stage; 2 is ResNet-18.

    ``forward`` maps rendered views (N, 2C, H, W) to logits (N, K).
    """

    encoding = "null"

    def __init__(
        self, in_channels: int, num_classes: int, widths: tuple[int, ...] = (64, 128, 256, 512), depth: int = 2
    ):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(2 * in_channels, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)
        )
        self.body = stages(widths, depth, (3, 3), [(1, 1)] + [(2, 2)] * (len(widths) - 1))
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, views: Float[Tensor, "N C2 H W"]) -> Float[Tensor, "N K"]:
        return self.head(self.body(self.stem(views)).mean((2, 3)))
