"""Interval propagation through pooling: largest and mean of each window, and the mean of a whole map."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from certipatch.bounds.interval import Interval, Window, reached, widened
from certipatch.bounds.layers import Op, Pair, State, added, changes


class Pool(Op):
    """Pooling: monotone, over windows of ``kernel`` cells."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    fill: float
    """The value outside the map."""

    @abstractmethod
    def pool(self, x: Tensor, image: tuple[range, range], size: Pair) -> Tensor:
        """Cells ``image`` of the answer, from the cells that they read of a map of ``size`` cells, filled outside of it."""

    def window(self, inputs: Sequence[State], clean: Sequence[Interval], image: Interval) -> State:
        (x,), (before,) = inputs, clean
        if not isinstance(x, Window):
            return super().window(inputs, clean, image)
        (down, across), size = self.reach, (before.shape[2], before.shape[3])
        rows = reached(x.top, x.size[0], self.stride[0], self.padding[0], down, image.shape[2])
        columns = reached(x.left, x.size[1], self.stride[1], self.padding[1], across, image.shape[3])
        if not rows or not columns:
            return None
        read = x.within(before, self._read(rows, 0), self._read(columns, 1), self.fill)
        return Window(rows.start, columns.start, self._pooled(read, (rows, columns), size))

    def whole(self, *inputs: Interval) -> Interval:
        (x,) = inputs
        size = (x.shape[2], x.shape[3])
        rows, columns = (range(n) for n in self.cells(size))
        down, across = self._read(rows, 0), self._read(columns, 1)
        around = (-across.start, across.stop - size[1], -down.start, down.stop - size[0])
        return self._pooled(x.map(lambda x: F.pad(x, around, value=self.fill)), (rows, columns), size)

    def cells(self, size: Pair) -> list[int]:
        """Rows and columns of the answer."""
        counts = []
        for n, k, s, p, d in zip(size, self.kernel, self.stride, self.padding, self.dilation, strict=True):
            span = n + 2 * p - d * (k - 1) - 1
            count = (-(-span // s) if self.ceil else span // s) + 1
            if self.ceil and (count - 1) * s >= n + p:
                count -= 1  # torch lets no window start in the padding behind
            counts.append(count)
        return counts

    @property
    @abstractmethod
    def ceil(self) -> bool:
        """True if a last window may leave the padded map."""

    @property
    def reach(self) -> Pair:
        """Rows and columns from the first cell of a window to the last."""
        rows, columns = (d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True))
        return rows, columns

    def _read(self, cells: range, axis: int) -> range:
        """Compute the cells that output cells read, along one axis."""
        first, last = (cell * self.stride[axis] - self.padding[axis] for cell in (cells.start, cells.stop - 1))
        return range(first, last + self.reach[axis] + 1)

    def _pooled(self, read: Interval, image: tuple[range, range], size: Pair) -> Interval:
        return read.map(lambda x: self.pool(x, image, size))


@final
@dataclass(frozen=True, eq=False)
class MaxPool(Pool):
    """The largest of each window."""

    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    ceil: bool = False  # type: ignore[assignment]
    fill = -math.inf

    def pool(self, x: Tensor, image: tuple[range, range], size: Pair) -> Tensor:
        return F.max_pool2d(x, self.kernel, self.stride, 0, self.dilation)


@final
@dataclass(frozen=True, eq=False)
class AvgPool(Pool):
    """The mean of each window; ``counts_padding`` and ``divisor`` as in torch."""

    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    ceil: bool = False  # type: ignore[assignment]
    counts_padding: bool = True
    divisor: int | None = None
    eps: float = 0.0
    dilation = (1, 1)
    fill = 0.0

    def pool(self, x: Tensor, image: tuple[range, range], size: Pair) -> Tensor:
        sums = F.avg_pool2d(x, self.kernel, self.stride, 0, divisor_override=1)
        if self.divisor is not None:
            return sums / self.divisor
        down, across = (self._counted(cells, axis, size[axis], x) for axis, cells in enumerate(image))
        return sums / (down[:, None] * across)

    def _counted(self, cells: range, axis: int, size: int, like: Tensor) -> Tensor:
        """Cells along one axis that count in each mean."""
        first = torch.arange(cells.start, cells.stop) * self.stride[axis] - self.padding[axis]
        last = (first + self.kernel[axis]).clamp(max=size + (self.padding[axis] if self.counts_padding else 0))
        return (last - (first if self.counts_padding else first.clamp(min=0))).to(like)

    def _pooled(self, read: Interval, image: tuple[range, range], size: Pair) -> Interval:
        pooled = super()._pooled(read, image, size)
        if self.eps == 0:
            return pooled
        guard = (math.prod(self.kernel) + 8) * self.eps
        by = guard * self.pool(torch.maximum(read.lower.abs(), read.upper.abs()), image, size)
        return widened(pooled.lower, pooled.upper, by)


@final
@dataclass(frozen=True, eq=False)
class Mean(Op):
    """The mean over rows and columns: global average pooling."""

    keepdim: bool
    eps: float = 0.0

    def whole(self, *inputs: Interval) -> Interval:
        (x,) = inputs
        mean = x.map(lambda x: x.mean((2, 3), keepdim=self.keepdim))
        if self.eps == 0:
            return mean
        guard = (x.shape[2] * x.shape[3] + 8) * self.eps
        ends = torch.maximum(x.lower.abs(), x.upper.abs())
        return widened(mean.lower, mean.upper, guard * ends.mean((2, 3), keepdim=self.keepdim))

    def window(self, inputs: Sequence[State], clean: Sequence[Interval], image: Interval) -> State:
        (x,), (before,) = inputs, clean
        if not isinstance(x, Window):
            return super().window(inputs, clean, image)
        cells = before.shape[2] * before.shape[3]
        moved, grown = (
            change.sum((2, 3), keepdim=self.keepdim) / cells for change in changes(x, before, (cells + 8) * self.eps)
        )
        return added(image, moved, grown, self.eps)
