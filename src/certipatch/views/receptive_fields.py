"""Receptive fields: view v is the window of pixels that cell v of a network's last feature map can depend on."""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, final

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from certipatch.errors import InputError
from certipatch.views.base import Views


@final
@dataclass(frozen=True)
class ReceptiveFields(Views):
    """A grid of windows: cell (i, j) sees rows ``offset + i·stride … + size − 1``, columns likewise, cut at the border.

    Args:
        size: pixels per axis (rows, columns).
        stride: pixels per axis.
        offset: first pixel per axis; negative where the network pads.
        grid: cells per axis. View v is cell (v // columns, v % columns).
        resized: (H, W) that images are resized to (bicubic) before the windows are cut; a window then shows every
            pixel that its resized pixels are made of, up to two beyond on each side.
    """

    size: tuple[int, int]
    stride: tuple[int, int]
    offset: tuple[int, int]
    grid: tuple[int, int]
    resized: tuple[int, int] | None = None
    name: ClassVar[str] = "receptive-fields"

    def __post_init__(self):
        for field in ("size", "stride", "grid"):
            if min(getattr(self, field)) < 1:
                raise InputError(f"{field} of receptive fields must be at least 1, not {getattr(self, field)}")

    def number(self, image_size: tuple[int, int]) -> int:
        return self.grid[0] * self.grid[1]

    def settings(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}

    def _axis(self, axis: int, length: int) -> Bool[Tensor, "n length"]:
        first = self.offset[axis] + torch.arange(self.grid[axis]) * self.stride[axis]
        last = first + self.size[axis] - 1
        if self.resized is not None:
            side = self.resized[axis]
            first = _source(first.clamp(0, side - 1), side, length) - 1
            last = _source(last.clamp(0, side - 1), side, length, up=1e-6) + 2
        pixel = torch.arange(length)
        return (pixel >= first[:, None]) & (pixel <= last[:, None])

    def visible(self, image_size: tuple[int, int], index: Int[Tensor, " v"] | None = None) -> Bool[Tensor, "v H W"]:
        rows, columns = self._axis(0, image_size[0]), self._axis(1, image_size[1])
        cell = torch.arange(self.number(image_size)) if index is None else index
        return rows[cell // self.grid[1]][:, :, None] & columns[cell % self.grid[1]][:, None, :]


def _source(pixel: Int[Tensor, " n"], side: int, length: int, up: float = -1e-6) -> Int[Tensor, " n"]:
    """The pixel at or before which a resized pixel lies; rounding is resolved towards more pixels."""
    return ((pixel.double() + 0.5) * length / side - 0.5 + up).floor().long()
