"""Interval propagation through one layer: on whole maps, and on the window of a map that a patch can reach.

For z = Wx + b and x in [l, u], with centre c = (l + u)/2 and radius r = (u − l)/2, z lies in Wc + b ± |W|r (Gowal et al.
2018; Chiang et al. 2020, equations 5 and 6); a monotone function takes both ends (equations 7 and 8). Where only a
window of x differs from a clean x₀ of known image z₀, z = z₀ + W(x − x₀), and only the window is read.

**Rounding.** With ``eps`` > 0, the machine epsilon of the arithmetic, intervals are rounded outward. A sum of n products
in any order errs by at most γ Σ|w||x|, γ = nu/(1 − nu), u = eps/2 (Higham 2002, section 3.1); adding e·(|c| + r) to the
radius before |W| is applied, with e = (n + 8)·eps ≥ 2γ, pays for it and for the rounding of c, r and the ends. Windows
pay in the same way for the two differences and the sum. This counts on kernels that sum products (no Winograd, no
TensorFloat), as those for float64 do.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from certipatch.bounds.interval import Interval, Window, widened

State = Window | Interval | None
"""What a patch does to a map: a window of it, all of it, or nothing."""
Pair = tuple[int, int]
SMALL_MATRIX = 2**17  # up to so many numbers a convolution of a window is done as a product with one matrix
FEW_CHANNELS = 16  # up to here a convolution of torch beats a product of matrices


def spread(x: Interval | Window, clean: Interval) -> Interval:
    """The whole map."""
    return x.everywhere(clean) if isinstance(x, Window) else x


class Op(ABC):
    """A layer whose weights are in the precision of the bounds."""

    @abstractmethod
    def whole(self, *inputs: Interval) -> Interval:
        """Bounds of the layer's answer from bounds of all that it reads."""

    def window(self, inputs: Sequence[State], clean: Sequence[Interval], image: Interval) -> State:
        """The same where inputs differ from ``clean`` in windows only; ``image`` is the answer to ``clean``.

        Here: by way of whole maps, for layers that have no shorter one.
        """
        return self.whole(
            *(before if x is None else spread(x, before) for x, before in zip(inputs, clean, strict=True))
        )


class Pointwise(Op):
    """A layer that works on every cell of a map alone."""

    def window(self, inputs: Sequence[State], clean: Sequence[Interval], image: Interval) -> State:
        (x,) = inputs
        if isinstance(x, Window):
            return Window(x.top, x.left, self.whole(x.inside))
        return None if x is None else self.whole(x)


@final
@dataclass(frozen=True, eq=False)
class Monotone(Pointwise):
    """A function that never falls. ``eps`` is its relative rounding, 0 for none; ``floor`` is added to it."""

    function: Callable[[Tensor], Tensor]
    eps: float = 0.0
    floor: float = 0.0

    def whole(self, *inputs: Interval) -> Interval:
        found = inputs[0].map(self.function)
        if self.eps == 0:
            return found
        below, above = (self.eps * (1 + end.abs()) + self.floor for end in (found.lower, found.upper))
        return Interval(found.lower - below, found.upper + above)


@final
@dataclass(frozen=True, eq=False)
class Scale(Pointwise):
    """x·scale + shift, each a number or of a shape that broadcasts over rows and columns: batch norm in eval mode."""

    scale: Tensor
    shift: Tensor
    eps: float = 0.0
    terms: Tensor | float = 0.0
    """Sizes of what ``shift`` is the sum of, for its rounding."""

    def whole(self, *inputs: Interval) -> Interval:
        (x,) = inputs
        if x.is_point and self.eps == 0:
            return x.map(lambda x: x * self.scale + self.shift)
        centre, radius = x.centre * self.scale, x.radius * self.scale.abs()
        guard = 16 * self.eps * (centre.abs() + radius + self.shift.abs() + self.terms) if self.eps else 0.0
        centre = centre + self.shift
        return widened(centre - radius, centre + radius, guard)


@final
@dataclass(frozen=True, eq=False)
class Linear(Op):
    """z = Wx + b on (B, n), or on the flattened map (B, C, H, W) whose shape ``shape_of_map`` says."""

    weight: Float[Tensor, "m n"]
    bias: Float[Tensor, " m"] | None
    eps: float = 0.0
    shape_of_map: tuple[int, int, int] | None = None

    @cached_property
    def magnitude(self) -> Float[Tensor, "m n"]:
        """|W|"""
        return self.weight.abs()

    @property
    def guard(self) -> float:
        """e of the rounding."""
        return (self.weight.shape[1] + 8) * self.eps

    def whole(self, *inputs: Interval) -> Interval:
        x = inputs[0].map(lambda x: x.flatten(1)) if self.shape_of_map else inputs[0]
        if x.is_point and self.eps == 0:
            return x.map(lambda x: F.linear(x, self.weight, self.bias))
        centre, radius = F.linear(x.centre, self.weight, self.bias), F.linear(guarded(x, self.guard), self.magnitude)
        guard = self.guard * self.bias.abs() if self.eps and self.bias is not None else 0.0
        return widened(centre - radius, centre + radius, guard)

    def window(self, inputs: Sequence[State], clean: Sequence[Interval], image: Interval) -> State:
        (x,), (before,) = inputs, clean
        if not isinstance(x, Window) or self.shape_of_map is None:
            return super().window(inputs, clean, image)
        moved, grown = changes(x, before, self.guard)
        signed, size = self._by_row
        centre, radius = _rows(moved, signed, x), _rows(grown, size, x)
        return added(image, centre, radius, self.eps)

    @cached_property
    def _by_row(self) -> tuple[Tensor, Tensor]:
        """W and |W| as (H, W, C, m), so that the cells of a window's row lie beside each other."""
        assert self.shape_of_map is not None
        weight = self.weight.T.unflatten(0, self.shape_of_map).permute(1, 2, 0, 3).contiguous()
        return weight, weight.abs()


def _rows(x: Tensor, weight: Float[Tensor, "H W C m"], window: Window) -> Float[Tensor, "B m"]:
    """W x for x that is 0 outside a window: row by row, or at once where rows are whole."""
    cells, (height, width) = x.permute(0, 2, 3, 1), window.size
    weight = weight[window.top : window.top + height]
    if width == weight.shape[1]:
        return cells.flatten(1) @ weight.flatten(0, 2)
    found = None
    for row, block in enumerate(weight):
        part = cells[:, row].flatten(1)
        columns = block[window.left : window.left + width].flatten(0, 1)
        found = part @ columns if found is None else torch.addmm(found, part, columns)
    assert found is not None
    return found


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
        """Matrices of windows by what they read; there are as many as a patch's windows differ in size and parity."""
        return {}

    @cached_property
    def _by_tap(self) -> tuple[Tensor, Tensor]:
        """W and |W| as (I, h·w·O)."""
        weight = self.weight.permute(1, 2, 3, 0).flatten(1).contiguous()
        return weight, weight.abs()

    def _scatter(self, x: Tensor, taps: Tensor, cut: tuple[int, int, int, int]) -> Tensor:
        """The convolution at stride 1 of x that is 0 outside, from what each cell adds to the outputs that read it."""
        (outputs, _, tall, wide), (height, width), (down, across) = self.weight.shape, x.shape[2:], self.reach
        parts = (x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]) @ taps).view(len(x), height, width, tall, wide, outputs)
        found = x.new_zeros(len(x), height + down, width + across, outputs)
        for i in range(tall):
            for j in range(wide):
                top, left = down - i * self.dilation[0], across - j * self.dilation[1]
                found[:, top : top + height, left : left + width] += parts[:, :, :, i, j]
        top, left, rows, columns = cut
        return found[:, top : top + rows, left : left + columns].permute(0, 3, 1, 2).contiguous()


def guarded(x: Interval, guard: float) -> Tensor:
    """The radius, and what pays for rounding where ``guard`` > 0."""
    return x.radius + guard * (x.centre.abs() + x.radius) if guard else x.radius


def changes(x: Window, clean: Interval, guard: float) -> tuple[Tensor, Tensor]:
    """Changes of centre and radius in a window, with what pays for rounding."""
    moved, grown = x.changes(clean)
    if guard:
        before = clean.cut(x.top, x.left, *x.size)
        ends = torch.maximum(x.inside.lower.abs(), x.inside.upper.abs())
        grown = grown + guard * 2 * (ends + torch.maximum(before.lower.abs(), before.upper.abs()))
    return moved, grown


def added(image: Interval, centre: Tensor, radius: Tensor, eps: float) -> Interval:
    """An interval whose centre and radius have changed by so much."""
    if image.is_point:
        middle = image.lower + centre
        lower, upper = middle - radius, middle + radius
    else:
        lower, upper = image.lower + (centre - radius), image.upper + (centre + radius)
    guard = 8 * eps * (image.lower.abs() + image.upper.abs() + centre.abs() + radius.abs()) if eps else 0.0
    return widened(lower, upper, guard)


def reached(first: int, size: int, stride: int, padding: int, reach: int, cells: int) -> range:
    """Outputs of one axis that read one of the cells first … first + size − 1."""
    return range(
        max(0, -((reach - first - padding) // stride)),
        min(cells - 1, (first + size - 1 + padding) // stride) + 1,
    )


def _around(first: int, size: int, stride: int, padding: int, reach: int, outputs: range) -> Pair:
    """Cells to add before and after a window, so that it is what ``outputs`` read; negative ones are taken away."""
    last = (outputs.stop - 1) * stride - padding + reach
    return first - (outputs.start * stride - padding), last - (first + size - 1)


def _taps(
    cells: int, first: int, outputs: int, kernel: int, stride: int, dilation: int
) -> Int[Tensor, "cells outputs"]:
    """Along one axis, with which weight of a kernel an output reads a cell; ``kernel`` where it does not."""
    offset = torch.arange(cells)[:, None] + first - stride * torch.arange(outputs)
    read = (offset >= 0) & (offset % dilation == 0) & (offset < kernel * dilation)
    return torch.where(read, offset // dilation, kernel)


class Pool(Op):
    """Pooling: monotone, over windows of ``kernel`` cells."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    fill: float
    """What stands outside the map."""

    @abstractmethod
    def pool(self, x: Tensor, image: tuple[range, range], size: Pair) -> Tensor:
        """Cells ``image`` of the answer, from what they read of a map of ``size`` cells, filled where they leave it."""

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
        size = x.shape[2], x.shape[3]
        rows, columns = (range(n) for n in self.cells(size))
        down, across = self._read(rows, 0), self._read(columns, 1)
        around = (-across.start, across.stop - size[1], -down.start, down.stop - size[0])
        return self._pooled(x.map(lambda x: F.pad(x, around, value=self.fill)), (rows, columns), size)

    def cells(self, size: Pair) -> list[int]:
        """Rows and columns of the answer."""
        found = []
        for n, k, s, p, d in zip(size, self.kernel, self.stride, self.padding, self.dilation, strict=True):
            span = n + 2 * p - d * (k - 1) - 1
            count = (-(-span // s) if self.ceil else span // s) + 1
            if self.ceil and (count - 1) * s >= n + p:
                count -= 1  # torch lets no window start in the padding behind
            found.append(count)
        return found

    @property
    @abstractmethod
    def ceil(self) -> bool:
        """Whether a last window may leave the padded map."""

    @property
    def reach(self) -> Pair:
        """Rows and columns from the first cell of a window to the last."""
        rows, columns = (d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True))
        return rows, columns

    def _read(self, cells: range, axis: int) -> range:
        """What cells of the answer read, along one axis."""
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
        found = super()._pooled(read, image, size)
        if self.eps == 0:
            return found
        guard = (math.prod(self.kernel) + 8) * self.eps
        by = guard * self.pool(torch.maximum(read.lower.abs(), read.upper.abs()), image, size)
        return widened(found.lower, found.upper, by)


@final
@dataclass(frozen=True, eq=False)
class Mean(Op):
    """The mean over rows and columns: global average pooling."""

    keepdim: bool
    eps: float = 0.0

    def whole(self, *inputs: Interval) -> Interval:
        (x,) = inputs
        found = x.map(lambda x: x.mean((2, 3), keepdim=self.keepdim))
        if self.eps == 0:
            return found
        guard = (x.shape[2] * x.shape[3] + 8) * self.eps
        ends = torch.maximum(x.lower.abs(), x.upper.abs())
        return widened(found.lower, found.upper, guard * ends.mean((2, 3), keepdim=self.keepdim))

    def window(self, inputs: Sequence[State], clean: Sequence[Interval], image: Interval) -> State:
        (x,), (before,) = inputs, clean
        if not isinstance(x, Window):
            return super().window(inputs, clean, image)
        cells = before.shape[2] * before.shape[3]
        moved, grown = (
            change.sum((2, 3), keepdim=self.keepdim) / cells for change in changes(x, before, (cells + 8) * self.eps)
        )
        return added(image, moved, grown, self.eps)


@final
@dataclass(frozen=True, eq=False)
class Flatten(Op):
    """(B, C, H, W) → (B, C·H·W). A linear layer behind it reads the map itself (see ``Linear.shape_of_map``)."""

    def whole(self, *inputs: Interval) -> Interval:
        return inputs[0].map(lambda x: x.flatten(1))


@final
@dataclass(frozen=True, eq=False)
class Same(Op):
    """Nothing: dropout in eval mode, identity, flattening before a linear layer that reads maps."""

    def whole(self, *inputs: Interval) -> Interval:
        return inputs[0]

    def window(self, inputs: Sequence[State], clean: Sequence[Interval], image: Interval) -> State:
        return inputs[0]


class Join(Op):
    """A layer of several maps of one size that works cell by cell."""

    def window(self, inputs: Sequence[State], clean: Sequence[Interval], image: Interval) -> State:
        windows = [x for x in inputs if isinstance(x, Window)]
        if any(isinstance(x, Interval) for x in inputs) or not windows:
            return super().window(inputs, clean, image) if any(x is not None for x in inputs) else None
        rows = range(min(x.top for x in windows), max(x.top + x.size[0] for x in windows))
        columns = range(min(x.left for x in windows), max(x.left + x.size[1] for x in windows))
        parts = [
            x.within(before, rows, columns)
            if isinstance(x, Window)
            else before.cut(rows.start, columns.start, len(rows), len(columns))
            for x, before in zip(inputs, clean, strict=True)
        ]
        return Window(rows.start, columns.start, self.whole(*parts))


@final
@dataclass(frozen=True, eq=False)
class Add(Join):
    """The sum of two maps: a residual connection."""

    eps: float = 0.0

    def whole(self, *inputs: Interval) -> Interval:
        one, two = inputs
        lower, upper = one.lower + two.lower, one.upper + two.upper
        return widened(lower, upper, self.eps * (lower.abs() + upper.abs()) if self.eps else 0.0)


@final
@dataclass(frozen=True, eq=False)
class Concatenate(Join):
    """Maps side by side along their channels."""

    def whole(self, *inputs: Interval) -> Interval:
        return Interval(torch.cat([x.lower for x in inputs], 1), torch.cat([x.upper for x in inputs], 1))


def merged(layer: Linear, x: Interval, label: Int[Tensor, " B"], rivals: Int[Tensor, "B R"]) -> Float[Tensor, "B L R"]:
    """Lower bounds of z_y − z_k for z = Wx + b, exact for x in its box: (e_y − e_k)W applied at once.

    Args:
        layer: the network's last.
        x: (B, L, n).
        label: y of each picture.
        rivals: k's of each picture.
    """
    weight = F.embedding(label, layer.weight)[:, None] - F.embedding(rivals, layer.weight)  # (B, R, n)
    margin = x.centre @ weight.mT - guarded(x, layer.guard) @ weight.abs().mT
    if layer.bias is None:
        return margin
    bias = layer.bias[label][:, None] - layer.bias[rivals]
    size = layer.bias[label].abs()[:, None] + layer.bias[rivals].abs()
    return margin + (bias - layer.guard * size)[:, None]
