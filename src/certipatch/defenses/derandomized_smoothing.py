"""(De)randomized smoothing, Levine & Feizi 2020: every view votes, the certificate counts votes."""

from typing import ClassVar, Literal, final

from jaxtyping import Bool, Float, Int64
from pydantic import Field
from torch import Tensor, nn

from certipatch import evidence as ev
from certipatch.defenses.base import Evidence, ViewDefense
from certipatch.defenses.settings import DefenseSettings
from certipatch.rules import Vote
from certipatch.rules.soft import soft_votes
from certipatch.views import Views


class SmoothingSettings(DefenseSettings):
    """θ, and the certificate's margin."""

    threshold: float | None = Field(default=0.3, ge=0, lt=1)
    margin: Literal["location", "paper"] = "location"


DEFAULT = SmoothingSettings()


@final
class DerandomizedSmoothing(ViewDefense):
    """Votes of a network over column, row or block views, with an exact certificate for any patch.

    Args:
        model: an ``nn.Module`` in eval mode. It reads rendered views (N, 2C, H, W), ``[x, 1 − x]`` with zeros for hidden
            pixels, and gives logits (N, K); an attribute ``encoding`` of ``fill`` (hidden pixels are 0.5, C channels),
            ``crop`` or ``all-views`` (images (B, C, H, W) → logits (B, V, K)) says otherwise.
        views: the views, for example ``views.Columns(4)``.
        threshold: θ: a view votes for every class whose softmax confidence exceeds it; None: for its top class.
        margin: ``"location"`` (exact) or ``"paper"`` (Theorems 1 and 2).
        batch_size: most images or views of a pass on an accelerator (default: 2²⁰ pixels); see ``inference``.

    The first call with images of a new size runs the model check (``model_check.check_model``) and raises InputError
    for a model whose views leak or share statistics. Views whose vote rounding could turn count as attacked.
    """

    name: ClassVar[str] = "derandomized-smoothing"
    settings_class = SmoothingSettings
    in_words: ClassVar[str] = (
        "The network never sees the whole picture. It looks at {views}, and each casts its vote; the "
        "class with most votes is the answer. A patch can only change those views that show one of its pixels. The "
        "certificate gives all of them to the attacker, as votes for whichever rival they like. Where the answer still wins "
        "with the votes of the other views, nothing painted there can change it."
    )

    def __init__(
        self,
        model: nn.Module,
        views: Views,
        threshold: float | None = DEFAULT.threshold,
        margin: Literal["location", "paper"] = DEFAULT.margin,
        batch_size: int | None = None,
    ):
        super().__init__(model, views, batch_size)
        self.options = SmoothingSettings.checked(threshold=threshold, margin=margin)
        self.threshold = threshold
        self._rule = Vote(margin)
        self.theorem = self._rule.theorem

    def rule(self, image_size: tuple[int, int]) -> Vote:
        return self._rule

    def values(
        self, logits: Float[Tensor, "B V K"], tolerance: ev.Tolerance
    ) -> tuple[Bool[Tensor, "B V K"], Bool[Tensor, "B V"], None]:
        return *ev.votes(ev.scores(logits), self.threshold, tolerance), None

    def soft_values(self, logits: Float[Tensor, "N V K"]) -> Float[Tensor, "N V K"]:
        return soft_votes(logits, self.threshold)

    def largest_patch(self, evidence: Evidence) -> Int64[Tensor, " B"]:
        return self._largest_patch(evidence)
