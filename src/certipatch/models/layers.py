"""Layers that torch has no module for."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Crop(nn.Module):
    """Cut ``margin`` cells off every side."""

    def __init__(self, margin: int):
        super().__init__()
        self.margin = margin

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (-self.margin,) * 4)

    def extra_repr(self) -> str:
        return f"margin={self.margin}"


class Resize(nn.Module):
    """Resize images to ``side`` x ``side`` pixels: bicubic, without antialiasing."""

    TAPS = 4  # input pixels per axis that one output pixel reads

    def __init__(self, side: int):
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, (self.side, self.side), mode="bicubic", align_corners=False)

    def extra_repr(self) -> str:
        return f"side={self.side}"


class Position(nn.Module):
    """Add a learned value to every cell of a map, so that a network of small windows knows where each one lies."""

    def __init__(self, channels: int, height: int, width: int):
        super().__init__()
        self.value = nn.Parameter(torch.zeros(1, channels, height, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.value


class Shortcut(nn.Module):
    """The sum of an input and the output of ``body`` for it (He et al. 2016)."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)
