"""Column and row bands (Levine & Feizi 2020, section 2.2, "band smoothing")."""

from abc import abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, final

from jaxtyping import Bool, Int
from torch import Tensor

from certipatch.views.base import Views, check_sizes, number_of_combinations, runs, start_positions, union_of


@dataclass(frozen=True)
class Bands(Views):
    """Bands of ``width`` full columns or rows.

    Args:
        width: s, in pixels.
        stride: pixels from one band to the next.
        wrap: bands that leave the image come in again on the other side, as in the paper; without, the last band
            ends at the border.
        count: bands per view; with more than one, the views are all choices of ``count`` bands.
    """

    width: int
    stride: int = 1
    wrap: bool = True
    count: int = 1
    name: ClassVar[str]

    def __post_init__(self):
        check_sizes(self.width, self.stride, self.count)

    @abstractmethod
    def length(self, image_size: tuple[int, int]) -> int:
        """Pixels of the axis along which the bands are laid out."""

    def starts(self, image_size: tuple[int, int]) -> list[int]:
        """First column (row) of every single band."""
        return start_positions(self.length(image_size), self.width, self.stride, self.wrap)

    def number(self, image_size: tuple[int, int]) -> int:
        return number_of_combinations(len(self.starts(image_size)), self.count)

    def settings(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}

    def shown(self, image_size: tuple[int, int]) -> Bool[Tensor, "n length"]:
        """Columns (rows) shown by every single band."""
        return runs(self.length(image_size), self.width, self.starts(image_size))


@final
@dataclass(frozen=True)
class Columns(Bands):
    """Vertical bands; band v starts at column ``v · stride``."""

    name: ClassVar[str] = "columns"

    def length(self, image_size: tuple[int, int]) -> int:
        return image_size[1]

    def visible(self, image_size: tuple[int, int], index: Int[Tensor, " v"] | None = None) -> Bool[Tensor, "v H W"]:
        self.number(image_size)
        singles = self.shown(image_size)[:, None, :].expand(-1, image_size[0], -1)
        return union_of(singles, self.count, index)


@final
@dataclass(frozen=True)
class Rows(Bands):
    """Horizontal bands; band v starts at row ``v · stride``."""

    name: ClassVar[str] = "rows"

    def length(self, image_size: tuple[int, int]) -> int:
        return image_size[0]

    def visible(self, image_size: tuple[int, int], index: Int[Tensor, " v"] | None = None) -> Bool[Tensor, "v H W"]:
        self.number(image_size)
        singles = self.shown(image_size)[:, :, None].expand(-1, -1, image_size[1])
        return union_of(singles, self.count, index)
