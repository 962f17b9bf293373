"""Interval propagation through convolutions: on whole maps, on windows, and on small windows as a matrix."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from certipatch.bounds.interval import Interval, Window, reached, widened
from certipatch.bounds.layers import Op, Pair, State, added, changes, guarded

SMALL_MATRIX = 2**17  # up to so many numbers a convolution of a window is done as a product with one matrix
FEW_CHANNELS = 16  # up to here a convolution of torch beats a product of matrices


@final
@dataclass(frozen=True, eq=False)
class Conv(Op):
    """A convolution that pads with zeros."""

    weight: Float[Tensor, "O I h w"]
    bias: Float[Tensor, " O"] | None
    stride: Pair = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Left, right, top, bottom, as ``F.pad`` takes them."""
    dilation: Pair = (1, 1)
    groups: int = 1
    eps: float = 0.0

    @cached_property
    def magnitude(self) -> Float[Tensor, "O I h w"]:
        """|W|"""
        return self.weight.abs()

    @property
    def guard(self) -> float:
        """e of the rounding."""
        return (self.weight[0].numel() + 8) * self.eps

    @property
    def reach(self) -> Pair:
        """Rows and columns from the first cell that an output reads to the last."""
        rows, columns = (d * (k - 1) for d, k in zip(self.dilation, self.weight.shape[2:], strict=True))
        return rows, columns

    def whole(self, *inputs: Interval) -> Interval:
        (x,) = inputs
        if x.is_point and self.eps == 0:
            return x.map(lambda x: self._slide(x, self.weight, self.padding, self.bias))
        centre = self._slide(x.centre, self.weight, self.padding, self.bias)
        radius = self._slide(guarded(x, self.guard), self.magnitude, self.padding)
        guard = self.guard * self.bias.abs()[:, None, None] if self.eps and self.bias is not None else 0.0
        return widened(centre - radius, centre + radius, guard)

    def _slide(
        self, x: Tensor, weight: Tensor, padding: tuple[int, int, int, int], bias: Tensor | None = None
    ) -> Tensor:
        left, right, top, bottom = padding
        if left == right >= 0 and top == bottom >= 0:
            return F.conv2d(x, weight, bias, self.stride, (top, left), self.dilation, self.groups)
        return F.conv2d(F.pad(x, padding), weight, bias, self.stride, 0, self.dilation, self.groups)

    def window(self, inputs: Sequence[State], clean: Sequence[Interval], image: Interval) -> State:
        (x,), (before,) = inputs, clean
        if not isinstance(x, Window):
            return super().window(inputs, clean, image)
        (down, across), (height, width) = self.reach, x.size
        rows = reached(x.top, height, self.stride[0], self.padding[2], down, image.shape[2])
        columns = reached(x.left, width, self.stride[1], self.padding[0], across, image.shape[3])
        if not rows or not columns:
            return None
        moved, grown = changes(x, before, self.guard)
        around = (
            *_around(x.left, width, self.stride[1], self.padding[0], across, columns),
            *_around(x.top, height, self.stride[0], self.padding[2], down, rows),
        )
        numbers = moved[0].numel() * len(self.weight) * len(rows) * len(columns)
        if self.groups == 1 and numbers <= SMALL_MATRIX:
            corner = (around[2], around[0])
            signed, size = self._matrices(moved.shape[1:], corner, (len(rows), len(columns)))
            centre, radius = (
                (part.flatten(1) @ matrix).view(-1, len(self.weight), len(rows), len(columns))
                for part, matrix in ((moved, signed), (grown, size))
            )
        elif self.stride == (1, 1) and self.groups == 1 and self.weight.shape[1] > FEW_CHANNELS:
            cut = (
                rows.start - (x.top + self.padding[2] - down),
                columns.start - (x.left + self.padding[0] - across),
                len(rows),
                len(columns),
            )
            centre, radius = (
                self._scatter(part, taps, cut) for part, taps in zip((moved, grown), self._by_tap, strict=True)
            )
        else:
            centre, radius = self._slide(moved, self.weight, around), self._slide(grown, self.magnitude, around)
        image = image.cut(rows.start, columns.start, len(rows), len(columns))
        return Window(rows.start, columns.start, added(image, centre, radius, self.eps))

    def _matrices(self, read: torch.Size, corner: Pair, image: Pair) -> tuple[Tensor, Tensor]:
        """The convolution of a window (C, h, w) as the matrix (C·h·w, O·rows·columns) it is, of W and of |W|.

        ``corner`` is the window's first cell, less what output (0, 0) of ``image`` reads first.
        """
        key = (read, corner, image, torch.is_grad_enabled())
        if key not in self._kept:
            rows, columns = (
                _taps(*axis)
                for axis in zip(read[1:], corner, image, self.weight.shape[2:], self.stride, self.dilation, strict=True)
            )
            weight = F.pad(self.weight, (0, 1, 0, 1))[:, :, rows[:, :, None, None], columns.to(self.weight.device)]
            signed = weight.permute(1, 2, 4, 0, 3, 5).reshape(read.numel(), -1)
            self._kept[key] = signed, signed.abs()
        return self._kept[key]

    @cached_property
    def _kept(self) -> dict[tuple[torch.Size, Pair, Pair, bool], tuple[Tensor, Tensor]]:
        """Matrices of windows, by the cells that they read; there are as many as a patch's windows differ in size and parity."""
        return {}

    @cached_property
    def _by_tap(self) -> tuple[Tensor, Tensor]:
        """W and |W| as (I, h·w·O)."""
        weight = self.weight.permute(1, 2, 3, 0).flatten(1).contiguous()
        return weight, weight.abs()

    def _scatter(self, x: Tensor, taps: Tensor, cut: tuple[int, int, int, int]) -> Tensor:
        """The convolution at stride 1 of x that is 0 outside, from the part that each cell adds to the outputs that read it."""
        (outputs, _, tall, wide), (height, width), (down, across) = self.weight.shape, x.shape[2:], self.reach
        parts = (x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]) @ taps).view(len(x), height, width, tall, wide, outputs)
        summed = x.new_zeros(len(x), height + down, width + across, outputs)
        for i in range(tall):
            for j in range(wide):
                top, left = down - i * self.dilation[0], across - j * self.dilation[1]
                summed[:, top : top + height, left : left + width] += parts[:, :, :, i, j]
        top, left, rows, columns = cut
        return summed[:, top : top + rows, left : left + columns].permute(0, 3, 1, 2).contiguous()


def _around(first: int, size: int, stride: int, padding: int, reach: int, outputs: range) -> Pair:
    """Cells to add before and after a window, so that it holds the cells that ``outputs`` read; negative ones are taken away."""
    last = (outputs.stop - 1) * stride - padding + reach
    return first - (outputs.start * stride - padding), last - (first + size - 1)


def _taps(
    cells: int, first: int, outputs: int, kernel: int, stride: int, dilation: int
) -> Int[Tensor, "cells outputs"]:
    """Along one axis, with which weight of a kernel an output reads a cell; ``kernel`` where it does not."""
    offset = torch.arange(cells)[:, None] + first - stride * torch.arange(outputs)
    read = (offset >= 0) & (offset % dilation == 0) & (offset < kernel * dilation)
    return torch.where(read, offset // dilation, kernel)
