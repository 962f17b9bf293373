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
"""The effect of a patch on a map: a window of it, all of it, or nothing."""
Pair = tuple[int, int]


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
        bounds = inputs[0].map(self.function)
        if self.eps == 0:
            return bounds
        below, above = (self.eps * (1 + end.abs()) + self.floor for end in (bounds.lower, bounds.upper))
        return Interval(bounds.lower - below, bounds.upper + above)


@final
@dataclass(frozen=True, eq=False)
class Scale(Pointwise):
    """x·scale + shift, each a number or of a shape that broadcasts over rows and columns: batch norm in eval mode."""

    scale: Tensor
    shift: Tensor
    eps: float = 0.0
    terms: Tensor | float = 0.0
    """Sizes of the terms that ``shift`` sums, for its rounding."""

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
    terms: Float[Tensor, " m"] | None = None
    """Sizes of the terms that ``bias`` sums, for its rounding; None if it is no sum."""

    @property
    def bias_size(self) -> Float[Tensor, " m"]:
        """Σ|b| of the terms that the bias sums."""
        if self.terms is not None:
            return self.terms
        return torch.zeros_like(self.weight[:, 0]) if self.bias is None else self.bias.abs()

    @cached_property
    def magnitude(self) -> Float[Tensor, "m n"]:
        """|W|"""
        return self.weight.abs()

    @property
    def guard(self) -> float:
        """e of the rounding."""
        return (self.weight.shape[1] + 8) * self.eps

    def reads_all(self, x: Interval) -> bool:
        """Test if every output depends on all of ``x``; else the layer is applied along the last axis of a map."""
        return self.shape_of_map is not None or len(x.shape) == 2

    def whole(self, *inputs: Interval) -> Interval:
        x = inputs[0].map(lambda x: x.flatten(1)) if self.shape_of_map else inputs[0]
        if x.is_point and self.eps == 0:
            return x.map(lambda x: F.linear(x, self.weight, self.bias))
        centre, radius = F.linear(x.centre, self.weight, self.bias), F.linear(guarded(x, self.guard), self.magnitude)
        guard = self.guard * self.bias_size if self.eps and self.bias is not None else 0.0
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
    product = None
    for row, block in enumerate(weight):
        part = cells[:, row].flatten(1)
        columns = block[window.left : window.left + width].flatten(0, 1)
        product = part @ columns if product is None else torch.addmm(product, part, columns)
    assert product is not None
    return product


def guarded(x: Interval, guard: float) -> Tensor:
    """The radius, and an allowance for rounding if ``guard`` > 0."""
    return x.radius + guard * (x.centre.abs() + x.radius) if guard else x.radius


def changes(x: Window, clean: Interval, guard: float) -> tuple[Tensor, Tensor]:
    """Changes of centre and radius in a window, with an allowance for rounding."""
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


@final
@dataclass(frozen=True, eq=False)
class Flatten(Op):
    """(B, C, H, W) → (B, C·H·W). A linear layer behind it reads the map itself (see ``Linear.shape_of_map``)."""

    length: int | None = None
    """C·H·W, where the network says it."""

    def whole(self, *inputs: Interval) -> Interval:
        bounds = inputs[0].map(lambda x: x.flatten(1))
        if self.length not in (None, bounds.shape[1]):
            raise RuntimeError(f"{bounds.shape[1]} values of a picture are no row of {self.length}")
        return bounds


@final
@dataclass(frozen=True, eq=False)
class Same(Op):
    """Nothing: dropout in eval mode, identity, flattening before a linear layer that reads maps."""

    def whole(self, *inputs: Interval) -> Interval:
        return inputs[0]

    def window(self, inputs: Sequence[State], clean: Sequence[Interval], image: Interval) -> State:
        return inputs[0]


@final
@dataclass(frozen=True, eq=False)
class Reversed(Pointwise):
    """Channels in the opposite order."""

    def whole(self, *inputs: Interval) -> Interval:
        return inputs[0].map(lambda x: x.flip(1))


class Join(Op):
    """A layer of several maps that works cell by cell; where one is spread over another, through whole maps."""

    def window(self, inputs: Sequence[State], clean: Sequence[Interval], image: Interval) -> State:
        windows = [x for x in inputs if isinstance(x, Window)]
        spread = len({x.shape[2:] for x in clean}) > 1
        if spread or any(isinstance(x, Interval) for x in inputs) or not windows:
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
        label: y of each image.
        rivals: k's of each image.
    """
    weight = F.embedding(label, layer.weight)[:, None] - F.embedding(rivals, layer.weight)  # (B, R, n)
    margin = x.centre @ weight.mT - guarded(x, layer.guard) @ weight.abs().mT
    if layer.bias is None:
        return margin
    bias = layer.bias[label][:, None] - layer.bias[rivals]
    size = layer.bias_size[label][:, None] + layer.bias_size[rivals]
    return margin + (bias - layer.guard * size)[:, None]
