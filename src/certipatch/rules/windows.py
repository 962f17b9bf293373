"""Windows of views, and sums outside of them: products of row sets and column sets of a grid of views.

Boxes of a feature map are products of runs of rows and runs of columns; bands are runs in a grid of one row; any list
of windows is a list of column sets in a grid of one row; windows over two families of views are pairs. Sums over a
product need no product of all windows with all views: first the rows are summed, then the columns.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor


@final
@dataclass(frozen=True, eq=False)
class Windows:
    """W = n·m windows: every row set with every column set of a grid of R x C views; view v is (v // C, v % C).

    Make them with ``boxes``, ``runs`` or ``from_masks``.
    """

    rows: Bool[Tensor, "n R"]
    columns: Bool[Tensor, "m C"]

    @staticmethod
    def boxes(grid: tuple[int, int], size: tuple[int, int]) -> "Windows":
        """Every box of ``size`` views that fits a grid of ``grid`` views; one as large as the grid where it is larger."""
        return Windows(*(_runs(length, width, circular=False) for length, width in zip(grid, size, strict=True)))

    @staticmethod
    def runs(length: int, width: int, circular: bool = False) -> "Windows":
        """Every run of ``width`` neighbours among ``length`` views in a row, or in a circle."""
        return Windows(torch.ones(1, 1, dtype=torch.bool), _runs(length, width, circular))

    @staticmethod
    def from_masks(members: Bool[Tensor, "W V"]) -> "Windows":
        """Any windows. ValueError unless bool, at least one, over at least one view."""
        if members.dtype != torch.bool or members.ndim != 2 or 0 in members.shape:
            raise ValueError(f"windows are bool (W ≥ 1, V ≥ 1), not {members.dtype} {tuple(members.shape)}")
        return Windows(torch.ones(1, 1, dtype=torch.bool), members)

    @property
    def number_of_views(self) -> int:
        return self.rows.shape[1] * self.columns.shape[1]

    @property
    def _shape(self) -> tuple[int, int]:
        return self.rows.shape[1], self.columns.shape[1]

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    @cached_property
    def members(self) -> Bool[Tensor, "W V"]:
        """Window w's views."""
        return (self.rows[:, None, :, None] & self.columns[None, :, None, :]).flatten(0, 1).flatten(1)

    def outside(self, scores: Float64[Tensor, "B V K"]) -> Float64[Tensor, "B W K"]:
        """Sums over the views outside of every window, added up directly: nothing large is subtracted."""
        batch, _, classes = scores.shape
        shape = self._shape
        grid = scores.reshape(batch, *shape, classes)
        rows, columns = self.rows.to(scores), self.columns.to(scores)
        inside = (rows @ grid.reshape(batch, shape[0], shape[1] * classes)).view(batch * len(rows), shape[1], classes)
        result = ((1 - columns) @ inside).view(batch, len(rows), len(columns), classes)
        if not bool(self.rows.all()):
            result += ((1 - rows) @ grid.sum(2))[:, :, None]
        return result.flatten(1, 2)

    def factor(self, sees: Bool[Tensor, "L V"]) -> "tuple[Windows, Int64[Tensor, 'L']] | None":
        """Rows of ``sees`` as products in this grid, and which product each row is; None if one is no product."""
        grid = sees.view(len(sees), self.rows.shape[1], self.columns.shape[1])
        rows, columns = grid.any(2), grid.any(1)
        if not torch.equal(rows[:, :, None] & columns[:, None, :], grid):
            return None
        rows, row = torch.unique(rows, dim=0, return_inverse=True)
        columns, column = torch.unique(columns, dim=0, return_inverse=True)
        return Windows(rows, columns), row * len(columns) + column

    def overlap_sums(self, other: "Windows", scores: Float64[Tensor, "B V"]) -> Float64[Tensor, "B L W"]:
        """Sums over the views that window w shares with window l of ``other``, for all pairs; exact for whole numbers."""
        batch = len(scores)
        sums = self._overlaps(other, scores).view(batch, len(self.rows), len(other.rows), len(self.columns), -1)
        return sums.permute(0, 2, 4, 1, 3).reshape(batch, len(other), len(self))

    def max_sum_outside(self, other: "Windows", scores: Float64[Tensor, "B V"]) -> Float64[Tensor, "B L"]:
        """The largest sum of a window over its views outside of window l of ``other``."""
        batch, n, m = len(scores), len(self.rows), len(self.columns)
        sums = self._overlaps(other, scores).view(batch, n, len(other.rows), m, len(other.columns))
        inside = self.rows.to(scores) @ scores.view(batch, *self._shape) @ self.columns.to(scores).T
        beside = torch.sub(inside.view(batch, n, 1, m, 1), sums, out=sums)
        return beside.amax(3).amax(1).view(batch, len(other))

    def min_remaining_sum(
        self, other: "Windows", scores: Float64[Tensor, "B V"], clip: float
    ) -> Float64[Tensor, "B L"]:
        """The least that a window leaves over, where every view of window l of ``other`` scores a finite ``clip``."""
        aside = other.outside(scores[..., None])
        beside = (scores @ self.members.to(scores).T)[:, None] - self.overlap_sums(other, scores)
        shared = self.overlap_sums(other, torch.ones_like(scores[:1]))
        return (aside - beside + (other.members.sum(1)[:, None] - shared) * clip).amin(2)

    def _overlaps(self, other: "Windows", scores: Float64[Tensor, "B V"]) -> Float64[Tensor, "B n_nl m_ml"]:
        """Shared sums by (row set, other row set) and (column set, other column set)."""
        rows = (self.rows[:, None] & other.rows).flatten(0, 1).to(scores)
        inside = rows @ scores.view(len(scores), *self._shape)
        if len(rows) > 1:
            return inside @ (self.columns[:, None] & other.columns).flatten(0, 1).to(scores).T
        # Bands and lists of windows: no table of all pairs of column sets.
        return ((inside * self.columns.to(scores)) @ other.columns.to(scores).T).flatten(1)[:, None]


@final
@dataclass(frozen=True, eq=False)
class ProductWindows:
    """W = n·m windows over two families of views that follow each other: every window of the one with every of the other.

    What a patch touches of columns and rows is of this kind. A sum is the sum of one from each family, and so is the
    largest; nothing has the size of all pairs of windows.
    """

    first: Windows
    second: Windows

    @property
    def number_of_views(self) -> int:
        return self.first.number_of_views + self.second.number_of_views

    def __len__(self) -> int:
        return len(self.first) * len(self.second)

    @cached_property
    def members(self) -> Bool[Tensor, "W V"]:
        """Window w's views."""
        first, second = self.first.members, self.second.members
        return torch.cat([first.repeat_interleave(len(second), 0), second.repeat(len(first), 1)], dim=1)

    def _split(self, values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        one, other = values.split([self.first.number_of_views, self.second.number_of_views], dim)
        return one, other

    def outside(self, scores: Float64[Tensor, "B V K"]) -> Float64[Tensor, "B W K"]:
        """Sums over the views outside of every window."""
        one, other = self._split(scores, 1)
        return (self.first.outside(one)[:, :, None] + self.second.outside(other)[:, None]).flatten(1, 2)

    def factor(self, sees: Bool[Tensor, "L V"]) -> "tuple[ProductWindows, Int64[Tensor, 'L']] | None":
        """Rows of ``sees`` as pairs, and which pair each row is; None if there would be far more pairs than rows."""
        one, other = self._split(sees, 1)
        first, i = torch.unique(one, dim=0, return_inverse=True)
        second, j = torch.unique(other, dim=0, return_inverse=True)
        if len(first) * len(second) > 4 * len(sees) + 16:
            return None
        return ProductWindows(Windows.from_masks(first), Windows.from_masks(second)), i * len(second) + j

    def overlap_sums(self, other: "ProductWindows", scores: Float64[Tensor, "B V"]) -> Float64[Tensor, "B L W"]:
        """Sums over the views that window w shares with window l of ``other``, for all pairs."""
        one, two = self._split(scores, 1)
        first, second = self.first.overlap_sums(other.first, one), self.second.overlap_sums(other.second, two)
        return (first[:, :, None, :, None] + second[:, None, :, None, :]).flatten(3).flatten(1, 2)

    def max_sum_outside(self, other: "ProductWindows", scores: Float64[Tensor, "B V"]) -> Float64[Tensor, "B L"]:
        """The largest sum of a window over its views outside of window l of ``other``."""
        one, two = self._split(scores, 1)
        first = self.first.max_sum_outside(other.first, one)
        return (first[:, :, None] + self.second.max_sum_outside(other.second, two)[:, None]).flatten(1)

    def min_remaining_sum(
        self, other: "ProductWindows", scores: Float64[Tensor, "B V"], clip: float
    ) -> Float64[Tensor, "B L"]:
        """The least that a window leaves over, where every view of window l of ``other`` scores a finite ``clip``."""
        one, two = self._split(scores, 1)
        first = self.first.min_remaining_sum(other.first, one, clip)
        return (first[:, :, None] + self.second.min_remaining_sum(other.second, two, clip)[:, None]).flatten(1)


def _runs(length: int, width: int, circular: bool) -> Bool[Tensor, "n length"]:
    if length < 1 or width < 1:
        raise ValueError(f"windows of {width} among {length} views; both must be at least 1")
    width = min(width, length)
    starts = torch.arange(length if circular else length - width + 1)[:, None]
    return (torch.arange(length) - starts) % length < width
