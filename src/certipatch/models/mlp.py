"""A network of fully connected layers on all pixels of an image."""

import itertools
from typing import Literal

from torch import nn

from certipatch.models.settings import NetworkSettings, Widths, check_no_views
from certipatch.views import RandomViews, Views


class MLPSettings(NetworkSettings):
    """Logits of whole images by fully connected layers with ReLU."""

    name: Literal["mlp"] = "mlp"
    widths: Widths = (255,)

    def build(
        self, views: Views | RandomViews | None, channels: int, classes: int, image_size: tuple[int, int]
    ) -> nn.Module:
        check_no_views(self.name, views)
        return MLP(channels, classes, image_size, **self.sizes())


class MLP(nn.Module):
    """Logits of whole images by fully connected layers with ReLU.

    Args:
        in_channels: C of the images.
        num_classes: K.
        image_size: (H, W) of the images.
        widths: neurons of each hidden layer; (255,) is the network of Chiang et al. 2020 (appendix A.1).

    ``forward`` maps images (N, C, H, W) to logits (N, K).
    """

    encoding = "picture"

    def __init__(
        self, in_channels: int, num_classes: int, image_size: tuple[int, int], widths: tuple[int, ...] = (255,)
    ):
        super().__init__()
        sizes = (in_channels * image_size[0] * image_size[1], *widths)
        hidden = [(nn.Linear(n, m), nn.ReLU()) for n, m in itertools.pairwise(sizes)]
        self.body = nn.Sequential(nn.Flatten(), *itertools.chain.from_iterable(hidden))
        self.head = nn.Linear(sizes[-1], num_classes)

    def forward(self, pictures):  # torch.fx calls it with a proxy, which has no shape to check
        return self.head(self.body(pictures))
