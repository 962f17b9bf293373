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
    """

    size: tuple[int, int]
    stride: tuple[int, int]
    offset: tuple[int, int]
    grid: tuple[int, int]
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
        starts = self.offset[axis] + torch.arange(self.grid[axis]) * self.stride[axis]
        pixel = torch.arange(length)
        return (pixel >= starts[:, None]) & (pixel < starts[:, None] + self.size[axis])

    def visible(self, image_size: tuple[int, int], index: Int[Tensor, " v"] | None = None) -> Bool[Tensor, "v H W"]:
        rows, columns = self._axis(0, image_size[0]), self._axis(1, image_size[1])
        cell = torch.arange(self.number(image_size)) if index is None else index
        return rows[cell // self.grid[1]][:, :, None] & columns[cell % self.grid[1]][:, None, :]
