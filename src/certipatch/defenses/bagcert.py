"""BagCert (Metzen & Yatsura 2021): every local score counts as 0 or 1."""

from typing import ClassVar, final

from jaxtyping import Bool, Float, Int64
from pydantic import Field
from torch import Tensor, nn

from certipatch import evidence as ev
from certipatch.defenses.base import Evidence, ViewDefense
from certipatch.defenses.settings import DefenseSettings
from certipatch.rules import ClippedSum
from certipatch.rules.soft import soft_votes
from certipatch.views import Views


class BagCertSettings(DefenseSettings):
    """θ."""

    threshold: float = Field(default=0.3, ge=0, lt=1)


DEFAULT = BagCertSettings()


@final
class BagCert(ViewDefense):
    """The class with most cells whose score passes the step function: the softmax confidence exceeds θ.

    Args:
        model: a network of local logits, or one that reads bands or blocks.
        views: the bands or blocks; None for a network of local logits.
        threshold: θ. The paper's step is at logit 0 of a network trained with it; a confidence serves any network.
        batch_size: images or rendered views per forward pass.
    """

    name: ClassVar[str] = "bagcert"
    settings_class = BagCertSettings
    in_words: ClassVar[str] = (
        "The network looks at {views}. Each counts for every class that it is sure enough of; the class with the "
        "largest count is the answer. A patch can only change those views that show one of its pixels. Where the answer "
        "still wins when all of them count against it, nothing painted there can change it."
    )

    def __init__(
        self,
        model: nn.Module,
        views: Views | None = None,
        threshold: float = DEFAULT.threshold,
        batch_size: int | None = None,
    ):
        super().__init__(model, views, batch_size)
        self.options = BagCertSettings.checked(threshold=threshold)
        self.threshold = threshold
        self._rule = ClippedSum(0.0, 1.0)
        self.theorem = self._rule.theorem

    def rule(self, image_size: tuple[int, int]) -> ClippedSum:
        return self._rule

    def values(
        self, logits: Float[Tensor, "B V K"], tolerance: ev.Tolerance
    ) -> tuple[Bool[Tensor, "B V K"], Bool[Tensor, "B V"], None]:
        return *ev.votes(ev.scores(logits), self.threshold, tolerance), None

    def soft_values(self, logits: Float[Tensor, "N V K"]) -> Float[Tensor, "N V K"]:
        return soft_votes(logits, self.threshold)

    def largest_patch(self, evidence: Evidence) -> Int64[Tensor, " B"]:
        return self._largest_patch(evidence)
