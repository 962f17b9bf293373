"""(De)randomized smoothing, Levine & Feizi 2020: every view votes, the certificate counts votes."""

from typing import Any, ClassVar, Literal, final

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from certipatch import evidence as ev
from certipatch.certificate import Certificate
from certipatch.defenses.base import Defense, Evidence
from certipatch.relation import Sees, sees
from certipatch.rules import Vote
from certipatch.threats import PatchThreat, SparseThreat, Threat
from certipatch.views import Views


@final
class DerandomizedSmoothing(Defense):
    """Votes of a network over column, row or block views, with an exact certificate for any patch.

    Args:
        model: an ``nn.Module`` in eval mode. It reads rendered views (N, 2C, H, W), ``[x, 1 − x]`` with zeros for hidden
            pixels, and gives logits (N, K); an attribute ``encoding`` of ``fill`` (hidden pixels are 0.5, C channels),
            ``crop`` or ``all-views`` (pictures (B, C, H, W) → logits (B, V, K)) says otherwise.
        views: the views, for example ``views.Columns(4)``.
        threshold: θ: a view votes for every class whose softmax confidence exceeds it; None: for its top class.
        margin: ``"location"`` (exact) or ``"paper"`` (Theorems 1 and 2).
        batch_size: pictures or rendered views per forward pass (default: 2²⁰ pixels); the check measures what it changes.

    The first call with pictures of a new size runs the model check (``evidence.check_model``) and raises InputError
    for a model whose views leak or share statistics. Views whose vote rounding could turn count as attacked.
    """

    name: ClassVar[str] = "derandomized-smoothing"

    def __init__(
        self,
        model: nn.Module,
        views: Views,
        threshold: float | None = 0.3,
        margin: Literal["location", "paper"] = "location",
        batch_size: int | None = None,
    ):
        if threshold is not None and not 0 <= threshold < 1:
            raise ValueError(f"threshold is a confidence in [0, 1) or None for the top class, not {threshold}")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        self.model, self.views, self.threshold, self.batch_size = model, views, threshold, batch_size
        self.rule = Vote(margin)
        self.theorem = self.rule.theorem
        self._tolerance: dict[tuple[Any, ...], ev.Tolerance] = {}
        self._sees: dict[tuple[Threat, tuple[int, int]], Sees] = {}

    def settings(self) -> dict[str, Any]:
        return {"threshold": self.threshold, "margin": self.rule.margin}

    def check(self, images: Float[Tensor, "B C H W"]) -> None:
        self.tolerance(images)

    def tolerance(self, images: Float[Tensor, "B C H W"]) -> ev.Tolerance:
        """The measured rounding of a score for pictures of this size; runs the model check the first time."""
        first = next(self.model.parameters(), images)
        autocast = torch.is_autocast_enabled(images.device.type)
        key = (*images.shape[1:], images.dtype, images.device, self.model.training, first.dtype, autocast)
        if key not in self._tolerance:
            self._tolerance[key] = ev.check_model(self.model, self.views, images, self.batch_size)
        return self._tolerance[key]

    def evidence(self, images: Float[Tensor, "B C H W"]) -> Evidence:
        ev.check_images(images)
        tolerance = self.tolerance(images)
        confidence = ev.scores(ev.logits(self.model, self.views, images, batch_size=self.batch_size))
        if not bool(torch.isfinite(confidence).all()):
            raise ev.InputError("the model's answers are not finite; a certificate needs finite logits")
        values, unsure = ev.votes(confidence, self.threshold, tolerance)
        return Evidence(values, unsure, (images.shape[2], images.shape[3]))

    def label(self, evidence: Evidence) -> Int64[Tensor, " B"]:
        return self.rule.predict(evidence.values)

    def certificate(self, evidence: Evidence, threat: Threat) -> Certificate:
        relation = self.relation(threat, evidence.image_size)
        verdict = self.rule.certify(evidence.values, relation.rows.to(evidence.values.device), evidence.unsure)
        if isinstance(threat, SparseThreat):
            return Certificate(verdict.label, verdict.margin.amin(1, keepdim=True), threat, self.rule.theorem)
        margin = verdict.margin[:, relation.row_of.to(verdict.margin.device)]
        return Certificate(verdict.label, margin, threat, self.rule.theorem, relation)

    def relation(self, threat: Threat, image_size: tuple[int, int]) -> Sees:
        """``sees`` for these views, computed once per threat and picture size."""
        key = (threat, image_size)
        if key not in self._sees:
            self._sees[key] = sees(self.views, threat, image_size)
        return self._sees[key]

    def largest_patch(self, evidence: Evidence) -> Int64[Tensor, " B"]:
        """Side of the largest certified square. Certificates nest, so the search stops at the first size that fails."""
        largest = torch.zeros(len(evidence.values), dtype=torch.int64, device=evidence.values.device)
        left = torch.arange(len(evidence.values), device=evidence.values.device)
        for side in range(1, min(evidence.image_size) + 1):
            relation = self.relation(PatchThreat(side), evidence.image_size)
            unsure = None if evidence.unsure is None else evidence.unsure[left]
            rows = relation.rows[relation.undominated].to(left.device)
            left = left[self.rule.certify(evidence.values[left], rows, unsure).certified]
            if len(left) == 0:
                break
            largest[left] = side
        return largest

    def forward_passes(self, image_size: tuple[int, int]) -> int:
        return ev.forward_passes(self.model, self.views, image_size)

    def to(self, device: str | torch.device) -> "DerandomizedSmoothing":
        self.model.to(device)
        return self
