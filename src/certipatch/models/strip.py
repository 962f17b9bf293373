"""Strip network: the evidence of every band in one forward pass.

A stem as wide as the band reads the picture once, with circular padding where bands wrap. From there on every
convolution runs along the band only, never across bands, so output band ``v`` depends on the pixels of band ``v`` and
on its position, and on nothing else. No picture is ablated and no hidden pixel is ever computed on: the evidence of
all W column bands costs about one ordinary forward pass, where a NULL-encoded picture costs one pass per band.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from certipatch.views import Bands, Blocks, Rows


class _Residual(nn.Module):
    """Two convolutions along the band around a shortcut; ``stride`` thins the band, never the set of bands."""

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
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class StripNet(nn.Module):
    """Logits of every view of ``views`` from one pass over the whole picture.

    Args:
        views: the bands (columns or rows, one band a view) or blocks that the network serves.
        in_channels: C of the pictures.
        num_classes: K.
        image_size: (H, W) in pixels; positions are learned, so one network serves one size.
        widths: channels of each stage. Each stage but the first halves the length of the band.
        depth: residual blocks per stage.

    ``forward`` maps pictures (B, C, H, W) to logits (B, V, K). It is certipatch's own network, not the paper's.
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
            raise ValueError(f"a strip network reads one band or block per view, not {views.count}; use resnet18")
        self.views = views
        self.rows = isinstance(views, Rows)
        height, width = (image_size[1], image_size[0]) if self.rows else image_size
        blocks = isinstance(views, Blocks)
        along = 1 if blocks else 3
        grid = tuple(len(s) for s in views.starts(image_size)) if blocks else (None, len(views.starts(image_size)))
        if blocks:
            self.stem = nn.Conv2d(in_channels, widths[0], views.width, views.stride, bias=False)
        else:
            self.stem = nn.Conv2d(
                in_channels, widths[0], (4, views.width), (2, views.stride), padding=(1, 0), bias=False
            )
        length = grid[0] if blocks else (height - 2) // 2 + 1
        self.position = nn.Parameter(torch.zeros(1, widths[0], length, grid[1]))
        self.norm = nn.BatchNorm2d(widths[0])
        stages: list[nn.Module] = []
        for i, (inputs, outputs) in enumerate(zip((widths[0], *widths[:-1]), widths, strict=True)):
            halve = (2, 1) if i > 0 and not blocks else (1, 1)
            stages.append(_Residual(inputs, outputs, (along, 1), halve))
            stages.extend(_Residual(outputs, outputs, (along, 1), (1, 1)) for _ in range(depth - 1))
        self.body = nn.Sequential(*stages)
        self.collapse = not blocks
        if self.collapse:
            for i in range(1, len(widths)):
                length = (length - 1) // 2 + 1
            self.pool = nn.Conv2d(widths[-1], widths[-1], (length, 1))
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = images.transpose(2, 3) if self.rows else images
        if self.views.wrap:
            overlap = self.views.width - 1
            x = torch.cat([x, x[..., :overlap]], dim=3)
            if not self.collapse:
                x = torch.cat([x, x[..., :overlap, :]], dim=2)
        x = F.relu(self.norm(self.stem(x) + self.position))
        x = self.body(x)
        if self.collapse:
            x = F.relu(self.pool(x))
        return self.head(x.flatten(2).transpose(1, 2))
