"""The contract of a certified defense, for every command: evidence once, then any certificate from it."""

from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Generator, Tensor, nn

from certipatch import evidence as ev
from certipatch.certificate import Certificate, Notion
from certipatch.defenses.method import Method
from certipatch.errors import InputError
from certipatch.model_check import check_model
from certipatch.models import receptive_fields
from certipatch.rules import Rule
from certipatch.rules.soft import lead_of, soft_votes
from certipatch.threats import PatchThreat, SparseThreat, Threat
from certipatch.views import Views
from certipatch.views.incidence import Incidence, sees
from certipatch.views.render import image_size

EXACT = ev.Tolerance(0.0, 0.0)


@final
@dataclass(frozen=True, eq=False)
class Evidence:
    """The evidence of B images that a rule needs, computed once."""

    values: Tensor
    """(B, V, K): votes, logits or confidences."""
    unsure: Bool[Tensor, "B V"] | None
    image_size: tuple[int, int]
    error: Float64[Tensor, " B"] | None = None
    """Numerical error of a score of each image; None for votes, which have ``unsure`` instead."""
    images: Float[Tensor, "B C H W"] | None = None
    """The images, if a certificate needs the network again (interval bounds); such evidence is not stored."""
    passes: Int64[Tensor, " B"] | None = None
    """Network calls of each image, if images differ in their number."""
    labels: Int64[Tensor, " B"] | None = None
    """Labels, if ``values`` are lower bounds of scores for any rounding; None if labels follow from ``values``."""


class Defense(Method):
    """A certified defense. ``certify`` is ``certificate(evidence(images), threat)``: one pass serves every threat."""

    notion: ClassVar[Notion] = "recovery"
    confidence: float = 1.0
    """Confidence of the certificates: exactly 1, or 1 − α if they rest on samples."""

    @abstractmethod
    def evidence(self, images: Float[Tensor, "B C H W"]) -> Evidence:
        """Run the network over all views. InputError on images that are not floats in [0, 1]."""

    @abstractmethod
    def certificate(self, evidence: Evidence, threat: Threat) -> Certificate:
        """Labels and margins from evidence. InputError if the threat does not fit the images."""

    @abstractmethod
    def label(self, evidence: Evidence) -> Int64[Tensor, " B"]:
        """Labels from evidence."""

    @abstractmethod
    def check(self, images: Float[Tensor, "B C H W"]) -> None:
        """Refuse a model that breaks the theorem's conditions (InputError with the reason)."""

    @abstractmethod
    def forward_passes(self, image_size: tuple[int, int]) -> int:
        """Network calls per image."""

    def number_of_views(self, image_size: tuple[int, int]) -> int:
        """V for images of (H, W) pixels; 1 without views."""
        return 1

    def largest_patch(self, evidence: Evidence) -> Int64[Tensor, " B"] | None:
        """Side of the largest certified square, anywhere, per image; 0 if none; None if predict depends on it."""
        return None

    def predict(self, images: Float[Tensor, "B C H W"]) -> Int64[Tensor, " B"]:
        """The label of every image; the same as the label that ``certify`` gives."""
        return self.label(self.evidence(images))

    def certify(self, images: Float[Tensor, "B C H W"], threat: Threat) -> Certificate:
        """Labels, and margins for every location of the threat. Another threat never changes the label."""
        if not isinstance(threat, PatchThreat | SparseThreat):
            raise InputError(f"a threat is PatchThreat(…) or SparseThreat(…), not {threat!r}"[:160])
        return self.certificate(self.evidence(images), threat)

    def select_backend(self, images: Float[Tensor, "B C H W"], pictures: int, only: str | None = None) -> str | None:
        """Choose the fastest backend for so many images like ``images``, or take the backend that is named.

        Return the name of the backend; None for defenses that have no choice.
        """
        return None

    def compute_all_margins(self) -> None:
        """From now on give the margins of all locations, also those that the verdict does not need."""

    def reference_backend(self) -> AbstractContextManager[None]:
        """Run the original PyTorch network inside this context, for example to count its multiply-adds."""
        return nullcontext()

    def to(self, device: str | torch.device) -> "Defense":
        """Move the network; defenses without one stay where they are."""
        return self


class ViewDefense(Defense):
    """A defense made of a network, views and a rule: everything but how logits become evidence, and the rule.

    It is attacked through ``soft_values`` and the rule's ``leads``, and exported as the rule's ``graph`` behind its network.

    Args:
        model: an ``nn.Module`` in eval mode; its ``encoding`` says what it reads (see ``evidence.logits``).
        views: its views; None for a network of local logits, whose receptive fields are derived from its layers.
        batch_size: most images or views of a pass on an accelerator (default: 2²⁰ pixels); see ``inference``.
    """

    raw: ClassVar[bool] = False
    """True if logits themselves are evidence; their rounding is then measured without centring."""

    def __init__(self, model: nn.Module, views: Views | None, batch_size: int | None = None):
        if batch_size is not None and not (isinstance(batch_size, int) and batch_size >= 1):
            raise InputError(f"batch_size is a whole number of at least 1, not {batch_size!r}")
        self.model, self.views, self.batch_size = model, views, batch_size
        self._views: dict[tuple[int, int], Views] = {}
        self._tolerance: dict[tuple[Any, ...], tuple[bytes, ev.Tolerance]] = {}
        self._sees: dict[tuple[Threat, tuple[int, int]], Incidence] = {}

    @abstractmethod
    def rule(self, image_size: tuple[int, int]) -> Rule:
        """The rule for images of (H, W) pixels."""

    @abstractmethod
    def values(
        self, logits: Float[Tensor, "B V K"], tolerance: ev.Tolerance
    ) -> tuple[Tensor, Bool[Tensor, "B V"] | None, Float64[Tensor, " B"] | None]:
        """Evidence from logits: values, unsure views or None, error or None."""

    def soft_values(self, logits: Float[Tensor, "N V K"]) -> Float[Tensor, "N V K"]:
        """Evidence with a gradient, for attacks: by default ``values``, or soft votes for the top class if it has none."""
        values = self.values(logits, EXACT)[0]
        return values if values.is_floating_point() else soft_votes(logits, None)

    def leads(self, images: Float[Tensor, "N C H W"], generator: Generator) -> Float[Tensor, "N K"] | None:
        size = image_size(images)
        return self.leads_of_logits(ev.differentiable_logits(self.model, self.views_of(size), images), size)

    def leads_of_logits(self, logits: Float[Tensor, "N V K"], image_size: tuple[int, int]) -> Float[Tensor, "N K"]:
        """Leads from the logits of all views of images of (H, W) pixels."""
        return self.rule(image_size).leads(self.soft_values(logits))

    def network_leads(self, images: Float[Tensor, "N C H W"]) -> Float[Tensor, "N K"]:
        """Leads of the mean over the views' logits."""
        views = self.views_of(image_size(images))
        return lead_of(ev.differentiable_logits(self.model, views, images).mean(1))

    def exported_network(self, image_size: tuple[int, int]) -> nn.Module | None:
        return self.model

    def views_of(self, image_size: tuple[int, int]) -> Views:
        """The views of images of (H, W) pixels."""
        if self.views is not None:
            return self.views
        if image_size not in self._views:
            self._views[image_size] = receptive_fields(self.model, image_size)
        return self._views[image_size]

    def number_of_views(self, image_size: tuple[int, int]) -> int:
        return self.views_of(image_size).number(image_size)

    def check(self, images: Float[Tensor, "B C H W"]) -> None:
        self.tolerance(images)

    def tolerance(self, images: Float[Tensor, "B C H W"]) -> ev.Tolerance:
        """The measured rounding of a score for images of this size; runs the model check the first time, and when
        weights have changed."""
        first = next(self.model.parameters(), images)
        autocast = torch.is_autocast_enabled(images.device.type)
        training = any(module.training for module in self.model.modules())
        key = (*images.shape[1:], images.dtype, images.device, training, first.dtype, autocast)
        state = ev.weights_digest(self.model)
        if self._tolerance.get(key, (None,))[0] != state:
            self._tolerance[key] = state, self.checked(images)
        return self._tolerance[key][1]

    def checked(self, images: Float[Tensor, "B C H W"]) -> ev.Tolerance:
        """Run the model check on images of this size."""
        views = self.views_of(image_size(images))
        return check_model(self.model, views, images, self.batch_size, raw=self.raw)

    def evidence(self, images: Float[Tensor, "B C H W"]) -> Evidence:
        ev.check_images(images)
        tolerance, size = self.tolerance(images), image_size(images)
        logits = ev.logits(self.model, self.views_of(size), images, batch_size=self.batch_size)
        if not bool(torch.isfinite(logits).all()):
            raise InputError("the model's answers are not finite; a certificate needs finite logits")
        values, unsure, error = self.values(logits, tolerance)
        return Evidence(values, unsure, size, error)

    def label(self, evidence: Evidence) -> Int64[Tensor, " B"]:
        return self.rule(evidence.image_size).predict(evidence.values) if evidence.labels is None else evidence.labels

    def certificate(self, evidence: Evidence, threat: Threat) -> Certificate:
        relation, rule = self.relation(threat, evidence.image_size), self.rule(evidence.image_size)
        rows = relation.rows.to(evidence.values.device)
        verdict = rule.certify(evidence.values, rows, evidence.unsure, evidence.error)
        if evidence.labels is not None:
            same = (evidence.labels == verdict.label)[:, None]
            verdict = replace(verdict, label=evidence.labels, margin=verdict.margin.masked_fill(~same, -torch.inf))
        if isinstance(threat, SparseThreat):
            margin, relation = verdict.margin.amin(1, keepdim=True), None
        else:
            margin = verdict.margin[:, relation.row_of.to(verdict.margin.device)]
        return Certificate(verdict.label, margin, threat, rule.theorem, relation, self.notion, verdict.alarm)

    def relation(self, threat: Threat, image_size: tuple[int, int]) -> Incidence:
        """``sees`` for these views, computed once per threat and image size."""
        key = (threat, image_size)
        if key not in self._sees:
            self._sees[key] = sees(self.views_of(image_size), threat, image_size)
        return self._sees[key]

    def _largest_patch(self, evidence: Evidence) -> Int64[Tensor, " B"]:
        """Side of the largest certified square. Certificates nest, so the search stops at the first size that fails."""
        largest = torch.zeros(len(evidence.values), dtype=torch.int64, device=evidence.values.device)
        left = torch.arange(len(evidence.values), device=evidence.values.device)
        for side in range(1, min(evidence.image_size) + 1):
            relation = self.relation(PatchThreat(side), evidence.image_size)
            unsure, error = (None if t is None else t[left] for t in (evidence.unsure, evidence.error))
            rows = relation.rows[relation.undominated].to(left.device)
            verdict = self.rule(evidence.image_size).certify(evidence.values[left], rows, unsure, error)
            left = left[verdict.certified]
            if len(left) == 0:
                break
            largest[left] = side
        return largest

    def forward_passes(self, image_size: tuple[int, int]) -> int:
        return ev.forward_passes(self.model, self.views_of(image_size), image_size)

    def to(self, device: str | torch.device) -> "ViewDefense":
        self.model.to(device)
        return self
