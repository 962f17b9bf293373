"""BagCert (Metzen & Yatsura 2021): every local score counts as 0 or 1."""

from typing import Any, ClassVar, final

from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from certipatch import evidence as ev
from certipatch.defenses.base import Evidence, ViewDefense
from certipatch.rules import ClippedSum
from certipatch.views import Views


@final
class BagCert(ViewDefense):
    """The class with most cells whose score passes the step function: the softmax confidence exceeds θ.

    Args:
        model: a network of local logits, or one that reads bands or blocks.
        views: the bands or blocks; None for a network of local logits.
        threshold: θ. The paper's step is at logit 0 of a network trained with it; a confidence serves any network.
        batch_size: pictures or rendered views per forward pass.
    """

    name: ClassVar[str] = "bagcert"

    def __init__(
        self, model: nn.Module, views: Views | None = None, threshold: float = 0.3, batch_size: int | None = None
    ):
        super().__init__(model, views, batch_size)
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold is a confidence in [0, 1), not {threshold}")
        self.threshold = threshold
        self._rule = ClippedSum(0.0, 1.0)
        self.theorem = self._rule.theorem

    def settings(self) -> dict[str, Any]:
        return {"threshold": self.threshold}

    def rule(self, image_size: tuple[int, int]) -> ClippedSum:
        return self._rule

    def values(
        self, logits: Float[Tensor, "B V K"], tolerance: ev.Tolerance
    ) -> tuple[Bool[Tensor, "B V K"], Bool[Tensor, "B V"], None]:
        return *ev.votes(ev.scores(logits), self.threshold, tolerance), None

    def largest_patch(self, evidence: Evidence) -> Int64[Tensor, " B"]:
        return self._largest_patch(evidence)
