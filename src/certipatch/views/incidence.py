"""The relation ``sees``: which view shows a pixel of which patch location. Geometry from pixel sets, no closed formula."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations_with_replacement
from math import comb
from typing import final

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from certipatch.errors import InputError
from certipatch.threats import Locations, Mask, PatchThreat, SparseThreat, Threat
from certipatch.views import PixelSets, Views

CHUNK_BYTES = 128 * 2**20  # working memory of one step
MAX_BYTES = 512 * 2**20  # of the relation itself, one bit per location and view


@final
@dataclass(frozen=True, eq=False)
class Incidence:
    """The relation between L locations and V views, as R distinct rows.

    ``rows[row_of[l]]`` is True at the views that show a pixel of location l: all that a patch there can touch. With
    several patches a location is an unordered choice of undominated rows of one patch; of no more than there are, since
    a row that is chosen twice adds nothing.
    """

    packed: np.ndarray
    """uint8 (R, ⌈V/8⌉), one bit per view."""
    number_of_views: int
    row_of: Int[Tensor, " L"]
    locations: Locations
    """The locations of one patch."""
    choices: Int[Tensor, "L patches"]
    """Numbers in ``locations`` of the patches of each location; of one that stands for its row where count > 1."""

    @property
    def number_of_rows(self) -> int:
        return len(self.packed)

    @cached_property
    def rows(self) -> Bool[Tensor, "R V"]:
        """The distinct rows."""
        return self.take(slice(None))

    def take(self, index: slice | np.ndarray) -> Bool[Tensor, "r V"]:
        """Some of the distinct rows; the way to go through more rows than fit memory as bools."""
        return torch.from_numpy(np.unpackbits(self.packed[index], axis=1, count=self.number_of_views).view(bool))

    @cached_property
    def sizes(self) -> Int[Tensor, " R"]:
        """Views that each distinct row touches."""
        return torch.from_numpy(np.bitwise_count(self.packed).sum(1, dtype=np.int64))

    @cached_property
    def undominated(self) -> Bool[Tensor, " R"]:
        """True for the rows that are no part of another row: those that decide a verdict."""
        return torch.from_numpy(_undominated(self.packed, self.sizes.numpy()))


def sees(views: Views | Tensor, threat: Threat, image_size: tuple[int, int]) -> Incidence:
    """Compute which view sees which location of ``threat`` in images of ``image_size`` (H, W) pixels.

    Args:
        views: views, or their visible pixels as a bool tensor (V, H, W).
        threat: a patch threat with any count, or a sparse threat, which is a patch of one pixel, ``pixels`` times.

    Errors: InputError if the threat does not fit the image, or where several patches make a relation above
    512 MiB of bits; ValueError if the views do not fit.
    """
    if isinstance(views, Tensor):
        views = PixelSets(views)
    if isinstance(threat, SparseThreat):
        threat = PatchThreat(1, count=threat.pixels)
    height, width = image_size
    number = views.number((height, width))
    locations = threat.locations((height, width))
    _check_budget(len(locations), number, threat)
    packed, row_of = _distinct(_one_patch(views, locations, number))
    choices = torch.arange(len(locations))[:, None]
    if threat.count > 1:
        packed, row_of, choices = _several_patches(packed, row_of, threat, number)
    return Incidence(packed, number, torch.from_numpy(row_of), locations, choices)


def _check_budget(locations: int, views: int, threat: Threat) -> None:
    if locations * (views + 128) > 8 * MAX_BYTES:
        many = f"{locations:,}" if locations < 10**15 else "more than 10^15"
        raise InputError(
            f"{threat}: {many} locations x {views} views exceed {MAX_BYTES >> 20} MiB; use a larger stride, fewer "
            "patches, or name the places with where=[…]"
        )


def _one_patch(views: Views, locations: Locations, number: int) -> np.ndarray:
    """Packed relation (L, ⌈V/8⌉) of single patches, computed for a few views at a time."""
    height, width = locations.image_size
    packed = np.zeros((len(locations), -(-number // 8)), dtype=np.uint8)
    step = max(8, CHUNK_BYTES // (height * width * 16) // 8 * 8)
    every_shape = [(locations.shape == number).nonzero().flatten() for number in range(len(locations.masks))]
    for first in range(0, number, step):
        visible = views.visible((height, width), torch.arange(first, min(first + step, number)))
        shown = torch.zeros(len(visible), height + 1, width + 1, dtype=torch.int32)
        shown[:, 1:, 1:] = visible.cumsum(1, dtype=torch.int32).cumsum(2, dtype=torch.int32)
        for mask, members in zip(locations.masks, every_shape, strict=True):
            hit = _touched(shown, mask)
            place = locations.top[members] * hit.shape[2] + locations.left[members]
            bits = np.packbits(hit.flatten(1).numpy(), axis=0)[:, place.numpy()]
            packed[members.numpy(), first // 8 : first // 8 + len(bits)] = bits.T
    return packed


def _touched(shown: Int[Tensor, "v H1 W1"], mask: Mask) -> Bool[Tensor, "v h w"]:
    """Test if the mask with its corner at (t, l) holds a visible pixel, from the integral image of visible pixels."""
    down, right = shown.shape[1] - len(mask), shown.shape[2] - len(mask[0])
    hit = torch.zeros(shown.shape[0], down, right, dtype=torch.bool)
    for top, bottom, left, stop in rectangles(mask):
        corner = [shown[:, y : y + down, x : x + right] for y in (top, bottom) for x in (left, stop)]
        hit |= corner[0] + corner[3] > corner[1] + corner[2]
    return hit


def rectangles(mask: Mask) -> Iterator[tuple[int, int, int, int]]:
    """Disjoint rectangles (top, bottom, left, right; ends exclusive) that make up a mask: runs of equal rows."""
    top = 0
    while top < len(mask):
        bottom = top + 1
        while bottom < len(mask) and mask[bottom] == mask[top]:
            bottom += 1
        edges = np.flatnonzero(np.diff([0, *map(int, mask[top]), 0]))
        for left, right in edges.reshape(-1, 2).tolist():
            yield top, bottom, left, right
        top = bottom


def _distinct(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct rows in order of first appearance, and the distinct row of each row."""
    keys = [row.tobytes() for row in packed] if packed.shape[1] <= 64 else [hash(row.tobytes()) for row in packed]
    seen: dict[bytes | int, int] = {}
    row_of = np.array([seen.setdefault(key, len(seen)) for key in keys], dtype=np.int64)
    first = np.full(len(seen), len(packed), dtype=np.int64)
    np.minimum.at(first, row_of, np.arange(len(packed)))
    distinct = packed[first]
    if not all(
        np.array_equal(distinct[row_of[i : i + 1024]], packed[i : i + 1024]) for i in range(0, len(packed), 1024)
    ):
        raise RuntimeError("two different rows have the same hash; this is a bug, please report it")
    return distinct, row_of


def _undominated(packed: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Rows that are part of no other row. Only a larger row can hold a distinct one, so each is held against those."""
    keep = np.ones(len(packed), dtype=bool)
    order = np.argsort(-sizes, kind="stable")
    largest = sizes[order]
    for row in np.flatnonzero(sizes < sizes.max()):
        larger = order[: np.searchsorted(-largest, -sizes[row], side="left")]
        byte = int(np.argmax(packed[row] > 0)) if sizes[row] else 0
        if sizes[row]:  # candidates show the row's first byte; the rest of them is compared in full
            larger = larger[(packed[larger, byte] & packed[row, byte]) == packed[row, byte]]
        step = max(1, CHUNK_BYTES // packed.shape[1])
        for first in range(0, len(larger), step):
            if ((packed[larger[first : first + step]] & packed[row]) == packed[row]).all(1).any():
                keep[row] = False
                break
    return keep


def _several_patches(
    packed: np.ndarray, row_of: np.ndarray, threat: PatchThreat, number: int
) -> tuple[np.ndarray, np.ndarray, Tensor]:
    """Unions of ``count`` undominated rows, each of which may be chosen more than once.

    Of n such rows n patches reach all, and further ones nothing more. Two are kept in any case: one would be a location.
    """
    sizes = np.bitwise_count(packed).sum(1, dtype=np.int64)
    useful = np.flatnonzero(_undominated(packed, sizes))
    count = min(threat.count, max(2, len(useful)))
    _check_budget(comb(len(useful) + count - 1, count), number, threat)
    chosen = np.array(list(combinations_with_replacement(range(len(useful)), count)))
    union = np.bitwise_or.reduce([packed[useful[chosen[:, i]]] for i in range(count)])
    example = np.full(len(packed), len(row_of), dtype=np.int64)
    np.minimum.at(example, row_of, np.arange(len(row_of)))
    distinct, union_row = _distinct(union)
    return distinct, union_row, torch.from_numpy(example[useful[chosen]])
