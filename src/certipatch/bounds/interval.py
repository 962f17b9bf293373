"""Intervals of activations, and the rectangular windows of them that a patch can reach."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


@final
@dataclass(frozen=True, eq=False)
class Interval:
    """Every activation lies in ``[lower, upper]``; where nothing can move it both are the activation itself."""

    lower: Float[Tensor, "*shape"]
    upper: Float[Tensor, "*shape"]

    @property
    def shape(self) -> torch.Size:
        return self.lower.shape

    @property
    def centre(self) -> Float[Tensor, "*shape"]:
        return self.lower if self.is_point else (self.lower + self.upper).mul_(0.5)

    @property
    def radius(self) -> Float[Tensor, "*shape"]:
        return (self.upper - self.lower).mul_(0.5)

    @property
    def is_point(self) -> bool:
        """True if lower and upper are one tensor."""
        return self.lower is self.upper

    def map(self, function: Callable[[Tensor], Tensor]) -> "Interval":
        """A function of both ends; of a point only once."""
        lower = function(self.lower)
        return Interval(lower, lower if self.is_point else function(self.upper))

    def cut(self, top: int, left: int, height: int, width: int) -> "Interval":
        """A rectangle of a map (B, C, H, W)."""
        return self.map(lambda x: x[:, :, top : top + height, left : left + width])


def widened(lower: Tensor, upper: Tensor, by: Tensor | float) -> Interval:
    """The interval with its ends moved outward; ``by`` is 0 or at least the rounding of both."""
    return Interval(lower, upper) if isinstance(by, float) and by == 0 else Interval(lower - by, upper + by)


@final
@dataclass(frozen=True, eq=False)
class Window:
    """The rectangle of a map outside which it equals the clean map; its first row and column, and its values."""

    top: int
    left: int
    inside: Interval

    @property
    def size(self) -> tuple[int, int]:
        return self.inside.shape[2], self.inside.shape[3]

    def changes(self, clean: Interval) -> tuple[Tensor, Tensor]:
        """Centre and radius inside, less those of the clean map."""
        before = clean.cut(self.top, self.left, *self.size)
        if before.is_point:
            return self.inside.centre - before.lower, self.inside.radius
        return self.inside.centre - before.centre, self.inside.radius - before.radius

    def within(self, clean: Interval, rows: range, columns: range, fill: float = 0.0) -> Interval:
        """A rectangle of the map that holds this window, as it is with it; ``fill`` where it leaves the map."""
        return _pasted(self, clean, rows, columns, fill)

    def everywhere(self, clean: Interval) -> Interval:
        """The whole map."""
        return _pasted(self, clean, range(clean.shape[2]), range(clean.shape[3]), 0.0)


def _pasted(window: Window, clean: Interval, rows: range, columns: range, fill: float) -> Interval:
    height, width = clean.shape[2:]
    top, left = max(rows.start, 0), max(columns.start, 0)
    bottom, right = min(rows.stop, height), min(columns.stop, width)
    around = (left - columns.start, columns.stop - right, top - rows.start, rows.stop - bottom)
    first, second = window.top - top, window.left - left

    def paste(whole: Tensor, part: Tensor) -> Tensor:
        pasted = whole[:, :, top:bottom, left:right].clone()
        # A pooling whose stride exceeds its kernel leaves rows of the window unread.
        inner = part[:, :, max(-first, 0) : bottom - window.top, max(-second, 0) : right - window.left]
        pasted[
            :, :, max(first, 0) : max(first, 0) + inner.shape[2], max(second, 0) : max(second, 0) + inner.shape[3]
        ] = inner
        return F.pad(pasted, around, value=fill) if any(around) else pasted

    return Interval(paste(clean.lower, window.inside.lower), paste(clean.upper, window.inside.upper))


def reached(first: int, size: int, stride: int, padding: int, reach: int, cells: int) -> range:
    """Outputs of one axis that read one of the cells first … first + size − 1."""
    return range(
        max(0, -((reach - first - padding) // stride)),
        min(cells - 1, (first + size - 1 + padding) // stride) + 1,
    )
