"""Layers that torch has no module for."""

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
    """Resize pictures to ``side`` x ``side`` pixels: bicubic, without antialiasing."""

    TAPS = 4  # input pixels per axis that one output pixel reads

    def __init__(self, side: int):
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, (self.side, self.side), mode="bicubic", align_corners=False)

    def extra_repr(self) -> str:
        return f"side={self.side}"
