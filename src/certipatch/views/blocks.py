"""Square blocks (Levine & Feizi 2020, section 2.2, "block smoothing")."""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, final

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from certipatch.views.base import Views, check_sizes, number_of_combinations, runs, start_positions, union_of


@final
@dataclass(frozen=True)
class Blocks(Views):
    """Blocks of ``width`` x ``width`` pixels, row by row. Arguments as for bands."""

    width: int
    stride: int = 1
    wrap: bool = True
    count: int = 1
    name: ClassVar[str] = "blocks"

    def __post_init__(self):
        check_sizes(self.width, self.stride, self.count)

    def starts(self, image_size: tuple[int, int]) -> tuple[list[int], list[int]]:
        """First rows and first columns of the single blocks; block v is (v // columns, v % columns)."""
        tops, lefts = (start_positions(n, self.width, self.stride, self.wrap) for n in image_size)
        return tops, lefts

    def number(self, image_size: tuple[int, int]) -> int:
        tops, lefts = self.starts(image_size)
        return number_of_combinations(len(tops) * len(lefts), self.count)

    def settings(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}

    def visible(self, image_size: tuple[int, int], index: Int[Tensor, " v"] | None = None) -> Bool[Tensor, "v H W"]:
        tops, lefts = self.starts(image_size)
        rows, columns = runs(image_size[0], self.width, tops), runs(image_size[1], self.width, lefts)
        every = torch.arange(len(tops) * len(lefts))
        if self.count > 1:
            self.number(image_size)
            blocks = rows[every // len(lefts)][:, :, None] & columns[every % len(lefts)][:, None, :]
            return union_of(blocks, self.count, index)
        chosen = every if index is None else index
        return rows[chosen // len(lefts)][:, :, None] & columns[chosen % len(lefts)][:, None, :]
