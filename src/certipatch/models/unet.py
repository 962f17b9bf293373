"""A small U-Net (Ronneberger et al. 2015): a map for an image, of the image's size."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class UNet(nn.Module):
    """Maps images (B, C, H, W) to maps (B, K, H, W): down by halves, up again, each level beside the features that came down.

    Args:
        in_channels: C.
        out_channels: K.
        widths: channels of each level, the finest first. Smaller than the original's, whose work the networks that it
            guides here would not repay.

    Images whose sides are no multiples of 2^(levels − 1) are padded with zeros, and the maps cut.
    """

    def __init__(self, in_channels: int, out_channels: int, widths: tuple[int, ...] = (8, 16, 32)):
        super().__init__()
        self.down = nn.ModuleList(_block(n, m) for n, m in zip((in_channels, *widths), widths, strict=False))
        pairs = list(zip(widths[1:], widths, strict=False))[::-1]
        self.rise = nn.ModuleList(nn.ConvTranspose2d(n, m, 2, 2) for n, m in pairs)
        self.up = nn.ModuleList(_block(2 * m, m) for _, m in pairs)
        self.head = nn.Conv2d(widths[0], out_channels, 1)

    def forward(self, pictures: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K H W"]:
        height, width = pictures.shape[2:]
        unit = 2 ** len(self.up)
        x, kept = F.pad(pictures, (0, -width % unit, 0, -height % unit)), []
        for number, block in enumerate(self.down):
            x = block(x if number == 0 else F.max_pool2d(x, 2))
            kept.append(x)
        for rise, block in zip(self.rise, self.up, strict=True):
            kept.pop()
            x = block(torch.cat([kept[-1], rise(x)], 1))
        return self.head(x)[:, :, :height, :width]


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, 1, 1), nn.ReLU(), nn.Conv2d(outputs, outputs, 3, 1, 1), nn.ReLU()
    )
