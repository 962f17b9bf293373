"""Views given pixel by pixel, and the image with masks over it: mask sets that cover a patch wherever it lies.

Per axis of n pixels, for a patch of p and k masks (Xiang et al., PatchCleanser, USENIX Security 2022, section 3.4): stride
s = ⌈(n − p + 1)/k⌉, masks of m = p + s − 1 pixels, starting at min(i·s, n − m). A patch that starts at t lies in the last
mask that starts at or before t: t − start ≤ s − 1, so the patch ends within p + s − 1 pixels of it.
"""

from collections.abc import Sequence
from itertools import combinations, pairwise
from math import comb
from typing import Any, final

import torch
from jaxtyping import Bool, Int, Int64
from torch import Tensor

from certipatch.errors import InputError
from certipatch.threats import PatchThreat
from certipatch.views.base import Views, runs

MASKS = 6  # per axis, unless a number or a stride is given
MAX_MASKS = 1000  # half a million pairs
Pair = tuple[int, int]


@final
class PixelSets(Views):
    """Views listed one by one.

    Args:
        visible: bool (V, H, W), True where the view shows the pixel.
    """

    def __init__(self, visible: Tensor):
        if visible.dtype != torch.bool or visible.ndim != 3 or visible.numel() == 0:
            raise InputError(
                f"pixel sets are a bool tensor (V, H, W) with at least one view, not {visible.dtype} {tuple(visible.shape)}"
            )
        self._visible = visible.detach().cpu().clone()

    def number(self, image_size: tuple[int, int]) -> int:
        _check_size(image_size, self._visible)
        return len(self._visible)

    def visible(self, image_size: tuple[int, int], index: Int[Tensor, " v"] | None = None) -> Bool[Tensor, "v H W"]:
        self.number(image_size)
        return self._visible if index is None else self._visible[index]

    def settings(self) -> dict[str, Any]:
        return {"name": "pixel-sets", "visible": self._visible.to(torch.uint8).tolist()}


@final
class MaskPairs(Views):
    """The image under every mask, and under every two: M(M+1)/2 views, numbered as ``pair_table`` says.

    Args:
        masks: bool (M, H, W), True where the mask hides the pixel.
        unmasked: True for one view more, the last, which shows the unmasked image.
    """

    def __init__(self, masks: Tensor, unmasked: bool = False):
        if masks.dtype != torch.bool or masks.ndim != 3 or masks.numel() == 0:
            raise InputError(
                f"masks are a bool tensor (M, H, W) with at least one mask, not {masks.dtype} {tuple(masks.shape)}"
            )
        _check_number(len(masks))
        self.masks, self.unmasked = masks.detach().cpu().clone(), unmasked
        self._hides = torch.cat([self.masks, torch.zeros_like(self.masks[:1])]) if unmasked else self.masks
        self._pairs = torch.triu_indices(len(masks), len(masks))
        if unmasked:
            self._pairs = torch.cat([self._pairs, torch.full((2, 1), len(masks))], 1)

    def number(self, image_size: tuple[int, int]) -> int:
        _check_size(image_size, self.masks)
        return self._pairs.shape[1]

    def visible(self, image_size: tuple[int, int], index: Int[Tensor, " v"] | None = None) -> Bool[Tensor, "v H W"]:
        self.number(image_size)
        one, other = self._pairs if index is None else self._pairs[:, index]
        return ~(self._hides[one] | self._hides[other])

    def settings(self) -> dict[str, Any]:
        return {"name": "mask-pairs", "masks": self.masks.to(torch.uint8).tolist(), "unmasked": self.unmasked}


def _check_size(image_size: tuple[int, int], masks: Tensor) -> None:
    if tuple(image_size) != tuple(masks.shape[1:]):
        raise InputError(f"these views are for pictures of {tuple(masks.shape[1:])} pixels, not {tuple(image_size)}")


def _check_number(masks: int) -> None:
    if masks > MAX_MASKS:
        raise InputError(f"{masks} masks are too many (up to {MAX_MASKS}); use fewer masks per axis")


def masked(masks: Tensor) -> PixelSets:
    """Views that show everything but a mask: bool ``masks`` (V, H, W), True where the mask hides the pixel."""
    return PixelSets(~masks)


def pair_table(masks: int) -> Int64[Tensor, "M M"]:
    """The view of every two of M masks, in either order; on the diagonal the masks alone.

    Views are numbered row by row: (0, 0), (0, 1), …, (0, M−1), (1, 1), (1, 2), …
    """
    one, other = torch.triu_indices(masks, masks)
    table = torch.zeros((masks, masks), dtype=torch.int64)
    table[one, other] = table[other, one] = torch.arange(len(one))
    return table


def prime_divisions(parts: Pair) -> list[Pair]:
    """Prime factors of the parts along rows and columns, one pair after another: (4, 2) → [(2, 2), (2, 1)]."""
    divisions, rest = [], list(parts)
    while rest != [1, 1]:
        factors = [next((f for f in range(2, number + 1) if number % f == 0), 1) for number in rest]
        divisions.append((factors[0], factors[1]))
        rest = [number // factor for number, factor in zip(rest, factors, strict=True)]
    return divisions


def enclosing_pairs(sizes: Sequence[Bool[Tensor, "_ H W"]]) -> list[Int64[Tensor, " V"]]:
    """For every pair of the smallest masks, the pair of each larger size around it, from the largest to the smallest size.

    Enclosure is nested: two pairs within the same pair of one size are within the same pairs of all larger sizes.
    """
    enclosing: list[Int64[Tensor, " V"]] = []
    for larger, smaller in reversed(list(pairwise(sizes))):
        pair = enclosing_pair(smaller, larger)
        enclosing.insert(0, pair[enclosing[0]] if enclosing else pair)
    return enclosing


def enclosing_pair(smaller: Bool[Tensor, "M H W"], larger: Bool[Tensor, "N H W"]) -> Int64[Tensor, " V"]:
    """For every pair of smaller masks, the pair of larger ones that hides at least as much; numbered by ``pair_table``."""
    inside = (smaller.flatten(1).double() @ (~larger).flatten(1).double().T) == 0
    assert bool(inside.any(1).all())
    parent = inside.int().argmax(1)
    first, second = torch.triu_indices(len(smaller), len(smaller))
    return pair_table(len(larger))[parent[first], parent[second]]


def axis_masks(
    length: int, patch: int, masks: int | None, stride: int | None = None, parts: Sequence[int] = ()
) -> tuple[int, list[int]]:
    """Width and starts of the masks along one axis that cover a run of ``patch`` pixels anywhere.

    Args:
        length, patch: pixels of the axis and of the patch, patch ≤ length.
        masks: how many masks at most; None for as many as ``stride`` needs.
        stride: pixels from mask to mask; None for the smallest that so many masks allow.
        parts: how many smaller masks replace each, within it, and cover what it covers; then of each of those.

    Without both, 6 masks; with both the masks may be too few: there are as many starts as are needed.
    """
    step = stride or -(-(length - patch + 1) // (masks or MASKS))
    width = min(patch + step - 1, length)
    needed = -(-(length - width) // step) + 1
    starts = {min(i * step, length - width) for i in range(needed)}
    for part in parts:
        step = -(-(width - patch + 1) // part)
        inner = patch + step - 1
        starts = {start + min(i * step, width - inner) for start in starts for i in range(part)}
        width = inner
    return width, sorted(starts)


def window_masks(
    image_size: Pair, patch: Pair, masks: Pair | None, stride: Pair | None, parts: Sequence[Pair] = ()
) -> Bool[Tensor, "M H W"]:
    """Rectangular masks that cover a rectangle of ``patch`` (h, w) pixels anywhere: rows of masks x columns of masks.

    Errors: InputError if so many masks at such a stride do not cover, with the number that would.
    """
    sides = []
    for axis, (length, side) in enumerate(zip(image_size, patch, strict=True)):
        number, step = masks and masks[axis], stride and stride[axis]
        needed = len(axis_masks(length, side, number, step)[1])
        if number is not None and number < needed:
            raise InputError(
                f"mask set does not cover {patch[0]}×{patch[1]} patches: {number} masks at a stride of {step} leave some of "
                f"{length} pixels out; use k ≥ {needed} masks per axis, or a larger stride"
            )
        width, starts = axis_masks(length, side, number, step, [part[axis] for part in parts])
        sides.append((length, width, starts))
    _check_number(len(sides[0][2]) * len(sides[1][2]))
    rows, columns = (runs(*side) for side in sides)
    return (rows[:, None, :, None] & columns[None, :, None, :]).flatten(0, 1)


def mask_set(
    threats: Sequence[PatchThreat],
    image_size: Pair,
    masks: Pair | None = None,
    stride: Pair | None = None,
    parts: Sequence[Pair] = (),
) -> Bool[Tensor, "M H W"]:
    """Masks of which, for each threat and each choice of the attacker, one hides all that the attacker repaints.

    ``masks`` and ``stride`` are for rows and columns; without both there are 6 masks per axis. Every shape is covered as
    its bounding box, each with windows of its own unless it fits into another's. Against several patches a mask is the
    union of as many windows. With ``parts`` each window is divided into so many smaller ones per axis, one
    division after another.

    Errors: InputError if a threat does not fit the image, or masks and stride do not cover.
    """
    unions = []
    for count in sorted({threat.count for threat in threats}):
        every = {(len(m), len(m[0])) for t in threats if t.count == count for m in t.masks(image_size)}
        boxes = sorted(b for b in every if not any(o != b and o[0] >= b[0] and o[1] >= b[1] for o in every))
        windows = torch.cat([window_masks(image_size, box, masks, stride, parts) for box in boxes])
        _check_number(comb(len(windows), count))
        chosen = list(combinations(range(len(windows)), min(count, len(windows))))
        unions.append(torch.stack([windows[list(members)].any(0) for members in chosen]))
    both = torch.cat(unions).unique(dim=0)
    _check_number(len(both))
    first = both.flatten(1).int().argmax(1)  # top left corner first, so that masks are in reading order
    return both[first.argsort(stable=True)]
