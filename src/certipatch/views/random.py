"""Random views: drawn one by one from a family too large to be gone through, or from any numbered views."""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import lru_cache
from math import comb, inf, nextafter
from typing import Any, ClassVar, final

import torch
from jaxtyping import Bool, Float64, Int, Int64
from torch import Tensor

from certipatch.errors import InputError
from certipatch.views.bands import Columns
from certipatch.views.base import Views
from certipatch.views.blocks import Blocks


class RandomViews(ABC):
    """A random view shows ``keep`` distinct ones of P *parts* (pixels, columns), every choice of them equally likely."""

    name: ClassVar[str]
    keep: int

    @property
    @abstractmethod
    def parts(self) -> Views:
        """The views of one part each, P in all, from which a view is made."""

    @abstractmethod
    def draw(self, image_size: tuple[int, int], number: int, generator: torch.Generator) -> Bool[Tensor, "n H W"]:
        """The visible pixels of ``number`` independent random views, on the generator's device."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The settings that build these views again: plain JSON values."""

    def check(self, image_size: tuple[int, int]) -> int:
        """P for images of (H, W) pixels. InputError if fewer than ``keep``."""
        number = self.parts.number(image_size)
        if self.keep > number:
            raise InputError(
                f"{self.name} cannot keep {self.keep} of the {number} in a picture of {image_size[0]}x{image_size[1]} "
                f"pixels; use keep <= {number}"
            )
        return number

    def chance(self, touched: Int[Tensor, " L"], image_size: tuple[int, int]) -> Float64[Tensor, " L"]:
        """Δ: the chance that a random view shows at least one of ``touched`` parts, over the whole family.

        Levine & Feizi 2020, section 2.1; computed in whole numbers, then rounded up.
        """
        number = self.check(image_size)
        values, which = touched.unique(return_inverse=True)
        chances = [chance_to_touch(number, self.keep, value) for value in values.tolist()]
        return torch.tensor(chances, dtype=torch.float64)[which]


@lru_cache(maxsize=4096)
def chance_to_touch(parts: int, keep: int, touched: int) -> float:
    """1 − C(P − ρ, k) / C(P, k): the smallest float that is no smaller."""
    exact = 1 - Fraction(comb(parts - touched, keep), comb(parts, keep))
    nearest = float(exact)
    return nearest if Fraction(nearest) >= exact else nextafter(nearest, inf)


def subsets(number: int, parts: int, keep: int, generator: torch.Generator) -> Bool[Tensor, "n P"]:
    """Independent uniform choices of ``keep`` out of ``parts``.

    The ``keep`` largest of P uniform keys are any set with the same chance, unless the last of them ties with the first
    one left out; such rows are drawn again.
    """
    chosen = torch.ones((number, parts), dtype=torch.bool, device=generator.device)
    rows = torch.arange(number if keep < parts else 0, device=generator.device)
    while len(rows):
        keys = torch.rand((len(rows), parts), dtype=torch.float64, generator=generator, device=generator.device)
        top = keys.topk(keep + 1, dim=1)
        chosen[rows] = torch.zeros_like(keys, dtype=torch.bool).scatter_(1, top.indices[:, :keep], True)
        rows = rows[top.values[:, keep - 1] == top.values[:, keep]]
    return chosen


def _check_keep(keep: int) -> None:
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
        raise InputError(f"keep must be a whole number of at least 1, not {keep!r}")


@final
@dataclass(frozen=True)
class RandomPixels(RandomViews):
    """``keep`` of the H·W pixels, all channels of a pixel together (Levine & Feizi, "Robustness Certificates for Sparse
    Adversarial Attacks by Randomized Ablation", AAAI 2020)."""

    keep: int
    name: ClassVar[str] = "random-pixels"

    def __post_init__(self):
        _check_keep(self.keep)

    @property
    def parts(self) -> Views:
        return Blocks(1)

    def draw(self, image_size: tuple[int, int], number: int, generator: torch.Generator) -> Bool[Tensor, "n H W"]:
        return subsets(number, self.check(image_size), self.keep, generator).view(-1, *image_size)

    def settings(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}


@final
@dataclass(frozen=True)
class RandomColumns(RandomViews):
    """``keep`` of the W pixel columns, side by side or not."""

    keep: int
    name: ClassVar[str] = "random-columns"

    def __post_init__(self):
        _check_keep(self.keep)

    @property
    def parts(self) -> Views:
        return Columns(1)

    def draw(self, image_size: tuple[int, int], number: int, generator: torch.Generator) -> Bool[Tensor, "n H W"]:
        return subsets(number, self.check(image_size), self.keep, generator)[:, None].repeat(1, image_size[0], 1)

    def settings(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}


@final
@dataclass(frozen=True)
class OneOf(RandomViews):
    """One of V numbered views: with column bands the "randomized column smoothing" of Levine & Feizi 2020, Table 2."""

    views: Views
    keep: ClassVar[int] = 1  # type: ignore[misc]
    name: ClassVar[str] = "one-of"

    @property
    def parts(self) -> Views:
        return self.views

    def choose(self, image_size: tuple[int, int], number: int, generator: torch.Generator) -> Int64[Tensor, " n"]:
        """Numbers of random views; their chances differ from 1/V by at most 2⁻⁵³."""
        uniform = torch.rand(number, dtype=torch.float64, generator=generator, device=generator.device)
        return (uniform * self.check(image_size)).long()

    def draw(self, image_size: tuple[int, int], number: int, generator: torch.Generator) -> Bool[Tensor, "n H W"]:
        index = self.choose(image_size, number, generator)
        return self.views.visible(image_size, index.cpu()).to(generator.device)

    def settings(self) -> dict[str, Any]:
        return {"name": self.name, "views": self.views.settings()}
