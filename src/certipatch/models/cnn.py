"""The convolutional networks of Chiang et al. 2020 (appendix A.1): plain convolutions with ReLU, then linear layers."""

from typing import Literal

from torch import nn

from certipatch.errors import InputError
from certipatch.models.settings import Depth, NetworkSettings, Pixels, Widths, check_no_views
from certipatch.views import RandomViews, Views

# Kernel and stride of each convolution; channels of each, then neurons of the hidden linear layers.
LAYOUTS = {
    2: ([(4, 2), (4, 2)], (4, 8, 256)),
    4: ([(3, 1), (4, 2), (3, 1), (4, 2)], (4, 4, 8, 8, 256, 256)),
    5: ([(3, 1), (3, 1), (3, 2), (3, 1), (3, 1)], (64, 64, 128, 128, 128, 512)),
}


class CNNSettings(NetworkSettings):
    """Logits of whole images by convolutions and hidden linear layers, all with ReLU."""

    name: Literal["cnn"] = "cnn"
    depth: Depth = 4
    """Convolutions: 2, 4 or 5."""
    widths: Widths | None = None
    """Channels of each convolution, then neurons of the hidden linear layers; the paper's if absent."""
    kernel: Pixels | None = None
    """Side of the first convolution; the paper's if absent."""

    def build(
        self, views: Views | RandomViews | None, channels: int, classes: int, image_size: tuple[int, int]
    ) -> nn.Module:
        check_no_views(self.name, views)
        return CNN(channels, classes, image_size, **self.sizes())


class CNN(nn.Module):
    """Logits of whole images by 2, 4 or 5 convolutions and one or two hidden linear layers, all with ReLU.

    Args:
        in_channels: C of the images.
        num_classes: K.
        image_size: (H, W) of the images.
        depth: convolutions. 2 and 4 are the paper's small networks; 5 is its wide one, the large one of Gowal et al. 2018
            (17 million parameters on 32x32 images).
        widths: channels of each convolution, then neurons of the hidden linear layers; None for the paper's.
        kernel: side of the first convolution; the paper has 3, 11 and 13 against sparse attackers. None for the layout's.

    ``forward`` maps images (N, C, H, W) to logits (N, K). Convolutions are padded by ⌊(kernel − 1)/2⌋, which the paper
    leaves open.
    """

    encoding = "picture"

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        image_size: tuple[int, int],
        depth: int = 4,
        widths: tuple[int, ...] | None = None,
        kernel: int | None = None,
    ):
        super().__init__()
        if depth not in LAYOUTS:
            raise InputError(f"a cnn has 2, 4 or 5 convolutions, not {depth}; change depth")
        layout, usual = LAYOUTS[depth]
        widths = usual if widths is None else widths
        if len(widths) <= depth:
            raise InputError(
                f"a cnn of {depth} convolutions needs {depth} widths and one per hidden layer, not {widths}"
            )
        layers: list[nn.Module] = []
        size, inputs = image_size, in_channels
        for number, (side, stride) in enumerate(layout):
            side = kernel if number == 0 and kernel is not None else side
            padding = (side - 1) // 2
            layers += [nn.Conv2d(inputs, widths[number], side, stride, padding), nn.ReLU()]
            size = tuple((n + 2 * padding - side) // stride + 1 for n in size)
            inputs = widths[number]
        if min(size) < 1:
            raise InputError(f"pictures of {image_size[0]}x{image_size[1]} are too small for this cnn")
        layers.append(nn.Flatten())
        inputs *= size[0] * size[1]
        for outputs in widths[depth:]:
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
            inputs = outputs
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, num_classes)

    def forward(self, pictures):  # torch.fx calls it with a proxy, which has no shape to check
        return self.head(self.body(pictures))
