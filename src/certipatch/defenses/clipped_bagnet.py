"""Clipped BagNet (Zhang, Yuan, McCoyd & Wagner 2020): local logits squashed before they are summed."""

from typing import ClassVar, final

import torch
from jaxtyping import Float, Float64, Int64
from pydantic import Field
from torch import Tensor, nn

from certipatch import evidence as ev
from certipatch.defenses.base import Evidence, ViewDefense
from certipatch.defenses.settings import DefenseSettings
from certipatch.rules import ClippedSum
from certipatch.rules.soft import LEAK
from certipatch.views import Views


class ClippedBagNetSettings(DefenseSettings):
    """The slope and the shift of tanh."""

    scale: float = Field(default=0.05, gt=0)
    shift: float = 1.0


DEFAULT = ClippedBagNetSettings()


@final
class ClippedBagNet(ViewDefense):
    """The class of largest sum of tanh(a·u − b) over the local logits u.

    Args:
        model: a network of local logits, or one that reads bands or blocks.
        views: the bands or blocks; None for a network of local logits.
        scale: a; 0.05 in the paper, for BagNets on ImageNet.
        shift: b; 1 in the paper.
        batch_size: images or rendered views per forward pass.
    """

    name: ClassVar[str] = "clipped-bagnet"
    settings_class = ClippedBagNetSettings
    in_words: ClassVar[str] = (
        "The network looks at {views}. Each adds a score between two fixed limits to every class; the class "
        "with the largest sum is the answer. A patch can only change the scores of those views that show one of its pixels, "
        "and only up to the limits. Where the answer still wins when all of them are at their worst, nothing painted there "
        "can change it."
    )
    raw: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        views: Views | None = None,
        scale: float = DEFAULT.scale,
        shift: float = DEFAULT.shift,
        batch_size: int | None = None,
    ):
        super().__init__(model, views, batch_size)
        self.options = ClippedBagNetSettings.checked(scale=scale, shift=shift)
        self.scale, self.shift = scale, shift
        self._rule = ClippedSum(-1.0, 1.0)
        self.theorem = self._rule.theorem

    def rule(self, image_size: tuple[int, int]) -> ClippedSum:
        return self._rule

    def values(
        self, logits: Float[Tensor, "B V K"], tolerance: ev.Tolerance
    ) -> tuple[Tensor, None, Float64[Tensor, " B"]]:
        error = tolerance.of(logits).flatten(1).amax(1).double() * self.scale  # the slope of tanh is at most 1
        return torch.tanh(self.scale * logits - self.shift), None, error + torch.finfo(logits.dtype).eps

    def soft_values(self, logits: Float[Tensor, "N V K"]) -> Float[Tensor, "N V K"]:
        beyond = self.scale * logits - self.shift
        return torch.tanh(beyond) + LEAK * beyond

    def largest_patch(self, evidence: Evidence) -> Int64[Tensor, " B"]:
        return self._largest_patch(evidence)
