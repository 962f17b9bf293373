"""The contract of a set of views: V sets of visible pixels, for any image size."""

from abc import ABC, abstractmethod
from itertools import combinations
from math import comb
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from certipatch.errors import InputError

MAX_VIEWS = 1_000_000


class Views(ABC):
    """V partial images. View v *is* a set of visible pixels; its evidence may depend on nothing else."""

    @abstractmethod
    def number(self, image_size: tuple[int, int]) -> int:
        """V for images of (H, W) pixels. ValueError if the views do not fit."""

    @abstractmethod
    def visible(self, image_size: tuple[int, int], index: Int[Tensor, " v"] | None = None) -> Bool[Tensor, "v H W"]:
        """True where view ``index[i]`` shows the pixel; all V views when ``index`` is None."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The settings from which ``views.create`` builds these views again: plain JSON values."""


def start_positions(length: int, width: int, stride: int, wrap: bool) -> list[int]:
    """First pixels of the runs of ``width`` pixels along an axis of ``length`` pixels.

    With wrap-around every stride-th pixel starts a run (paper, Fig. 4). Without, the last run ends at the border even
    where the stride does not divide, so that every pixel is shown by some view.
    """
    if width > length:
        raise InputError(f"a view {width} pixels wide does not fit a picture of {length} pixels; use width <= {length}")
    if wrap:
        return list(range(0, length, stride))
    return sorted({min(start, length - width) for start in range(0, length - width + stride, stride)})


def runs(length: int, width: int, starts: list[int]) -> Bool[Tensor, "n length"]:
    """One row per start: True on the ``width`` pixels from there, around the end where needed."""
    offsets = (torch.arange(length)[None, :] - torch.tensor(starts)[:, None]) % length
    return offsets < width


def check_sizes(width: int, stride: int, count: int) -> None:
    """ValueError unless all three are positive whole numbers."""
    for name, value in (("width", width), ("stride", stride), ("count", count)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be a whole number of at least 1, not {value!r}")


def number_of_combinations(singles: int, count: int) -> int:
    """V = (singles choose count); ValueError when that is nothing or more than MAX_VIEWS."""
    number = comb(singles, count)
    if not 1 <= number <= MAX_VIEWS:
        raise InputError(
            f"{count} of {singles} bands or blocks give {number} views; between 1 and {MAX_VIEWS} can be used"
        )
    return number


def union_of(singles: Bool[Tensor, "n H W"], count: int, index: Tensor | None) -> Bool[Tensor, "v H W"]:
    """Views of ``count`` distinct single bands or blocks each, in lexicographic order."""
    if count == 1:
        return singles if index is None else singles[index]
    members = torch.tensor(list(combinations(range(len(singles)), count)))
    if index is not None:
        members = members[index]
    return torch.stack([singles[column] for column in members.T]).any(0)
