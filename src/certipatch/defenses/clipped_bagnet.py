"""Clipped BagNet (Zhang, Yuan, McCoyd & Wagner 2020): local logits squashed before they are summed."""

from typing import Any, ClassVar, final

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn

from certipatch import evidence as ev
from certipatch.defenses.base import Evidence, ViewDefense
from certipatch.rules import ClippedSum
from certipatch.views import Views


@final
class ClippedBagNet(ViewDefense):
    """The class of largest sum of tanh(a·u − b) over the local logits u.

    Args:
        model: a network of local logits, or one that reads bands or blocks.
        views: the bands or blocks; None for a network of local logits.
        scale: a; 0.05 in the paper, for BagNets on ImageNet.
        shift: b; 1 in the paper.
        batch_size: pictures or rendered views per forward pass.
    """

    name: ClassVar[str] = "clipped-bagnet"
    raw: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        views: Views | None = None,
        scale: float = 0.05,
        shift: float = 1.0,
        batch_size: int | None = None,
    ):
        super().__init__(model, views, batch_size)
        if not scale > 0:
            raise ValueError(f"scale must be positive, not {scale}")
        self.scale, self.shift = scale, shift
        self._rule = ClippedSum(-1.0, 1.0)
        self.theorem = self._rule.theorem

    def settings(self) -> dict[str, Any]:
        return {"scale": self.scale, "shift": self.shift}

    def rule(self, image_size: tuple[int, int]) -> ClippedSum:
        return self._rule

    def values(
        self, logits: Float[Tensor, "B V K"], tolerance: ev.Tolerance
    ) -> tuple[Tensor, None, Float64[Tensor, " B"]]:
        error = tolerance.of(logits).flatten(1).amax(1).double() * self.scale  # the slope of tanh is at most 1
        return torch.tanh(self.scale * logits - self.shift), None, error + torch.finfo(logits.dtype).eps

    def largest_patch(self, evidence: Evidence) -> Int64[Tensor, " B"]:
        return self._largest_patch(evidence)
