"""Column and row bands together: twice the evidence, of which a patch touches the same share."""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, final

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from certipatch.errors import InputError
from certipatch.views.bands import Bands, Columns, Rows
from certipatch.views.base import Views, check_sizes


@final
@dataclass(frozen=True)
class Cross(Views):
    """All column bands, then all row bands; each argument is as for ``Columns`` and ``Rows``.

    Columns and rows err on different images, so that their evidence together holds more than either alone. It is
    certipatch's own, in none of the papers.
    """

    width: int
    stride: int = 1
    wrap: bool = True
    count: int = 1
    name: ClassVar[str] = "cross"

    def __post_init__(self):
        if self.count != 1:
            raise InputError(f"a cross has one band per view, not {self.count}; use columns or rows for more")
        check_sizes(self.width, self.stride, self.count)

    @property
    def parts(self) -> tuple[Bands, Bands]:
        """The columns and the rows."""
        return Columns(self.width, self.stride, self.wrap), Rows(self.width, self.stride, self.wrap)

    def number(self, image_size: tuple[int, int]) -> int:
        return sum(part.number(image_size) for part in self.parts)

    def visible(self, image_size: tuple[int, int], index: Int[Tensor, " v"] | None = None) -> Bool[Tensor, "v H W"]:
        every = torch.cat([part.visible(image_size) for part in self.parts])
        return every if index is None else every[index]

    def settings(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}
