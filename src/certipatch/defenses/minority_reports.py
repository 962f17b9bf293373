"""Minority Reports (McCoyd et al. 2020): lay every mask over the image in turn; a sure dissenter is an alarm."""

from collections.abc import Sequence
from typing import Any, ClassVar, final

import torch
from jaxtyping import Bool, Float, Float64
from pydantic import Field
from torch import Tensor, nn

from certipatch import evidence as ev
from certipatch.certificate import Notion
from certipatch.defenses.masked import MaskDefense, PerAxis
from certipatch.defenses.settings import MaskSettings
from certipatch.rules import MinorityReports as Rule
from certipatch.threats import PatchThreat
from certipatch.views import PixelSets, Views
from certipatch.views.render import Fill


class MinorityReportsSettings(MaskSettings):
    """The masks, and τ."""

    threshold: float = Field(default=0.5, ge=0, lt=1)


DEFAULT = MinorityReportsSettings()


@final
class MinorityReports(MaskDefense):
    """Detects attacks: a certified image keeps its answer or raises an alarm. Around any classifier.

    Args:
        model: as for ``PatchCleanser``.
        threat: the patch, or patches, that masks are made for.
        masks: masks per axis, k or (rows, columns); by default 6, or as many as ``stride`` needs. Or bool (M, H, W), your
            own.
        stride: pixels from mask to mask.
        fill: what masks are painted with; None for the model's own ``fill``, else 0.5.
        threshold: τ: a masked answer counts when its softmax score exceeds it. Larger raises fewer alarms on clean
            images and certifies less.
        batch_size: images per forward pass.

    Takes M + 1 passes. ``predict`` gives the label; whether an alarm is raised is ``certify(…).alarm``.
    """

    name: ClassVar[str] = "minority-reports"
    notion: ClassVar[Notion] = "detection"
    settings_class = MinorityReportsSettings
    in_words: ClassVar[str] = (
        "The network looks at the picture, and at it with each of many masks over it. If under some mask it is "
        "sure of another class, it raises an alarm. Wherever the patch lies, some mask hides it. Where the network is sure of "
        "the answer under such a mask, an attacker can change the answer only at the price of an alarm."
    )

    def __init__(
        self,
        model: nn.Module,
        threat: PatchThreat | Sequence[PatchThreat],
        masks: PerAxis | Bool[Tensor, "M H W"] = None,
        stride: PerAxis = None,
        fill: Fill | None = None,
        threshold: float = DEFAULT.threshold,
        batch_size: int | None = None,
    ):
        super().__init__(model, threat, masks, stride, fill, batch_size)
        self._rule = Rule(threshold)
        self.theorem = self._rule.theorem

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"threshold": self._rule.threshold}

    def views_of(self, image_size: tuple[int, int]) -> Views:
        if image_size not in self._views:
            masks, _ = self.covering(image_size)
            self._views[image_size] = PixelSets(torch.cat([torch.ones_like(masks[:1]), ~masks]))
        return self._views[image_size]

    def rule(self, image_size: tuple[int, int]) -> Rule:
        return self._rule

    def values(
        self, logits: Float[Tensor, "B V K"], tolerance: ev.Tolerance
    ) -> tuple[Tensor, None, Float64[Tensor, " B"]]:
        scores = ev.scores(logits)
        return scores, None, tolerance.of(scores).flatten(1).amax(1).double()
