"""Strip network: the evidence of every band in one forward pass.

A stem as wide as the band reads the image once, with circular padding where bands wrap. From there on every
convolution runs along the band only, never across bands, so output band ``v`` depends on the pixels of band ``v`` and
on its position, and on nothing else. No image is ablated and no hidden pixel is ever computed on: the evidence of
all W column bands costs about one ordinary forward pass, where NULL-encoded images cost one pass per band.
"""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from certipatch.errors import InputError
from certipatch.models.resnet import stages
from certipatch.models.settings import Depth, NetworkSettings, Widths, bands_or_blocks
from certipatch.views import Bands, Blocks, Cross, RandomViews, Rows, Views


class StripSettings(NetworkSettings):
    """Logits of all bands or blocks, or of a cross, from one pass over the whole image."""

    name: Literal["strip"] = "strip"
    widths: Widths = (48, 96, 160)
    depth: Depth = 1
    """Residual blocks per stage."""

    def build(
        self, views: Views | RandomViews | None, channels: int, classes: int, image_size: tuple[int, int]
    ) -> nn.Module:
        if isinstance(views, Cross):
            return CrossNet(views, channels, classes, image_size, **self.sizes())
        return StripNet(bands_or_blocks(self.name, views), channels, classes, image_size, **self.sizes())


class StripNet(nn.Module):
    """Logits of every view of ``views`` from one pass over the whole image.

    Args:
        views: the bands or blocks that the network serves, one per view.
        in_channels: C of the images.
        num_classes: K.
        image_size: (H, W) in pixels; positions are learned, so one network serves one size.
        widths: channels of each stage. Along a band each stage but the first halves the length; a block has collapsed
            to one cell after the stem, so all its further layers are 1x1.
        depth: residual blocks per stage.

    ``forward`` maps images (B, C, H, W) to logits (B, V, K). It is certipatch's own network, in none of the papers.
    """

    encoding = "all-views"

    def __init__(
        self,
        views: Bands | Blocks,
        in_channels: int,
        num_classes: int,
        image_size: tuple[int, int],
        widths: tuple[int, ...] = (48, 96, 160),
        depth: int = 1,
    ):
        super().__init__()
        if views.count != 1:
            raise InputError(f"a strip network reads one band or block per view, not {views.count}; use resnet18")
        views.number(image_size)
        self.views = views
        self.turned = isinstance(views, Rows)
        if isinstance(views, Blocks):
            tops, lefts = views.starts(image_size)
            cells = (len(tops), len(lefts))
            self.stem = nn.Conv2d(in_channels, widths[0], views.width, bias=False)
            self.body = stages(widths, depth, (1, 1), [(1, 1)] * len(widths))
            self.collapse = nn.Identity()
            self.take = (tops, lefts)
        else:
            length = image_size[1] if self.turned else image_size[0]
            cells = ((length - 2) // 2 + 1, len(views.starts(image_size)))
            self.stem = nn.Conv2d(in_channels, widths[0], (4, views.width), (2, 1), padding=(1, 0), bias=False)
            self.body = stages(widths, depth, (3, 1), [(1, 1)] + [(2, 1)] * (len(widths) - 1))
            left = cells[0]
            for _ in widths[1:]:
                left = (left - 1) // 2 + 1
            self.collapse = nn.Sequential(nn.Conv2d(widths[-1], widths[-1], (left, 1)), nn.ReLU(inplace=True))
            self.take = (list(range(cells[0])), views.starts(image_size))
        self.position = nn.Parameter(torch.zeros(1, widths[0], *cells))
        self.norm = nn.BatchNorm2d(widths[0])
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B V K"]:
        x = images.transpose(2, 3) if self.turned else images
        if self.views.wrap:
            overlap = self.views.width - 1
            x = torch.cat([x, x[..., :overlap]], dim=3)
            if isinstance(self.views, Blocks):
                x = torch.cat([x, x[..., :overlap, :]], dim=2)
        x = self.stem(x)
        for axis, starts in zip((2, 3), self.take, strict=True):
            if len(starts) < x.shape[axis]:
                x = x.index_select(axis, torch.tensor(starts, device=x.device))
        x = F.relu(self.norm(x + self.position))
        x = self.collapse(self.body(x))
        return self.head(x.flatten(2).transpose(1, 2))


class CrossNet(nn.Module):
    """Two strip networks, one for the columns and one for the rows; arguments as for ``StripNet``."""

    encoding = "all-views"

    def __init__(self, views: Cross, in_channels: int, num_classes: int, image_size: tuple[int, int], **sizes: Any):
        super().__init__()
        self.strips = nn.ModuleList(
            StripNet(part, in_channels, num_classes, image_size, **sizes) for part in views.parts
        )

    @property
    def parts(self) -> nn.ModuleList:
        """The network of the columns and that of the rows."""
        return self.strips

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B V K"]:
        return torch.cat([strip(images) for strip in self.strips], dim=1)
