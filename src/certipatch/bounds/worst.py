"""The worst locations of a patch, searched without gradients; and margins at chosen locations, with gradients.

An image's loss is a minimum over locations for each rival, so its gradient goes through at most K − 1 locations. All
locations are bounded without autograd, which costs one pass and no memory; then the worst ones are bounded again with it.

For a network that begins with a linear layer, the bounds of its answer with a patch at location l are

    Wx + b + t Σ_{p in l} (½W_p − W_p x_p)  ±  (t/2) Σ_{p in l} |W_p| :

one product of the few columns of a patch for each location, all locations in batches; the radius is that of all images.

**Pooling** (Chiang et al. 2020, appendix A.3): locations are parted into blocks of neighbours, and from some layer on a
block has one interval, which holds those of its locations. It is weaker and cheaper; with blocks of one location it is none.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from certipatch.bounds.convolution import Conv
from certipatch.bounds.interval import Interval
from certipatch.bounds.layers import Flatten, Linear, Monotone, Op, Same
from certipatch.bounds.patch import TOGETHER, Regions, box_of, regions, stacked
from certipatch.bounds.propagate import Passage, rivals_of
from certipatch.errors import InputError
from certipatch.threats import PatchThreat
from certipatch.views.incidence import MAX_BYTES

CELLS = 2**19  # numbers of one product of the first layer: they stay in the cache
PAIRED = 16  # classes up to which all pairs of them are looked at together


@final
@dataclass(frozen=True, eq=False)
class Places:
    """The locations of a threat in N blocks of m."""

    regions: Regions
    masks: Bool[Tensor, "L H W"]
    blocks: Int[Tensor, "N m"]
    """Locations of each block; at the border some stand there twice."""
    pools: tuple[int, ...]
    """Numbers of bounds merged into one behind the first, second … linear layer or convolution; their product is m."""
    corners: Int[Tensor, "N 2"]
    """Top left pixel of each block's first location."""

    def __len__(self) -> int:
        return len(self.blocks)

    @cached_property
    def listed(self) -> Int[Tensor, "L P"]:
        """The pixels of each location among H·W; H·W where it has fewer than others."""
        flat = self.masks.flatten(1)
        order = flat.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, : int(flat.sum(1).max())]
        return torch.where(flat.gather(1, order), order, flat.shape[1])

    def to(self, device: torch.device) -> "Places":
        """The same elsewhere."""
        if self.masks.device == device:
            return self
        return replace(self, masks=self.masks.to(device), blocks=self.blocks.to(device))


def places(threat: PatchThreat, image_size: tuple[int, int], sides: Sequence[int] = ()) -> Places:
    """The locations of a threat; with ``sides`` pooled in squares of so many neighbours, layer by layer.

    Errors: InputError if the threat does not fit, has too many locations, or where what is pooled is no grid.
    """
    locations = regions(threat, image_size)
    if len(locations) * math.prod(image_size) > MAX_BYTES:
        raise InputError(f"{threat} on {image_size[0]}x{image_size[1]} pixels has too many locations to train with")
    masks = torch.stack([locations.pixels(place) for place in range(len(locations))])
    tops, lefts = (torch.tensor([box[axis] for box in locations.boxes]) for axis in (0, 1))
    blocks = torch.arange(len(locations))[:, None]
    if sides:
        height, width = int(tops.max()) + 1, int(lefts.max()) + 1
        if not torch.equal(tops * width + lefts, torch.arange(height * width)):
            raise InputError(f"the places of {threat} are no grid, and cannot be pooled")
        blocks = _squares(height, width, sides)
    corners = torch.stack([tops, lefts], 1)[blocks[:, 0]]
    return Places(locations, masks, blocks, tuple(side * side for side in sides), corners)


def _squares(height: int, width: int, sides: Sequence[int]) -> Int[Tensor, "N m"]:
    """Cells of a grid in squares, which are squares of squares … of ``sides``, the innermost first."""
    span = math.prod(sides)
    rows, columns = (torch.arange(-(-n // span) * span).clamp(max=n - 1) for n in (height, width))
    cells = (rows[:, None] * width + columns)[..., None]  # (h, w, cells of a square)
    for side in sides:
        parts = cells.unflatten(1, (-1, side)).unflatten(0, (-1, side))  # (h, side, w, side, n)
        cells = parts.permute(0, 2, 1, 3, 4).flatten(2)
    return cells.flatten(0, 1)


def block_bounds(
    passed: Passage,
    images: Float[Tensor, "B C H W"],
    where: Places,
    picture: Int[Tensor, " n"],
    block: Int[Tensor, " n"],
    strength: float = 1.0,
) -> Interval:
    """Value ``before_head`` (n, …) for chosen pairs of an image and a block, by whole passes. Differentiable.

    ``strength``: see ``patch.attacked``.
    """
    inside = where.masks[where.blocks[block]][:, :, None]
    boxes = box_of(images[picture][:, None], inside, strength).map(lambda x: x.flatten(0, 1))
    return _pooled(passed, boxes, where.pools) if where.pools else passed.values(boxes, passed.before_head)[-1]


def block_margins(
    passed: Passage,
    images: Float[Tensor, "B C H W"],
    label: Int[Tensor, " B"],
    where: Places,
    picture: Int[Tensor, " n"],
    block: Int[Tensor, " n"],
    strength: float = 1.0,
) -> Float[Tensor, "n R"]:
    """Lower bounds of z_y − z_k for chosen pairs of an image and a block."""
    last, own = block_bounds(passed, images, where, picture, block, strength), label[picture]
    return passed.margins(last.map(lambda x: x[:, None]), own, rivals_of(own, passed.classes))[:, 0]


def margins_at(
    passed: Passage,
    images: Float[Tensor, "B C H W"],
    label: Int[Tensor, " B"],
    where: Places,
    at: Int[Tensor, "B R"],
    strength: float = 1.0,
) -> Float[Tensor, "B R"]:
    """Lower bounds of z_y − z_k at a block for each image and rival, each block once. Differentiable."""
    first = len(where) * torch.arange(len(images), device=images.device)[:, None]
    pairs, back = torch.unique(first + at, return_inverse=True)
    last = block_bounds(passed, images, where, pairs // len(where), pairs % len(where), strength)
    own, rivals = label.repeat_interleave(at.shape[1]), rivals_of(label, passed.classes).flatten()[:, None]
    read = last.map(lambda x: x.index_select(0, back.flatten())[:, None])
    return passed.margins(read, own, rivals).view(at.shape)


def _pooled(passed: Passage, x: Interval, pools: Sequence[int]) -> Interval:
    """Value ``before_head``, with so many neighbours along the first axis pooled behind each linear layer."""
    check_pools(passed, pools)
    pending = list(pools)
    for op in passed.ops[: passed.before_head]:
        x = op.whole(x)
        if pending and isinstance(op, Linear | Conv):
            x = _pool(x, pending.pop(0))
    return x


def _pool(x: Interval, count: int) -> Interval:
    if count == 1:
        return x
    return Interval(x.lower.unflatten(0, (-1, count)).amin(1), x.upper.unflatten(0, (-1, count)).amax(1))


def check_pools(passed: Passage, pools: Sequence[int]) -> None:
    """InputError unless the network is a chain with so many linear layers or convolutions before its last."""
    linear = sum(isinstance(op, Linear | Conv) for op in passed.ops[: passed.before_head])
    if len(pools) > linear:
        raise InputError(f"bounds are pooled in {len(pools)} layers, and {linear} come before the network's last")
    if pools and passed.inputs != tuple((i,) for i in range(len(passed.ops))):
        raise InputError("bounds are pooled in chains of layers; this network has branches")


@torch.no_grad()
def worst(
    passed: Passage,
    images: Float[Tensor, "B C H W"],
    label: Int[Tensor, " B"],
    where: Places,
    strength: float = 1.0,
    index: Int[Tensor, " n"] | None = None,
) -> tuple[Float[Tensor, "B R"], Int[Tensor, "B R"]]:
    """The smallest margin for each rival over all blocks, and the block where it is.

    Args:
        passed: made without gradients.
        index: the blocks that are looked at; None for all.
    """
    index = torch.arange(len(where), device=images.device) if index is None else index
    first = first_linear(passed)
    if first is not None:
        return _worst_of_vectors(passed, first, images, label, where, strength, index)
    rivals = rivals_of(label, passed.classes)
    low = torch.full(rivals.shape, torch.inf, dtype=passed.dtype, device=images.device)
    at = torch.zeros_like(rivals)
    whole = bool(where.pools) or images.device.type != "cpu"  # an accelerator is fast where its work is in few pieces
    clean = [] if whole else passed.values(Interval(images, images))
    for some in index.split(TOGETHER):
        if whole:
            picture = torch.arange(len(images), device=images.device).repeat_interleave(len(some))
            pairs = picture, some.repeat(len(images))
            margins = block_margins(passed, images, label, where, *pairs, strength).unflatten(0, (-1, len(some)))
        else:
            margins = passed.margins(stacked(passed, clean, where.regions, some.tolist(), strength), label, rivals)
        smallest, place = margins.min(1)
        low, at = torch.minimum(low, smallest), torch.where(smallest < low, some[place], at)
    return low, at


def first_linear(passed: Passage) -> int | None:
    """The number of the layer, where a chain begins with a linear layer on all pixels; else None."""
    number = next((i for i, op in enumerate(passed.ops) if not isinstance(op, Same | Flatten)), 0)
    chain = passed.inputs == tuple((i,) for i in range(len(passed.ops)))
    plain = all(isinstance(op, Linear | Monotone | Same) for op in passed.ops[number:])
    fits = chain and plain and isinstance(passed.ops[number], Linear) and number + 1 < len(passed.ops)
    return number if fits and passed.head is not None else None


def _worst_of_vectors(
    passed: Passage, first: int, images: Tensor, label: Tensor, where: Places, strength: float, index: Tensor
) -> tuple[Tensor, Tensor]:
    """``worst`` for a network that begins with a linear layer, locations in pieces that fit the cache."""
    layer = passed.ops[first]
    assert isinstance(layer, Linear)
    check_pools(passed, where.pools)
    channels = images.shape[1]
    columns, weight = layer.weight.T, layer.weight.unflatten(1, (channels, -1))
    clean = F.linear(images.flatten(1), layer.weight, layer.bias).T
    pixels = images.flatten(1).T * -strength
    columns, pixels = (F.pad(x, (0, 0, 0, 1)) for x in (columns, pixels))  # the last is for locations with fewer pixels
    ends = (F.pad(part.sum(1).T * strength, (0, 0, 0, 1)) for part in (weight.clamp(max=0), weight.clamp(min=0)))
    falls, rises = (F.embedding_bag(where.listed, end, mode="sum")[..., None] for end in ends)
    rows, rivals = _rows(where, channels), rivals_of(label, passed.classes)
    margins = _margins_of_pairs(passed, label, rivals) if passed.classes <= PAIRED else None
    low = torch.full_like(rivals.T, torch.inf, dtype=weight.dtype)
    at = torch.zeros_like(rivals.T)
    for some in index.split(max(1, CELLS // (clean.numel() * where.blocks.shape[1]))):
        chosen = where.blocks[some].flatten()
        read = rows[chosen]
        centre = torch.baddbmm(clean.expand(len(chosen), -1, -1), columns[read].mT, pixels[read])
        x = Interval(centre + falls[chosen], centre.add_(rises[chosen]))
        x = _rest(passed.ops[first + 1 : -1], x, where.pools)
        if margins is not None:
            margin = margins(x)
        else:
            margin = passed.margins(x.map(lambda end: end.permute(2, 0, 1)), label, rivals).permute(1, 2, 0)
        smallest, place = margin.min(0)
        at = torch.where(smallest < low, some[place], at)
        low = torch.minimum(low, smallest)
    return low.T, at.T


def _margins_of_pairs(
    passed: Passage, label: Int[Tensor, " B"], rivals: Int[Tensor, "B R"]
) -> Callable[[Interval], Tensor]:
    """Margins (n, R, B) from value ``before_head`` (n, m, B), for few classes.

    |w_y − w_k| serves both y and k: the radius of every pair of classes is one product for all images, which is
    faster than those of each label's own K − 1 rivals.
    """
    head, classes = passed.head, passed.classes
    assert head is not None
    one, two = torch.triu_indices(classes, classes, 1, device=label.device)
    sizes = (head.weight[one] - head.weight[two]).abs() * 0.5
    number = torch.zeros(classes, classes, dtype=torch.int64, device=label.device)
    number[one, two] = number[two, one] = torch.arange(len(one), device=label.device)
    own, other, pair = label[None], rivals.T, number[label[:, None], rivals].T
    bias = 0.0 if head.bias is None else (head.bias[own] - head.bias[other])

    def margins(x: Interval) -> Tensor:
        logits = (head.weight * 0.5) @ (x.lower + x.upper)
        radius = sizes @ (x.upper - x.lower)
        shape = (len(radius), *other.shape)
        lead = logits.gather(1, own.expand(shape)) - logits.gather(1, other.expand(shape))
        return lead - radius.gather(1, pair.expand(shape)) + bias

    return margins


def _rest(ops: Sequence[Op], x: Interval, pools: Sequence[int]) -> Interval:
    """The layers behind the first linear one, on maps (n, m, B)."""
    pending = list(pools)
    x = _pool(x, pending.pop(0)) if pending else x
    for op in ops:
        if isinstance(op, Linear):
            x = op.whole(x.map(lambda end: end.mT)).map(lambda end: end.mT)
            x = _pool(x, pending.pop(0)) if pending else x
        else:
            x = op.whole(x)
    return x


def _rows(where: Places, channels: int) -> Int[Tensor, "L P"]:
    """Places of each location's pixels among C·H·W; C·H·W where it has fewer than others."""
    cells, listed = where.masks[0].numel(), where.listed
    shifts = cells * torch.arange(channels, device=listed.device)
    return torch.where(listed[:, None] < cells, listed[:, None] + shifts[:, None], channels * cells).flatten(1)
