"""Threats: the changes of an image that the attacker may make.

A patch threat yields *locations*: for one image size, every set of pixels that the attacker may repaint. A location
is a shape (a small boolean mask) at a top left corner; locations are numbered shape by shape, then row by row.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, final

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from certipatch.errors import InputError

LARGEST_SIDE = 2**14  # pixels
SHAPES = ("square", "rectangle", "line", "diamond", "parallelogram")
Mask = tuple[tuple[bool, ...], ...]


@final
@dataclass(frozen=True)
class Locations:
    """All locations of a patch in an image of (H, W) pixels.

    ``masks[shape[l]]`` with its top left pixel at ``(top[l], left[l])`` is the set of pixels of location l.
    """

    image_size: tuple[int, int]
    masks: tuple[Mask, ...]
    shape: Int[Tensor, " L"]
    top: Int[Tensor, " L"]
    left: Int[Tensor, " L"]

    def __len__(self) -> int:
        return len(self.top)

    def box(self, index: int) -> tuple[int, int, int, int]:
        """(top, left, height, width) of a location's bounding box, in pixels."""
        mask = self.masks[int(self.shape[index])]
        return int(self.top[index]), int(self.left[index]), len(mask), len(mask[0])

    def pixels(self, index: int) -> Bool[Tensor, "H W"]:
        """The pixels of one location."""
        top, left, height, width = self.box(index)
        picture = torch.zeros(self.image_size, dtype=torch.bool)
        picture[top : top + height, left : left + width] = torch.tensor(self.masks[int(self.shape[index])])
        return picture


@final
class PatchThreat:
    """An attacker who repaints ``count`` patches, in any way.

    Args:
        size: ``5`` (a 5x5 square), ``(3, 8)`` (3 rows, 8 columns), ``"2%"`` (the smallest square of at least that share
            of the image's area), or a bool mask (h, w). With ``shape`` a number is the number of *pixels*, and a
            percentage the least number of pixels of at least that share.
        shape: ``square``, ``rectangle`` (every rectangle of the least area ≥ that number, neither a square nor one
            pixel thin), ``line`` (across and down), ``diamond`` (the pixels nearest to one pixel in L1 distance),
            ``parallelogram`` (rows of ⌈√n⌉ pixels, each one pixel further right). Chiang et al. 2020, section 5.4.
        count: patches, each anywhere; they may overlap.
        where: ``"anywhere"``, ``"corners"``, or a list of (top, left) pixels.

    Sizes that make no sense raise InputError here; a threat that does not fit an image raises it in ``locations``.
    """

    def __init__(
        self,
        size: int | str | tuple[int, int] | Tensor,
        *,
        shape: str | None = None,
        count: int = 1,
        where: str | Sequence[tuple[int, int]] = "anywhere",
    ):
        self._share: Fraction | None = None
        self._mask: Mask | None = None
        self._pixels: int | None = None
        if shape is not None and shape not in SHAPES:
            raise InputError(f"unknown patch shape {shape!r}; use one of {', '.join(SHAPES)}")
        if isinstance(size, Tensor):
            self._mask = _checked_mask(size)
        elif isinstance(size, str):
            self._share = _share(size)
        elif isinstance(size, tuple | list):
            if len(size) != 2:
                raise InputError(f"a patch has a height and a width, not {tuple(size)}")
            height, width = (_side(n) for n in size)
            self._mask = ((True,) * width,) * height
        else:
            n = _positive(size, "a number of patch pixels") if shape else _side(size)
            if shape is None:
                self._mask = ((True,) * n,) * n
            else:
                self._pixels = n
        if shape is not None and self._mask is not None:
            raise InputError(
                f"shape={shape!r} takes a number of pixels or a percentage, not a height and width or mask"
            )
        self.shape = shape
        self.count = _positive(count, "the number of patches")
        if not isinstance(where, str | list | tuple):
            raise InputError(f"where is 'anywhere', 'corners' or a list of (top, left) pixels, not {where!r}")
        self.where = where if isinstance(where, str) else tuple(_corner(place) for place in where)
        if isinstance(where, str) and where not in ("anywhere", "corners"):
            raise InputError(f"where is 'anywhere', 'corners' or a list of (top, left) pixels, not {where!r}")
        if isinstance(size, Tensor) and not isinstance(where, str) and not (size[0].any() and size[:, 0].any()):
            raise InputError(
                "the mask's first row or column is empty: cut it off, and let where count from what is left"
            )
        if not self.where:
            raise InputError("where lists no place; give at least one (top, left) pixel")

    def masks(self, image_size: tuple[int, int]) -> tuple[Mask, ...]:
        """The patch's shapes in an image of (H, W) pixels. InputError if none fits."""
        height, width = image_size
        if self._mask is not None:
            shapes = [self._mask]
        elif self.shape is None:
            assert self._share is not None
            side = math.isqrt(math.ceil(self._share * height * width) - 1) + 1
            shapes = [((True,) * side,) * side]
        else:
            pixels = self._pixels or math.ceil(self._share * height * width)  # type: ignore[operator]
            if pixels > height * width:
                raise InputError(f"a patch of {pixels} pixels does not fit a picture of {height}x{width} pixels")
            shapes = _SHAPES[self.shape](pixels)
        fitting = tuple(mask for mask in shapes if len(mask) <= height and len(mask[0]) <= width)
        if not fitting:
            sizes = " or ".join(f"{len(mask)}x{len(mask[0])}" for mask in shapes[:2])
            raise InputError(f"a patch of {sizes} pixels does not fit a picture of {height}x{width} pixels")
        return fitting

    def locations(self, image_size: tuple[int, int]) -> Locations:
        """Every location of *one* patch in an image of (H, W) pixels. InputError if it does not fit."""
        height, width = image_size
        masks = self.masks(image_size)
        shape, top, left = [], [], []
        for number, mask in enumerate(masks):
            last = (height - len(mask), width - len(mask[0]))
            if self.where == "anywhere":
                tops = torch.arange(last[0] + 1).repeat_interleave(last[1] + 1)
                lefts = torch.arange(last[1] + 1).repeat(last[0] + 1)
            else:
                if self.where == "corners":
                    places = sorted({(t, le) for t in (0, last[0]) for le in (0, last[1])})
                else:
                    places = [place for place in self.where if isinstance(place, tuple)]
                    for place in places:
                        if place[0] > last[0] or place[1] > last[1]:
                            raise InputError(
                                f"a patch of {len(mask)}x{len(mask[0])} pixels at {place} leaves the picture of "
                                f"{height}x{width} pixels"
                            )
                tops, lefts = torch.tensor(places).T
            shape.append(torch.full((len(tops),), number))
            top.append(tops)
            left.append(lefts)
        return Locations((height, width), masks, torch.cat(shape), torch.cat(top), torch.cat(left))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values from which ``threat_from_dict`` makes an equal threat."""
        if self._share is not None:
            size: Any = _percent(self._share)
        elif self._pixels is not None:
            size = self._pixels
        else:
            assert self._mask is not None
            full = all(all(row) for row in self._mask)
            size = [len(self._mask), len(self._mask[0])] if full else [[int(p) for p in row] for row in self._mask]
        where = self.where if isinstance(self.where, str) else [list(place) for place in self.where]
        return {"kind": "patch", "size": size, "shape": self.shape, "count": self.count, "where": where}

    def __str__(self) -> str:
        size = self.to_dict()["size"]
        if isinstance(size, list) and isinstance(size[0], int):
            words = f"{size[0]}x{size[1]} pixels"
        elif isinstance(size, list):
            words = f"a mask of {sum(map(sum, size))} pixels"
        elif self.shape is None:
            words = f"a square of {size} of the picture"
        else:
            words = f"a {self.shape} of {size}{' pixels' if self._pixels else ' of the picture'}"
        if self.count > 1:
            words = f"{self.count} patches of {words}"
        if self.where == "corners":
            words += " at the corners"
        elif self.where != "anywhere":
            words += f" at one of {len(self.where)} places"
        return words

    def __repr__(self) -> str:
        return f"PatchThreat({self})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PatchThreat) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(str(self.to_dict()))


@final
@dataclass(frozen=True)
class SparseThreat:
    """An attacker who repaints any ``pixels`` pixels, all channels of each, in any way."""

    pixels: int

    def __post_init__(self):
        _positive(self.pixels, "the number of attacked pixels")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values from which ``threat_from_dict`` makes an equal threat."""
        return {"kind": "sparse", "pixels": self.pixels}

    def __str__(self) -> str:
        return f"any {self.pixels} pixels"


Threat = PatchThreat | SparseThreat


def threat_from_dict(values: dict[str, Any]) -> Threat:
    """The threat that ``to_dict`` described."""
    if values.get("kind") == "sparse":
        return SparseThreat(values["pixels"])
    size, where = values["size"], values["where"]
    if isinstance(size, list):
        size = tuple(size) if isinstance(size[0], int) else torch.tensor(size, dtype=torch.bool)
    where = where if isinstance(where, str) else [(top, left) for top, left in where]
    return PatchThreat(size, shape=values["shape"], count=values["count"], where=where)


def parse_patch(text: str) -> int | str | tuple[int, int]:
    """The size that a user typed: ``5``, ``3x8`` or ``2%``."""
    if re.fullmatch(r"\d{1,9}", text):
        return int(text)
    if match := re.fullmatch(r"(\d{1,9})x(\d{1,9})", text):
        return int(match[1]), int(match[2])
    if text.endswith("%"):
        return text
    raise InputError(f"patch size {text!r} is not understood; write 5, 3x8 (rows x columns) or 2%")


def parse_where(text: str) -> str | list[tuple[int, int]]:
    """The locations that a user typed: ``anywhere``, ``corners`` or ``0,0;5,7``."""
    if text in ("anywhere", "corners"):
        return text
    if not re.fullmatch(r"\d{1,9},\d{1,9}(;\d{1,9},\d{1,9})*", text):
        raise InputError(f"--where {text!r} is not understood; write anywhere, corners or TOP,LEFT;TOP,LEFT")
    return [(int(top), int(left)) for top, left in (place.split(",") for place in text.split(";"))]


def _positive(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{what} must be a whole number of at least 1, not {value!r}")
    return value


def _side(value: Any) -> int:
    if _positive(value, "a patch side") > LARGEST_SIDE:
        raise InputError(f"a patch side of {value} pixels is larger than any picture; at most {LARGEST_SIDE}")
    return value


def _corner(place: Any) -> tuple[int, int]:
    if (
        not isinstance(place, list | tuple)
        or len(place) != 2
        or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in place)
    ):
        raise InputError(f"a place is (top, left) in pixels of at least 0, not {place!r}")
    return place[0], place[1]


def _share(text: str) -> Fraction:
    match = re.fullmatch(r"\s*(\d{1,3}(?:\.\d{1,9})?)\s*%\s*", text)
    share = Fraction(match[1]) / 100 if match else Fraction(0)
    if not 0 < share <= 1:
        raise InputError(f"patch share {text!r} is not understood; write a percentage above 0% and up to 100%, as 2%")
    return share


def _percent(share: Fraction) -> str:
    return f"{float(share * 100):.9f}".rstrip("0").rstrip(".") + "%"


def _checked_mask(mask: Tensor) -> Mask:
    if mask.dtype != torch.bool or mask.ndim != 2 or not bool(mask.any()):
        raise InputError(f"a patch mask is a bool tensor (h, w) with a pixel set, not {mask.dtype} {tuple(mask.shape)}")
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    tight = mask[int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1]
    return tuple(tuple(row) for row in tight.tolist())


def _square(n: int) -> list[Mask]:
    side = math.isqrt(n)
    if side * side != n:
        raise InputError(f"a square of {n} pixels does not exist; use {side * side} or {(side + 1) ** 2}")
    return [((True,) * side,) * side]


def _line(n: int) -> list[Mask]:
    return [((True,) * n,), ((True,),) * n] if n > 1 else [((True,),)]


def _rectangle(n: int) -> list[Mask]:
    """All h x w with w = ⌈n/h⌉ and no smaller h that gives the same w; neither square nor line."""
    sizes = {(h, -(-n // h)) for h in range(2, n)}
    sizes = {(h, w) for h, w in sizes if w > 1 and h != w and (h - 1) * w < n}
    if not sizes:
        raise InputError(f"there is no rectangle of {n} pixels that is neither a square nor a line")
    return [((True,) * w,) * h for h, w in sorted(sizes)]


@lru_cache
def _diamond(n: int) -> list[Mask]:
    radius = next(r for r in range(n + 1) if 2 * r * r + 2 * r + 1 >= n)
    reach = range(-radius, radius + 1)
    nearest = sorted((abs(i) + abs(j), i, j) for i in reach for j in reach)[:n]
    mask = torch.zeros(2 * radius + 1, 2 * radius + 1, dtype=torch.bool)
    for _, i, j in nearest:
        mask[i + radius, j + radius] = True
    return [_checked_mask(mask)]


def _parallelogram(n: int) -> list[Mask]:
    side = math.isqrt(n - 1) + 1
    rows = -(-n // side)
    mask = torch.zeros(rows, side + rows - 1, dtype=torch.bool)
    for row in range(rows):
        mask[row, row : row + min(side, n - row * side)] = True
    return [_checked_mask(mask)]


_SHAPES = {
    "square": _square,
    "rectangle": _rectangle,
    "line": _line,
    "diamond": _diamond,
    "parallelogram": _parallelogram,
}
